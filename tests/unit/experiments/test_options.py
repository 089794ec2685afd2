"""The command line of ssa_pretrain.experiments: names, keys, flags, and one sentence for each mistake."""

from pathlib import Path

import pytest

from ssa_pretrain.errors import UsageError
from ssa_pretrain.experiments.options import read_options
from ssa_pretrain.experiments.recipes import RECIPES
from ssa_pretrain.experiments.table_file import comparisons, recipe_of_file
from support.processes import ROOT


def test_words_become_names_keys_and_overrides() -> None:
    found = read_options(
        [
            "switching",
            "size=tiny",
            "training.steps=3",
            "--minutes",
            "9.5",
            "length",
            "seeds=4,5",
            "--only=ssa,full",
            "--gpus",
            "0,1",
        ]
    )
    assert found.names == ["switching", "length"] and found.size == "tiny" and found.seeds == [4, 5]
    assert found.overrides == ["training.steps=3"] and found.minutes == 9.5 and found.only == ["ssa", "full"]
    assert found.gpus == "0,1" and found.out == Path("outputs/experiments/tiny")
    assert read_options(["all"]).names == list(RECIPES)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "no recipe is named; try one of overhead"),
        (["swiching"], "swiching is neither a recipe nor a file of settings; try one of overhead"),
        (["length", "size=8b"], "size=8b must be 75m or tiny"),
        (["length", "seeds=a"], "seeds=a must be whole numbers with commas; try seeds=1,2,3"),
        (["length", "seeds=1,1"], "seeds=1,1 must be different numbers from 0 on; try seeds=1,2,3"),
        (["length", "seed=1"], "seed=1 cannot be set for every run: use seeds=1,2,3"),
        (["length", "output_dir=x"], "output_dir=x cannot be set for every run: use out=FOLDER"),
        (
            ["length", "--minutes=3x"],
            "the command line cannot be read: argument --minutes: invalid float value: '3x'; see --help",
        ),
        (["length", "--fast"], "--fast is not a flag; see --help"),
        (["length", "--minutes=-1"], "--minutes and --per-gpu must not be negative"),
        (["length", "--hardware=h200"], "--hardware=h200 is for --dry-run only; leave it out"),
    ],
)
def test_mistakes(words, sentence) -> None:
    with pytest.raises(UsageError) as caught:
        read_options(words)
    assert sentence in str(caught.value)


def test_table_of_settings_is_a_recipe(tmp_path) -> None:
    recipe = recipe_of_file(ROOT / "tests/benchmarks/tables/shares.txt")
    names = [setting.name for setting in recipe.settings]
    assert names == ["full", "moba", "none", "eighth", "quarter", "half", "all"]
    assert recipe.settings[3].overrides == ("experiment=ssa_75m_evidence", "attention.counterpart_share=0.125")
    assert [(c.first, c.second) for c in comparisons(["eighth-full"], names)] == [("eighth", "full")]
    with pytest.raises(UsageError, match="--show eighth-half2 must name two settings of full, moba"):
        comparisons(["eighth-half2"], names)
    path = tmp_path / "t.txt"
    path.write_text("a x=1\na x=2\n")
    with pytest.raises(UsageError, match=r"must have lines of NAME key=value \.\.\., with different names"):
        recipe_of_file(path)
