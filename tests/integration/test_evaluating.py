"""Evaluates checkpoints of a small run, in this process and on real data: any settings that no weight depends on, results, tasks, no optimizer."""

import json
import math
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest

from ssa_pretrain.cli import resolve_config
from ssa_pretrain.config.machine import this_machine
from ssa_pretrain.errors import CheckpointError
from ssa_pretrain.evaluate import evaluate_run
from ssa_pretrain.evaluation.generation import generate_greedily
from ssa_pretrain.evaluation.multiple_choice import read_questions
from ssa_pretrain.evaluation.scoring import encode_request, prefix_token, score_requests, tokenizer_of
from ssa_pretrain.parallel.state import joined
from ssa_pretrain.run import build_run
from ssa_pretrain.saved_run import expand
from ssa_pretrain.settings.problems import ConfigError
from ssa_pretrain.trainer import train
from support.training import records

LENGTH = 128
SETTINGS = (
    "experiment=quickstart",
    "model.num_layers=2",
    "model.init_std=0.1",  # so that the modes differ after few steps
    "attention.top_k=2",
    "training.steps=4",
    f"training.global_batch_tokens={4 * LENGTH}",
    "training.micro_batch_size=2",
    f"data.sequence_length={LENGTH}",
    "evaluation.rows=5",
    "evaluation.interval=2",
    "evaluation.at_start=false",
    "checkpoint.interval=2",
    "evaluation.task_interval=4",
)
TASKS = ("text", "choices", "needle")
NO_TASKS = tuple(f"~evaluation.tasks.{name}" for name in TASKS)


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "away", "from", "here", "to", "there"]
    lines = []
    for i in range(9):
        text = " ".join(words[i % 3 : 3 + i])
        choices = [words[(i * j + j) % len(words)] + " is" * j for j in range(2 + i % 3)]
        lines.append({"question": text, "choices": choices, "answer": i % 2})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def folder(corpus, questions, tmp_path_factory) -> Path:
    """A run of four steps with three tasks, stopped once on the way and resumed."""
    out = tmp_path_factory.mktemp("evaluating") / "run"
    tasks = [
        f"evaluation.tasks.text={{kind:perplexity,path:{corpus},rows:3}}",
        f"evaluation.tasks.choices={{kind:multiple_choice,path:{questions}}}",
        "evaluation.tasks.needle={kind:needle,haystack:heldout,depths:[0,60],samples:1}",
    ]
    arguments = [*SETTINGS, *tasks, f"data.path={corpus}", f"output_dir={out}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        for more in (["training.stop_at_step=2"], []):
            train(resolve_config("train", [*arguments, *more], this_machine()))
    return out


def evaluate(named: Path, *overrides: str, checkpoint: Path | None = None) -> dict:
    """Evaluates a run or checkpoint as the command does. Returns the result that it wrote."""
    arguments, _ = expand([str(checkpoint or named), *overrides], 1)
    before = set(results(named))
    evaluate_run(resolve_config("evaluate", arguments, this_machine()), checkpoint)
    after = results(named)
    new = set(after) - before
    return after[new.pop()] if new else after


def results(run: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((run / "evaluations").glob("*.json"))}


@pytest.fixture(scope="module")
def own(folder) -> dict:
    """The evaluation of the newest checkpoint with the run's own settings, without an optimizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.optim.Optimizer.__init__", refuse)
        patch.setattr("megatron.core.distributed.DistributedDataParallel.__init__", refuse)
        return evaluate(folder)


def refuse(*_, **__):
    raise AssertionError("an evaluation builds no optimizer and no gradient buffers")


def test_result_equals_the_evaluation_during_training(folder, own):
    last = {r["mode"]: r for r in records(folder, "evaluation") if r["step"] == 4}
    for mode in ("full", "sparse"):
        found = own["modes"][mode]
        assert found["cross_entropy"] == last[mode]["cross_entropy"]
        assert found["captured_mass_by_layer"] == last[mode]["captured_mass_by_layer"]
        assert found["perplexity"] == pytest.approx(math.exp(found["cross_entropy"]))
        total = found["cross_entropy"] * found["num_labels"]
        assert found["word_perplexity"] == pytest.approx(math.exp(total / found["num_words"]))
        assert found["byte_perplexity"] == pytest.approx(math.exp(total / found["num_bytes"]))
        assert found["num_bytes"] > found["num_labels"] > found["num_words"]
        by_head = own["heads"][mode]
        assert [len(layer) for layer in by_head["entropy_by_head"]] == [4, 4]
    assert own["modes"]["full"]["cross_entropy"] != own["modes"]["sparse"]["cross_entropy"]
    assert own["trained_with"] == {} and own["step"] == 4 and own["rows"] == 5


def test_tasks_of_a_run_are_evaluated_once_each_and_equal_the_commands(folder, own):
    found = [(r["step"], r["task"], r["mode"]) for r in records(folder, "task")]
    assert found == [(4, task, mode) for task in TASKS for mode in ("full", "sparse")], "not at step 2: task_interval=4"
    for record in records(folder, "task"):
        metrics = own["tasks"][record["task"]][record["mode"]]["metrics"]
        assert {k: v for k, v in record.items() if k in metrics} == metrics
    assert own["tasks"]["choices"]["full"]["metrics"]["num_questions"] == 9
    cells = own["tasks"]["needle"]["sparse"]["details"]["cells"]
    assert [(cell["length"], cell["depth"]) for cell in cells] == [(LENGTH, 0), (LENGTH, 60)]


def test_what_shapes_no_weight_may_differ_and_is_recorded(folder, own):
    """Longer rows under stretched RoPE, other blocks. The report's file keeps the run's own settings."""
    older = evaluate(folder, "evaluation.head_rows=0", *NO_TASKS, checkpoint=folder / "checkpoints" / "step_00000002")
    assert (older["step"], older["settings"]["checkpoint"]) == (2, "step_00000002")
    shown = (folder / "evaluation.json").read_text()
    assert json.loads(shown)["step"] == 2, "the report shows the last evaluation with the run's own settings"
    longer = evaluate(
        folder, "data.sequence_length=256", "model.rope_scaling.enabled=true", "attention.top_k=3", "evaluation.tasks.needle.lengths=[200]"
    )  # fmt: skip
    assert longer["trained_with"] == {
        "attention.top_k": 2,
        "data.sequence_length": LENGTH,
        "model.rope_scaling": {"enabled": False, "factor": 4.0},
    }
    assert longer["settings"]["attention.top_k"] == 3
    assert longer["name"].startswith("step_00000004_length256_B16_S3_rope4_")
    assert longer["modes"]["full"]["cross_entropy"] != own["modes"]["full"]["cross_entropy"]
    assert longer["tasks"]["needle"]["full"]["metrics"]["accuracy_200"] >= 0
    assert (folder / "evaluation.json").read_text() == shown


def test_named_evaluation_is_not_overwritten_and_the_same_one_is_repeated(folder, own):
    few = ("evaluation.head_rows=0", *NO_TASKS)
    one = evaluate(folder, *few, "evaluation.name=mine", "evaluation.rows=2")
    path = folder / "evaluations" / "mine.json"
    before = path.read_bytes()
    evaluate(folder, *few, "evaluation.name=mine", "evaluation.rows=2")
    assert path.read_bytes() == before and one["rows"] == 2 and one["heads"]["full"] == {}
    with pytest.raises(ConfigError) as caught:
        evaluate(folder, *few, "evaluation.name=mine", "evaluation.rows=3")
    assert str(caught.value) == (
        f"  evaluation.name=mine names another evaluation's results ({path} differs in evaluation.rows); try mine_2, or leave it out"
    )
    assert path.read_bytes() == before
    assert all((folder / "evaluations" / f"{name}.png").stat().st_size > 10_000 for name in results(folder))


def test_another_shape_is_refused(folder):
    with pytest.raises(CheckpointError, match=r"holds another model \(model.num_layers: checkpoint 2, run 3\)"):
        evaluate(folder, "model.num_layers=3")


def test_scores_and_continuations_follow_from_the_model(folder, questions):
    """A row's tokens score what its cross entropy says, greedy continuations are greedy, and questions score as one by one."""
    arguments, _ = expand([str(folder), "training.global_batch_tokens=256"], 1)
    config = resolve_config("evaluate", arguments, this_machine())
    with joined(config.parallel, seed=1) as placement:
        run = build_run(config, placement, trains=False)
        run.engine.load_weights(folder / "checkpoints" / "step_00000004")
        parameters = list(run.engine.models[0].parameters())  # pyright: ignore[reportAttributeAccessIssue]
        assert parameters and not any(p.requires_grad or hasattr(p, "main_grad") for p in parameters)
        tokenizer, row = tokenizer_of(run), run.held_out.row(0)
        for mode in ("full", "sparse"):
            tokens = row.tokens.tolist()[:90]
            (score,) = score_requests(run, [(tokens[:1], tokens[1:])], mode)
            each = score_requests(run, [(tokens[:i], tokens[i : i + 1]) for i in range(1, 90)], mode)
            assert score.log_likelihood == pytest.approx(sum(s.log_likelihood for s in each), rel=1e-5)
            prompts = [tokens[:40], tokens[:7], tokens[3:60]]
            new = generate_greedily(run, prompts, mode=mode, num_new=9)
            scores = score_requests(run, list(zip(prompts, new, strict=True)), mode)
            assert all(score.is_greedy for score in scores) and all(new)
            wrong = [[(token + 1) % 4000 for token in tokens] for tokens in new]
            assert not any(s.is_greedy for s in score_requests(run, list(zip(prompts, wrong, strict=True)), mode))
            requests = [
                encode_request(tokenizer, q.text, " " + choice, prefix_token(run))
                for q in read_questions(questions)
                for choice in q.choices
            ]
            together = score_requests(run, requests, mode)
            alone = [score_requests(run, [request], mode)[0] for request in requests[:4]]
            for one, other in zip(together, alone, strict=False):
                assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-5)


