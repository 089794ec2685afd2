"""The settings of `python -m ssa_pretrain.lm_eval` and the evaluations in conf/lm_eval."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from ssa_pretrain.errors import UsageError
from ssa_pretrain.huggingface import harness_settings
from ssa_pretrain.huggingface.harness_settings import FILES, LmEvalOptions, read_evaluations
from ssa_pretrain.huggingface.options import read_options
from ssa_pretrain.lm_eval import evaluate
from ssa_pretrain.settings.problems import ConfigError


def options(monkeypatch, folder: Path, *arguments: str) -> LmEvalOptions:
    """Returns the settings of a command line on a machine with all packages."""
    monkeypatch.setattr(harness_settings, "find_spec", lambda _: True)
    return read_options(LmEvalOptions, "ssa_pretrain.lm_eval", "a folder", [str(folder), *arguments])[1]


def test_lists_and_mappings_of_the_command_line(monkeypatch, tmp_path):
    found = options(monkeypatch, tmp_path, "tasks=[arc_easy,piqa]", "modes=sparse", "model_args={dtype: float32}")
    assert (found.tasks, found.modes, found.model_args) == (["arc_easy", "piqa"], ["sparse"], {"dtype": "float32"})
    assert options(monkeypatch, tmp_path).tasks == ["paper"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("modes=[both]", "modes=[both] must be full or sparse; try full"),
        ("modes=[]", "modes must not be empty; try modes="),
        ("limit=-1", "limit=-1 must be at least 0"),
        ("include_path=nowhere", "include_path=nowhere is not a folder; give a folder of task files"),
        ("model_args=5", "model_args=5 must be a mapping"),
        ("task=[piqa]", "task"),
    ],
)
def test_wrong_settings_are_refused(monkeypatch, tmp_path, argument, message):
    with pytest.raises(UsageError) as refused:
        options(monkeypatch, tmp_path, argument)
    assert message in str(refused.value)


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(harness_settings, "find_spec", lambda name: None if name == "lm_eval" else True)
    with pytest.raises(UsageError) as refused:
        read_options(LmEvalOptions, "ssa_pretrain.lm_eval", "a folder", [str(tmp_path)])
    assert 'lm_eval needs lm_eval, not installed here; try pip install -e ".[evaluation]"' in str(refused.value)


def test_paper_is_every_file_and_each_names_tasks_of_lm_eval():
    spec = importlib.util.find_spec("lm_eval")
    found = read_evaluations(["paper"])
    assert list(found) == sorted(path.stem for path in FILES.glob("*.yaml"))
    assert found["arc_easy"].seeds == [1, 12, 123, 1234, 12345]
    assert [found[name].num_fewshot for name in ("arc_easy", "arc_challenge", "piqa", "hellaswag")] == [25, 25, 3, 10]
    assert len(found["longbench"].tasks) == 16
    assert spec is not None and spec.origin is not None, "lm_eval is not installed (extra evaluation)"
    folder = Path(spec.origin).parent / "tasks"
    files = (
        path
        for name in ("arc", "piqa", "hellaswag", "wikitext", "longbench", "ruler")
        for path in (folder / name).glob("*.yaml")
    )
    known = {name for path in files for name in re.findall(r"^task: *(\S+)$", path.read_text(), re.MULTILINE)}
    assert {task for evaluation in found.values() for task in evaluation.tasks} <= known


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tasks: []", "tasks must not be empty"),
        ("num_fewshot: 3", "tasks must not be empty"),
        ("tasks: [piqa]\nbatch_size: 0", "batch_size=0 must be at least 1"),
        ("tasks: [piqa]\nseed: 1", "seed"),
    ],
)
def test_wrong_files_are_refused(tmp_path, content, message):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_evaluations([str(path)])


def test_unknown_evaluations_are_refused_with_the_nearest():
    with pytest.raises(
        ConfigError, match=r"tasks=arc_eazy is neither in conf/lm_eval nor a file; did you mean arc_easy\?"
    ):
        read_evaluations(["arc_eazy"])


def test_results_are_never_overwritten(monkeypatch, tmp_path):
    monkeypatch.setattr(harness_settings, "find_spec", lambda _: True)
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "piqa_wikitext.json").write_text("{}")
    with pytest.raises(ConfigError, match="exists, and nothing is overwritten"):
        evaluate([str(tmp_path), "tasks=[piqa,wikitext]"])


def test_a_run_is_exported_first(monkeypatch, tmp_path):
    from ssa_pretrain import lm_eval

    calls = []
    monkeypatch.setattr(lm_eval, "export_run", lambda arguments: calls.append(arguments))
    with lm_eval.exported(tmp_path) as folder:
        assert not folder.exists()
    assert calls == [[str(tmp_path), f"out={folder}"]] and not folder.parent.exists()
    (tmp_path / "config.json").write_text(yaml.safe_dump({}))
    with lm_eval.exported(tmp_path) as folder:
        assert folder == tmp_path
    assert len(calls) == 1
