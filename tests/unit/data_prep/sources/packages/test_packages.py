"""Text from packages: extraction from each format, Debian packages through apt, and what is kept between runs."""

import gzip
import json
import os
import shutil
import struct
import subprocess
import zlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from data_prep.errors import InputError
from data_prep.sources.packages import local_docs, quickstart
from data_prep.sources.packages.debian import unpacked_packages
from data_prep.sources.packages.markup import dictionary_pages, html_text, plain_text, sword_blocks
from data_prep.sources.packages.recipes import PackageRecipe
from data_prep.sources.packages.settings import LocalDocsSource, QuickstartSource
from data_prep.sources.store import TextStore, stored_text


def texts_of(subsets) -> dict[str, list[str]]:
    return {s.name: [json.loads(line)["text"] for file in s.files for line in open(file)] for s in subsets}


def test_html_becomes_one_line_per_block_with_code_unchanged():
    page = (
        "<html><head><title>No</title><script>var x = '<p>';</script></head><body><!-- no <b>-->"
        '<div class="navheader"><table><tr><td>Prev</td></tr></table><hr/></div>'
        "<h1>Sorting &amp; searching</h1><p>Two\n   <b>lines</b>,\tone&nbsp;block.</p><ul><li>a<li>b</ul>"
        "<pre>for x in y:\n    print(x &lt; 1)\n</pre></body></html>"
    )
    assert html_text(page) == (
        "Sorting & searching\n\nTwo lines, one\xa0block.\n\na\n\nb\n\nfor x in y:\n    print(x < 1)\n"
    )


def test_gzip_is_unpacked_by_its_suffix(tmp_path):
    (tmp_path / "a.md.gz").write_bytes(gzip.compress("Größe".encode()))
    (tmp_path / "b.md").write_bytes(b"\xff plain")
    assert plain_text(tmp_path / "a.md.gz") == "Größe"
    assert plain_text(tmp_path / "b.md") == "\N{REPLACEMENT CHARACTER} plain"


def test_dictionary_entries_are_in_file_order_without_repeats(tmp_path):
    body = b"about" + b"beta\n  second letter" + b"alpha\n  first letter"
    (tmp_path / "d.dict.dz").write_bytes(gzip.compress(body))
    # A=0, F=5, U=20, Z=25, B=1: beta spans 5+20, alpha 25+20, listed under two headwords.
    (tmp_path / "d.index").write_text("00-database-info\tA\tF\nalpha\tZ\tU\nbeta\tF\tU\nfirst\tZ\tU\n")
    assert list(dictionary_pages(tmp_path / "d.index", 2)) == ["beta\n  second letter\n\nalpha\n  first letter\n"]
    assert len(list(dictionary_pages(tmp_path / "d.index", 1))) == 2


def test_dictionary_numbers_beyond_one_digit(tmp_path):
    body = b"x" * 70 + b"entry"
    (tmp_path / "d.dict.dz").write_bytes(gzip.compress(body))
    (tmp_path / "d.index").write_text("entry\tBG\tF\n")  # 1 * 64 + 6
    assert list(dictionary_pages(tmp_path / "d.index", 1)) == ["entry\n"]


def test_sword_module_gives_its_blocks(tmp_path):
    blocks = [
        zlib.compress(text.encode()) for text in ("<title>Psalm 1</title><p>Blessed is the man.</p>", "<p>Two</p>")
    ]
    (tmp_path / "ot.czz").write_bytes(b"".join(blocks))
    entries = struct.pack("<III", 0, len(blocks[0]), 48) + struct.pack("<III", 0, 0, 0)
    (tmp_path / "ot.czs").write_bytes(entries + struct.pack("<III", len(blocks[0]), len(blocks[1]), 10))
    assert list(sword_blocks(tmp_path / "ot.czs")) == ["Psalm 1\n\nBlessed is the man.\n", "Two\n"]


def test_store_drops_exact_duplicates_across_parts(tmp_path):
    store = TextStore(tmp_path)
    store.add_texts("a", "first", ["one", "two", "one"])
    counts = store.add_texts("b", "second", ["two", "three"])
    assert texts_of(store.parts()) == {"a": ["one", "two"], "b": ["three"]}
    assert (counts.documents, counts.duplicates, counts.text_bytes) == (1, 1, 5)


