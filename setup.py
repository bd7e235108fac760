"""What pyproject.toml cannot state: a wheel has configs/ as olmo/configs, and olmo/py.typed. A checkout has both beside
or without the package, so that olmo/ holds rooms and nothing else."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib, "olmo")
            shutil.copytree("configs", package / "configs", dirs_exist_ok=True)
            (package / "py.typed").touch()


setup(cmdclass={"build_py": WithConfigs})
