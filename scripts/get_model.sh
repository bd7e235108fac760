#!/usr/bin/env bash
# Fetch an official checkpoint to where the other commands look for it; see `bash scripts/get_model.sh --help`.
# From wherever it is called, relative targets are relative to the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m scripts.get_model "$@"