def test_stored_text_is_extracted_once_for_its_settings(tmp_path):
    calls = []

    def extract(store: TextStore) -> None:
        calls.append(1)
        store.add_texts("a", "here", [f"text {len(calls)}"])

    folder = tmp_path / "text"
    for settings, expected in (({"n": 1}, 1), ({"n": 1}, 1), ({"n": 2}, 2)):
        subsets, counts = stored_text(folder, settings, extract)
        assert texts_of(subsets) == {"a": [f"text {expected}"]}
        dropped = dict.fromkeys(("duplicates", "overlapping", "repeated", "repeated_bytes"), 0)
        assert counts == [{"name": "a", "origin": "here", "documents": 1, "text_bytes": 6, **dropped}]
    (folder / "a_00000.jsonl").write_text("cut")
    (folder / "mine.txt").write_text("not ours")
    assert texts_of(stored_text(folder, {"n": 2}, extract)[0]) == {"a": ["text 3"]}
    assert (folder / "mine.txt").exists()


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """A package archive of two real .deb files behind fakes of apt-get and apt-cache; dpkg-deb is real."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    archive = tmp_path / "archive"
    archive.mkdir()
    build_package(archive, "tiny-doc-15", "1%3a15.2", {"usr/share/doc/tiny/a.txt": "text " * 200})
    build_package(
        archive, "perl-doc", "5.36", {"usr/share/perl/5/pod/a.pod": "pod " * 200, "usr/share/perl/5/pod/b.pod": "short"}
    )
    tools = tmp_path / "tools"
    tools.mkdir()
    # apt-get OPTIONS download NAMES copies the archives; apt-cache show|depends NAMES prints what the real one would.
    script(
        tools / "apt-get",
        "seen=; for p; do case $seen$p in download) seen=yes;; yes*) cp "
        f'{archive}/"$p"_*.deb . || exit 100;; esac; done',
    )
    script(
        tools / "apt-cache",
        'verb=; for p; do case $p in show|depends) verb=$p;; -*|*=*) ;; *) if [ $verb = depends ]; then echo "$p"; '
        '[ "$p" != tiny-doc ] || echo "  Depends: tiny-doc-15"; '
        f'elif [ "$p" = tiny-doc ] || ls {archive}/"$p"_*.deb >/dev/null 2>&1; then echo "Package: $p"; fi;; esac; done',
    )
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return archive


def script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def build_package(archive: Path, name: str, version: str, files: dict[str, str]) -> None:
    root = archive / f"{name}.build"
    for relative, text in files.items():
        (root / relative).parent.mkdir(parents=True, exist_ok=True)
        (root / relative).write_text(text)
    (root / "DEBIAN").mkdir()
    control = f"Package: {name}\nVersion: {version.replace('%3a', ':')}\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    (root / "DEBIAN" / "control").write_text(control)
    target = archive / f"{name}_{version}_all.deb"
    subprocess.run(["dpkg-deb", "-b", "--root-owner-group", str(root), str(target)], check=True, capture_output=True)
    shutil.rmtree(root)


def test_package_is_fetched_once_and_metapackages_are_resolved(debian, tmp_path):
    packages = unpacked_packages(["tiny-doc", "perl-doc"], tmp_path / "cache")
    assert [p.full_name for p in packages.values()] == ["tiny-doc 1:15.2", "perl-doc 5.36"]
    assert (packages["tiny-doc"].folder / "usr/share/doc/tiny/a.txt").read_text() == "text " * 200
    shutil.rmtree(debian)
    assert unpacked_packages(["tiny-doc", "perl-doc"], tmp_path / "cache") == packages
    assert sorted(p.name for p in (tmp_path / "cache" / "debian").iterdir()) == ["perl-doc=5.36.d", "tiny-doc=1:15.2.d"]


def test_apt_is_called_once_for_all_packages(debian, tmp_path):
    tools, calls = tmp_path / "tools", tmp_path / "calls"
    for name in ("apt-get", "apt-cache"):
        text = (tools / name).read_text().split("\n", 1)[1]
        script(tools / name, f'echo "{name} $*" >> {calls}\n{text}')
    unpacked_packages(["tiny-doc", "perl-doc"], tmp_path / "cache")
    assert [line.split()[0] for line in calls.read_text().splitlines()] == ["apt-cache", "apt-cache", "apt-get"]


def test_unknown_package_is_named(debian, tmp_path):
    with pytest.raises(
        InputError, match=r"package no-such-doc is unknown to apt here; leave it out of source.packages"
    ):
        unpacked_packages(["perl-doc", "no-such-doc"], tmp_path / "cache")


def test_failed_download_gives_the_reason(debian, tmp_path):
    script(tmp_path / "tools" / "apt-get", 'echo "E: Failed to fetch: no route" >&2; exit 100')
    message = (
        r"packages perl-doc could not be downloaded; check the network connection \(E: Failed to fetch: no route\)"
    )
    with pytest.raises(InputError, match=message):
        unpacked_packages(["perl-doc"], tmp_path / "cache")


def test_error_without_apt_names_source_quickstart(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        InputError, match=r"the source needs apt-get, which this system lacks \(Debian and Ubuntu have it\)"
    ):
        unpacked_packages(["perl-doc"], tmp_path / "cache")


def test_local_docs_takes_long_documents_of_its_packages(debian, tmp_path):
    logged: list[str] = []
    store = TextStore(tmp_path)
    local_docs.extract_local_docs(
        LocalDocsSource(packages=["perl-doc"], python_mb=0), tmp_path / "cache", logged.append, store
    )
    assert texts_of(store.parts()) == {"reference": ["pod " * 200]}
    assert logged == ["text: perl-doc 5.36, 1 documents, 0.0 MB"]


def test_package_without_a_recipe_is_named_before_any_download(tmp_path):
    with pytest.raises(InputError, match="there is no recipe for emacs-doc; try one of anarchism, sword-comm-tdavid"):
        local_docs.extract_local_docs(LocalDocsSource(packages=["emacs-doc"]), tmp_path, print, TextStore(tmp_path))


def test_package_without_text_is_named(debian, tmp_path, monkeypatch):
    monkeypatch.setitem(local_docs.RECIPES, "perl-doc", PackageRecipe("reference", "plain", "nowhere/*", "x"))
    with pytest.raises(InputError, match=r"package perl-doc 5.36 has no text in the files of its recipe; leave it out"):
        local_docs.extract_local_docs(
            LocalDocsSource(packages=["perl-doc"]), tmp_path / "c", print, TextStore(tmp_path)
        )


@pytest.fixture(scope="module")
def quickstart_texts(tmp_path_factory) -> dict[str, list[str]]:
    try:
        distribution(quickstart.WIKI_PACKAGE)
    except PackageNotFoundError:
        pytest.skip("the extra quickstart is not installed")
    store = TextStore(tmp_path_factory.mktemp("quickstart"))
    quickstart.extract_quickstart(QuickstartSource(english_docs_mb=0.5, python_mb=1.0), store)
    return texts_of(store.parts())


def test_quickstart_respects_its_limits_and_has_no_duplicates(quickstart_texts):
    sizes = {name: sum(map(len, texts)) for name, texts in quickstart_texts.items()}
    assert 0.9e6 < sizes["python"] < 1.0e6 + quickstart.SOURCE_BYTES[1]
    assert 5.2e6 < sizes["english"] < 6.2e6  # 5.1 MB of leads with their titles, and 0.5 MB of documentation
    everything = [text for texts in quickstart_texts.values() for text in texts]
    assert len(everything) == len(set(everything))


def test_quickstart_pages_hold_several_entries_of_one_topic(quickstart_texts):
    page = next(text for text in quickstart_texts["english"] if "# Cinderella\n" in text)
    assert page.count("\n# ") + 1 == 8
    longest = sorted(map(len, quickstart_texts["english"]))
    assert longest[len(longest) // 2] > 2500  # half the documents are longer than 512 tokens of 4 bytes, and some


def test_packages_are_found_in_a_folder_called_tests(tmp_path, monkeypatch):
    """Tests are left out by their place in a package or in the standard library, whatever the folders above are called."""
    site, library = tmp_path / "tests" / "site-packages", tmp_path / "test" / "site-packages" / "python"
    for path in (
        site / "demo" / "kept.py",
        site / "demo" / "tests" / "left.py",
        library / "kept.py",
        library / "test" / "left.py",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {path}\n" + "keep = 1\n" * 300)
    (site / "demo-1.dist-info").mkdir()
    (site / "demo-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: demo\nVersion: 1\n")
    (site / "demo-1.dist-info" / "RECORD").write_text("demo/kept.py,,\ndemo/tests/left.py,,\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(quickstart, "PACKAGES", ("demo",))
    monkeypatch.setattr(quickstart.sysconfig, "get_path", lambda _: str(library))
    found = sorted(text.splitlines()[0] for text in quickstart.python_sources(1.0))
    assert found == sorted([f"# {site / 'demo' / 'kept.py'}", f"# {library / 'kept.py'}"])


def test_quickstart_python_is_python(quickstart_texts):
    parsed = 0
    for text in quickstart_texts["python"]:
        try:
            compile(text, "x", "exec", dont_inherit=True)
            parsed += 1
        except SyntaxError:
            continue  # a template or a file for another version
    assert parsed >= 0.97 * len(quickstart_texts["python"])
