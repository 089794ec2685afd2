"""`python -m ssa_pretrain.lm_eval` with lm_eval's own `hf` model on a folder, in both modes: tasks from local files against the model's own numbers."""

import json
import math
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from ssa_pretrain.errors import DataError
from ssa_pretrain.huggingface import harness, modelling_ssa
from ssa_pretrain.huggingface.harness import evaluate_folder, summarise, table
from ssa_pretrain.huggingface.harness_settings import Evaluation, LmEvalOptions
from ssa_pretrain.settings.problems import ConfigError
from support.hf_models import VOCAB, draw_documents, lively_model
from support.processes import ROOT

# A special token is found anywhere in a text, so no word may contain it.
WORDS = ["<pad>", "<unk>", "<eos>", *(f"w{i}" for i in range(3, VOCAB))]
MODES = ("full", "sparse")


def text(tokens: torch.Tensor) -> str:
    """Returns tokens as words."""
    return " ".join(WORDS[i] for i in tokens.tolist())


def write_folder(folder: Path):
    """Writes a model with a tokenizer of words, as an export has them, and returns the model."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    model = lively_model(attention_mode="full", max_position_embeddings=256)
    model.save_pretrained(folder)
    assert (folder / "modelling_ssa.py").read_text() == Path(modelling_ssa.__file__).read_text()
    return model


def write_tasks(folder: Path) -> tuple[list[dict], list[str]]:
    """Writes tasks of lm_eval over local files: questions with choices, texts, and one to continue. Returns questions and texts."""
    draws = iter(draw_documents([70, 3, 3, 90, 2, 5, 101, 4, 4, 130, 200, 9], seed=4))
    questions = [
        {"context": text(next(draws)), "choices": [text(next(draws)), text(next(draws))], "answer": i % 2}
        for i in range(3)
    ]
    texts = [text(next(draws)) for _ in range(2)]
    files = {"questions": questions, "texts": [{"text": t} for t in texts], "prompts": [{"prompt": texts[0]}]}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 7}}
    tasks = [
        {"task": "own_choices", "file": "questions", "output_type": "multiple_choice", "doc_to_text": "{{context}}"}
        | {"doc_to_target": "{{answer}}", "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}]},
        {"task": "own_texts", "file": "texts", "output_type": "loglikelihood_rolling", "doc_to_text": ""}
        | {"doc_to_target": "{{text}}", "metric_list": [{"metric": "word_perplexity"}]},
        {"task": "own_prompts", "file": "prompts", "output_type": "generate_until", "doc_to_text": "{{prompt}}"}
        | {"doc_to_target": "w9", "metric_list": [{"metric": "exact_match"}]}
        | {"generation_kwargs": {"until": ["<eos>"], "max_gen_toks": 5}},
    ]
    for task in tasks:
        task["dataset_kwargs"] = {"data_files": {"test": str(folder / f"{task.pop('file')}.jsonl")}}
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    own = {"tasks": [task["task"] for task in tasks], "seeds": [1, 2], "batch_size": 2, "num_fewshot": 0}
    (folder / "own.yaml").write_text(yaml.safe_dump(own))
    return questions, texts


def expected(model, questions: list[dict], texts: list[str]) -> dict[str, float]:
    """Returns accuracy and perplexity per word by the model alone, text by text."""

    def log_likelihood(context: list[int], target: list[int]) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([context + target[:-1]])).logits[0, len(context) - 1 :].log_softmax(-1)
        return float(logits[range(len(target)), target].sum())

    def ids(words: str) -> list[int]:
        return [WORDS.index(word) for word in words.split()]

    right = 0
    for question in questions:
        sums = [log_likelihood(ids(question["context"]), ids(choice)) for choice in question["choices"]]
        right += sums.index(max(sums)) == question["answer"]
    total = sum(log_likelihood([2], ids(t)) for t in texts)  # the empty context is EOS
    return {"acc": right / len(questions), "word_perplexity": math.exp(-total / sum(len(t.split()) for t in texts))}


def test_hf_model_of_lm_eval_agrees_with_the_model(tmp_path):
    folder, tasks = tmp_path / "model", tmp_path / "tasks"
    tasks.mkdir()
    model = write_folder(folder)
    questions, texts = write_tasks(tasks)
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    # Hugging Face's package `kernels` must not be mistaken for the folder of that name.
    command = [sys.executable, "-P", "-m", "ssa_pretrain.lm_eval", str(folder), f"tasks={tasks / 'own.yaml'}"]
    options = [f"include_path={tasks}", f"out={tmp_path / 'results.json'}"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["versions"]["lm_eval"] == version("lm_eval") and record["settings"]["modes"] == list(MODES)
    found = record["evaluations"]["own"]
    assert found["task_versions"] == {"own_choices": 7, "own_texts": 7, "own_prompts": 7}
    assert [(run["mode"], run["seed"]) for run in found["runs"]] == [(m, s) for m in MODES for s in (1, 2)]
    perplexities = []
    for mode in MODES:
        model.config.attention_mode = mode
        wanted = expected(model, questions, texts)
        choices, words = (found["summary"][task][mode] for task in ("own_choices", "own_texts"))
        assert choices["acc"]["mean"] == pytest.approx(wanted["acc"]) and choices["acc"]["std"] == 0.0
        assert words["word_perplexity"]["mean"] == pytest.approx(wanted["word_perplexity"], rel=1e-4)
        perplexities.append(wanted["word_perplexity"])
        assert "exact_match" in found["summary"]["own_prompts"][mode]
    assert perplexities[0] != pytest.approx(perplexities[1], rel=1e-3), "the modes must differ"
    assert table(record) in done.stdout and f"{perplexities[1]:.4f}" in done.stdout


def test_summary_has_mean_and_deviation_over_seeds():
    runs = [
        {"mode": "full", "seed": seed, "results": {"piqa": {"acc_norm": acc}}} for seed, acc in ((1, 0.5), (2, 0.7))
    ]
    found = summarise(runs)["piqa"]["full"]["acc_norm"]
    assert found == {"mean": pytest.approx(0.6), "std": pytest.approx(math.sqrt(0.02))}


def test_unknown_task_and_unreachable_data_are_one_sentence(tmp_path, monkeypatch):
    class Manager:
        def __init__(self, **_: object) -> None:
            self.task_index = {"piqa": None}

    def unreachable(**_: object) -> None:
        raise ConnectionError("Couldn't reach 'baber/piqa'\non the Hub")

    monkeypatch.setattr(harness, "TaskManager", Manager)
    monkeypatch.setattr(harness, "simple_evaluate", unreachable)
    monkeypatch.setattr(harness, "get_model", lambda _: type("HF", (), {"create_from_arg_obj": lambda *_: None}))
    common = (LmEvalOptions(), tmp_path / "out.json")
    with pytest.raises(ConfigError) as refused:
        evaluate_folder(tmp_path, "model", {"mine": Evaluation(tasks=["pica", "zzz"])}, *common)
    assert [str(problem) for problem in refused.value.problems] == [
        "mine: tasks=pica is not a task, a group or a tag of lm_eval; did you mean piqa?",
        "mine: tasks=zzz is not a task, a group or a tag of lm_eval; lm_eval ls tasks lists those it has",
    ]
    sentence = (
        "lm_eval could not fetch the data of piqa (Couldn't reach 'baber/piqa' on the Hub); "
        "run it once where the hub can be reached, with the same HF_HOME, which keeps the data"
    )
    with pytest.raises(DataError) as failed:
        evaluate_folder(tmp_path, "model", {"mine": Evaluation(tasks=["piqa"])}, *common)
    assert str(failed.value) == sentence
