"""What a wheel must hold: python -m tests.wheel_files dist/*.whl"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("analysis", "knowledge_entropy", "olmo")


def expected() -> set[str]:
    """The files of a wheel besides its metadata: all of the packages, and the configurations."""
    files = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if "__pycache__" not in path.parts}
    own = {str(path.relative_to(ROOT)) for path in files if path.is_file()}
    configs = {f"olmo/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    return own | configs | {f"{package}/py.typed" for package in PACKAGES}


def held(wheel: Path) -> set[str]:
    """The files of a wheel besides its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}


if __name__ == "__main__":
    found, wanted = held(Path(sys.argv[1])), expected()
    if found != wanted:
        sys.exit(f"{sys.argv[1]}: missing {sorted(wanted - found)}; too many {sorted(found - wanted)}")
    print(f"{sys.argv[1]}: {len(found)} files, as expected")
