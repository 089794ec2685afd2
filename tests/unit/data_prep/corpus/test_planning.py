"""The plan depends only on the files; a file is identified by its content."""

import os

import pytest

from data_prep.corpus.planning import file_checksums, input_digest, plan_shards
from data_prep.errors import InputError
from data_prep.sources.files import Part, expand_paths


def text_files(folder, count):
    for number in range(count):
        (folder / f"{number:03d}.txt").write_text("x" * 100)
    return expand_paths([str(folder)], (".txt",), "text")


def test_small_files_share_a_shard_in_sorted_order(tmp_path):
    files = text_files(tmp_path, 10)
    shards = plan_shards([Part("text", "text", files)], 300 / 1e6)
    assert [len(shard.pieces) for shard in shards] == [3, 3, 3, 1]
    assert [piece.path for shard in shards for piece in shard.pieces] == sorted(files)
    assert [shard.stem for shard in shards] == ["text_00000", "text_00001", "text_00002", "text_00003"]


def test_default_shard_size_is_a_power_of_two_of_the_corpus(tmp_path):
    path = tmp_path / "x.jsonl"
    path.touch()
    for megabytes, shards in ((1, 1), (3, 2), (32, 16), (40, 20), (65, 17)):
        os.truncate(path, megabytes * 1_000_000)
        assert len(plan_shards([Part("text", "jsonl", (str(path),))], 0)) == shards, megabytes


def test_paths_may_be_files_folders_and_patterns_and_each_file_counts_once(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("a.jsonl", "b.jsonl.gz", "deep/c.jsonl", "d.csv", ".hidden/e.jsonl"):
        (tmp_path / name).write_text("x")
    names = [str(tmp_path), str(tmp_path / "a.jsonl"), str(tmp_path / "*.jsonl"), str(tmp_path / "d.csv")]
    found = expand_paths(names, (".jsonl", ".jsonl.gz"), "jsonl")
    assert [os.path.relpath(f, tmp_path) for f in found] == ["a.jsonl", "b.jsonl.gz", "d.csv", "deep/c.jsonl"]


@pytest.mark.parametrize(
    "path,message",
    [
        ("{}/none", r"none does not exist; correct the path \(relative ones start at"),
        ("{}/*.jsonl", r"the pattern .*\*.jsonl matches no file; try ls"),
        ("{}", r"holds no jsonl file \(.jsonl, .jsonl.gz\); name another folder or the files"),
    ],
)
def test_paths_without_a_file_are_rejected(tmp_path, path, message):
    with pytest.raises(InputError, match=message):
        expand_paths([path.format(tmp_path)], (".jsonl", ".jsonl.gz"), "jsonl")


def names(folder, *paths):
    return [os.path.relpath(path, folder) for path in expand_paths([str(p) for p in paths], (".jsonl",), "jsonl")]


def test_links_to_folders_are_followed_and_each_file_counts_once(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for path in (inside / "m" / "a.jsonl", inside / "b.jsonl", outside / "c.jsonl"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (inside / "link").symlink_to(outside)
    (inside / "again").symlink_to(inside / "m")  # its own name is the one that decides the order
    (inside / "m" / "loop").symlink_to(inside)
    (inside / "a.jsonl").symlink_to(inside / "b.jsonl")
    assert names(inside, inside) == ["b.jsonl", "link/c.jsonl", "m/a.jsonl"]
    assert names(inside, inside / "b.jsonl", inside / "m" / ".." / "b.jsonl") == ["b.jsonl"]


@pytest.mark.parametrize("paths", ["{}", "{}/*.jsonl", "{}/b.jsonl"])
def test_dangling_link_is_rejected(tmp_path, paths):
    (tmp_path / "a.jsonl").write_text("x")
    (tmp_path / "b.jsonl").symlink_to("gone")
    with pytest.raises(
        InputError, match=r"b.jsonl is a link to gone, which does not exist; restore it or remove the link"
    ):
        expand_paths([paths.format(tmp_path)], (".jsonl",), "jsonl")


def test_unreadable_folder_is_rejected(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("x")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(
        InputError, match=r"closed cannot be read \(Permission denied\); try chmod \+rx, or name the files"
    ):
        expand_paths([str(tmp_path)], (".jsonl",), "jsonl")


def test_path_that_is_neither_file_nor_folder_is_rejected(tmp_path):
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(InputError, match=r"x.jsonl is neither a file nor a folder; save its content to a file first"):
        expand_paths([str(tmp_path / "x.jsonl")], (".jsonl",), "jsonl")


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_empty_archive_is_rejected(tmp_path, suffix):
    path = tmp_path / f"x.jsonl.{suffix}"
    path.touch()
    with pytest.raises(InputError, match=r"is empty, but a compressed file never is; fetch it again or leave it out"):
        plan_shards([Part("text", "jsonl", (str(path),))], 1.0)


def test_checksums_are_reused_until_a_file_changes(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("one")
    shards = plan_shards([Part("text", "text", (str(path),))], 0)
    known = {}
    first = file_checksums(shards, known)
    assert first[str(path)] == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    known[str(path)][2] = "remembered"
    assert file_checksums(shards, known) == {str(path): "remembered"}
    path.write_text("two")
    os.utime(path, ns=(1, 1))
    assert file_checksums(shards, known)[str(path)] not in ("remembered", first[str(path)])


def test_digest_depends_on_content_and_not_on_paths(tmp_path):
    digests = []
    for folder, content in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(content)
        shards = plan_shards([Part("text", "text", (str(tmp_path / folder / "x.txt"),))], 0)
        digests.append(input_digest(shards[0], file_checksums(shards, {})))
    assert digests[0] == digests[1] != digests[2]
