"""A part of every kind of row of the fault matrix, and the page of the full one. `make test-faults` runs all of it."""

import json

import pytest

from faults import page, tally
from faults.catalog import GROUPS
from support.processes import environment, run_ranks

pytestmark = pytest.mark.timeout(900)
ROWS = [
    "power_failure",
    "kill_every_syscall",
    "random_kills",
    "sigterm",
    "flipped_checkpoint",
    "flipped_record",
    "flipped_idx",
    "flipped_manifest",
    "bad_steps",
    "bad_weights",
    "dying_rank",
    "second_run",
]
SCALE = "0.02"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Returns the folder with the files of a small matrix, and what its process printed."""
    folder = tmp_path_factory.mktemp("faults")
    arguments = [*ROWS, "--scale", SCALE, "--folder", str(folder / "stage"), "--results", str(folder / "results")]
    (ended,) = run_ranks(["-m", "faults", *arguments, "--page", str(folder / "page.md")], [environment()], timeout=800)
    assert ended.code in (0, 1), ended.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_row_ends_as_expected(results, name):
    found = tally.read(name, results / "results")
    assert found is not None and found["tries"] > 0
    assert found["failures"] == [] and found["good"] == found["tries"]


def test_page_shows_the_files(results):
    text = (results / "page.md").read_text()
    assert text == page.render(results / "results")
    for name in ROWS:
        found = tally.read(name, results / "results")
        assert found is not None and f"| {found['good']:,} of {found['tries']:,} |" in text
    assert text.count("| not run | | | |") == sum(map(len, GROUPS.values())) - len(ROWS)


def test_page_shows_a_failure(results, tmp_path):
    content = json.loads((results / "results" / "sigterm.json").read_text())
    content["good"] -= 1
    content["failures"] = ["exit code 0: | it\nwent on"]
    (tmp_path / "sigterm.json").write_text(json.dumps(content))
    assert "(exit code 0: / it went on)" in page.render(tmp_path)
    assert page.num_bad(tmp_path) == 2
    assert page.num_bad(results / "results") == 0


def test_published_page_is_that_of_the_published_files():
    assert page.render() == page.PAGE.read_text(), "run `make test-faults FAULTS=--render`"
