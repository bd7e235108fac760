#!/usr/bin/env bash
# Fetch the published fictional knowledge; see `bash scripts/get_fictional_knowledge.sh --help`.
# From wherever it is called, relative targets are relative to the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m scripts.get_fictional_knowledge "$@"
