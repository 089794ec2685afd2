"""Prints the project's dependencies, one per line, for `pip install --requirement`; extras by name, between commas or as arguments.

    python launchers/requirements.py quickstart deepspeed

The Dockerfile installs them in a layer of their own, before the code, so that a change of the code installs none of them again, and setup.sh installs
in the same steps. Standard library only.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
names = [name for word in sys.argv[1:] for name in word.split(",")]
if unknown := [name for name in names if name not in extras]:
    sys.exit(f"requirements.py: {unknown[0]} is not an extra of pyproject.toml; try {', '.join(extras)}")
print(*project["dependencies"], *(line for name in names for line in extras[name]), sep="\n")
