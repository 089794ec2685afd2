"""CONTRIBUTING.md matches the code: the tour's paths and names exist, and every folder is on the map."""

import ast
import re
from pathlib import Path

from support.processes import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
TOUR = re.search(r"^## A newcomer's tour\n(.*?)^## ", TEXT, re.M | re.S)[1]


def defined(path: Path) -> set[str]:
    """Returns the names that a file defines: functions, classes, and methods as Class.method."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, kinds):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, kinds)}
    return found


def test_tour_has_ten_questions_whose_paths_and_names_exist() -> None:
    assert len(re.findall(r"^\d+\. \*\*.*?\?\*\*", TOUR, re.M)) == 10
    steps = re.findall(r"`([\w/]+\.py)`\s+`([\w.]+)`(?: and `([\w.]+)`)?", TOUR)
    assert len(steps) > 20
    stale = []
    for path, *names in steps:
        there = defined(ROOT / path) if (ROOT / path).exists() else set()
        for name in filter(None, names):
            if name not in there:
                homes = [p for top in ("ssa_pretrain", "data_prep", "kernels") for p in (ROOT / top).rglob("*.py")]
                places = [str(home.relative_to(ROOT)) for home in homes if name in defined(home)]
                stale.append(f"{path} {name} -> {', '.join(places) or 'nowhere'}")
    assert stale == []


def test_links_and_folders_of_the_tour_exist() -> None:
    for target in re.findall(r"\]\(([\w/.]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_every_folder_is_on_the_map() -> None:
    packages = [path.name for path in (ROOT / "ssa_pretrain").iterdir() if (path / "__init__.py").exists()]
    folders = [path.name for path in (ROOT / "tests").iterdir() if any(path.glob("**/*.py"))]
    assert [name for name in packages + folders if f"`{name}/`" not in TEXT] == []