def test_too_long_a_request_keeps_its_end(folder):
    arguments, _ = expand([str(folder), "training.global_batch_tokens=256"], 1)
    config = resolve_config("evaluate", arguments, this_machine())
    with joined(config.parallel, seed=1) as placement:
        run = build_run(config, placement, trains=False)
        run.engine.load_weights(folder / "checkpoints" / "step_00000004")
        tokens = [(3 * i) % 97 + 5 for i in range(3 * LENGTH)]
        long, cut = score_requests(run, [(tokens, [7, 8]), (tokens[-(LENGTH - 1) :], [7, 8])], "full")
        assert long.log_likelihood == pytest.approx(cut.log_likelihood, rel=1e-6)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: {target}
{more}
metadata: {{version: 7}}
"""


def test_lm_eval_on_the_checkpoint_agrees(folder, own, questions, tmp_path, monkeypatch):
    """Its multiple choice finds the same as ours; its rolling and generating requests give what the model's scores say."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra evaluation)")
    from ssa_pretrain.evaluation import lm_eval_model

    # It takes nine seconds to list lm_eval's own tasks, which test_lm_eval_on_exports.py does.
    monkeypatch.setattr(lm_eval_model, "TaskManager", partial(lm_eval_model.TaskManager, include_defaults=False))
    common = {"path": questions, "text": "{{question}}"}
    files = {
        "own_choices": {"kind": "multiple_choice", "target": "answer", "more": "doc_to_choice: choices\nmetric_list: [{metric: acc}, {metric: acc_norm}]"},
        "own_text": {"kind": "loglikelihood_rolling", "text": "", "target": '"{{question}}"', "more": "metric_list: [{metric: word_perplexity}]"},
        "own_words": {"kind": "generate_until", "target": '"{{choices[0]}}"', "more": "generation_kwargs: {until: [' '], do_sample: false, max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]"},
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, **common | content))
    found = evaluate(
        folder, f"evaluation.lm_eval.tasks=[{','.join(files)}]", f"evaluation.lm_eval.include_path={tmp_path}", "evaluation.head_rows=0"
    )  # fmt: skip
    assert found["lm_eval_versions"] == {"lm_eval": version("lm_eval"), **dict.fromkeys(files, 7)}
    texts = [question.text for question in read_questions(questions)]
    arguments, _ = expand([str(folder), "training.global_batch_tokens=256"], 1)
    config = resolve_config("evaluate", arguments, this_machine())
    for mode in ("full", "sparse"):
        ours = own["tasks"]["choices"][mode]["metrics"]
        for name in ("acc", "acc_norm"):
            assert found["lm_eval"]["own_choices"][mode][name] == pytest.approx(ours[name], abs=1e-4)
        assert 0 <= found["lm_eval"]["own_words"][mode]["exact_match"] <= 1
        with joined(config.parallel, seed=1) as placement:
            run = build_run(config, placement, trains=False)
            run.engine.load_weights(folder / "checkpoints" / "step_00000004")
            requests = [encode_request(tokenizer_of(run), "", text, prefix_token(run)) for text in texts]
            total = sum(score.log_likelihood for score in score_requests(run, requests, mode))
        words = sum(len(text.split()) for text in texts)
        rolled = found["lm_eval"]["own_text"][mode]["word_perplexity"]
        assert rolled == pytest.approx(math.exp(-total / words), rel=1e-4)
