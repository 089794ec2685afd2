"""A new virtual environment that has some distributions with all that they need, and nothing else, as links to the files installed here."""

import subprocess
import venv
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement


def needed(*names: str) -> set[str]:
    """Returns the distributions that some need, themselves included."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name.lower() in found:
            continue
        found.add(name.lower())
        requirements = map(Requirement, distribution(name).requires or [])
        waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def fresh_environment(folder: Path, *names: str) -> Path:
    """Returns the interpreter of a new environment with some distributions and their needs."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    for name in needed(*names):
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or []} - {"..", "bin", "__pycache__"}:
            link = packages / top
            if not link.exists():
                link.symlink_to(Path(str(installed.locate_file(top))))
    return python
