"""The larger corpus without a model hub: documentation that Debian and Ubuntu package, and Python source from this machine.

    prose      essays and commentaries, long documents
    reference  manuals, tutorials, dictionaries
    python     source files of the standard library and of installed packages

About 55 MB of English by default and some 250 MB with all packages of the table. Call it what it is, technical English and
Python: it is no sample of the web. Documents shorter than 500 bytes are left out, exact duplicates dropped. Licences are those of
the packages (their copyright files lie in the cache beside the text): GPL-2 (anarchism, linux-doc), Artistic or GPL (perl-doc),
PSF (python3-doc), PostgreSQL, GFDL (dict-foldoc), public domain (sword-comm-*, sqlite3-doc), Vim and OPL (vim-doc), LGPL (racket-doc), Apache-2.0 (erlang-doc),
GPL-2+ (sagemath-doc, git-doc, dict-gcide), WordNet's (dict-wn).
"""

import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.config import LocalDocsSource
from data_prep.errors import InputError
from data_prep.sources.debian import unpacked_package
from data_prep.sources.markup import dictionary_pages, html_text, plain_text, sword_blocks
from data_prep.sources.quickstart import python_sources
from data_prep.sources.store import TextStore

ENTRIES_PER_PAGE = 16
SMALLEST_DOCUMENT = 500


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the text of a package is reached."""

    part: str  # prose or reference
    format: str  # plain, html, dict or sword
    pattern: str  # files, below the folder where the package is unpacked


RECIPES = {
    "anarchism": Recipe("prose", "plain", "usr/share/doc/anarchism/markdown/*.md.gz"),
    "sword-comm-tdavid": Recipe("prose", "sword", "usr/share/sword/modules/**/*.[bc]zs"),
    "sword-comm-mhcc": Recipe("prose", "sword", "usr/share/sword/modules/**/*.[bc]zs"),
    "perl-doc": Recipe("reference", "plain", "usr/share/perl/*/pod/*.pod"),
    "python3-doc": Recipe("reference", "plain", "usr/share/doc/python3*/html/_sources/**/*.txt"),
    "postgresql-doc": Recipe("reference", "html", "usr/share/doc/postgresql-doc-*/html/*.html"),
    "dict-foldoc": Recipe("reference", "dict", "usr/share/dictd/*.index"),
    "linux-doc": Recipe("reference", "plain", "usr/share/doc/linux-doc-*/Documentation/**/*.rst.gz"),
    "vim-doc": Recipe("reference", "html", "usr/share/doc/vim/html/*.html"),
    "sqlite3-doc": Recipe("reference", "html", "usr/share/doc/sqlite3/**/*.html"),
    "git-doc": Recipe("reference", "plain", "usr/share/doc/git-doc/**/*.txt"),
    "racket-doc": Recipe("reference", "html", "usr/share/doc/racket/**/*.html"),
    "erlang-doc": Recipe("reference", "html", "usr/share/doc/erlang-doc/**/*.html"),
    "sagemath-doc": Recipe("reference", "html", "usr/share/doc/sagemath/html/en/**/*.html"),
    "dict-wn": Recipe("reference", "dict", "usr/share/dictd/*.index"),
    "dict-gcide": Recipe("reference", "dict", "usr/share/dictd/*.index"),
}


def check_packages(packages: list[str]) -> None:
    """Raises InputError for a package of which the way to its text is not known."""
    for name in packages:
        if name not in RECIPES:
            raise InputError(f"source.packages: there is no recipe for {name}; known are {', '.join(RECIPES)}")


def extract_local_docs(source: LocalDocsSource, cache: Path, say: Callable[[str], None], store: TextStore) -> None:
    """Writes the corpus into `store`, downloading what the cache lacks; InputError where that fails."""
    check_packages(source.packages)
    for name in source.packages:
        recipe = RECIPES[name]
        full_name, folder = unpacked_package(name, cache)
        counts = store.add_all(recipe.part, full_name, _long_enough(_documents(recipe, folder, full_name)))
        if not counts.documents:
            raise InputError(f"package {full_name} has no text where its recipe looks; leave it out of source.packages")
        say(f"text: {full_name}, {counts.documents:,} documents, {counts.text_bytes / 1e6:.1f} MB")
    if source.python_mb:
        store.add_all("python", "installed Python packages", python_sources(source.python_mb))


def _documents(recipe: Recipe, folder: Path, full_name: str) -> Iterator[str]:
    for path in sorted(folder.glob(recipe.pattern)):
        if not path.is_file():
            continue
        try:
            if recipe.format == "plain":
                yield plain_text(path)
            elif recipe.format == "html":
                yield html_text(plain_text(path))
            elif recipe.format == "dict":
                yield from dictionary_pages(path, ENTRIES_PER_PAGE)
            else:
                yield from sword_blocks(path)
        except (OSError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(
                f"{path} of package {full_name} is damaged ({error}); delete {folder} and run again"
            ) from None


def _long_enough(texts: Iterator[str]) -> Iterator[str]:
    return (text for text in texts if len(text) >= SMALLEST_DOCUMENT)
