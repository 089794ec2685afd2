"""Adds `conf/` to wheels, as `ssa_pretrain/conf`. Everything else about the build is in pyproject.toml; an editable install reads `conf/` itself."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithSettings(build_py):
    """Copies the YAML files of the settings into the package."""

    def run(self) -> None:
        """Builds, then copies."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "ssa_pretrain" / "conf"
            shutil.copytree(Path(__file__).parent / "conf", target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithSettings})
