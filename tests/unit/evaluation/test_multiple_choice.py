"""ssa_pretrain/evaluation/multiple_choice.py and scoring.py: the file's form, each wrong line in a sentence, requests as lm_eval makes them."""

import json
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from ssa_pretrain.errors import DataError
from ssa_pretrain.evaluation import multiple_choice
from ssa_pretrain.evaluation.multiple_choice import Question, read_questions, score_questions
from ssa_pretrain.evaluation.scoring import Score, encode_request

GOOD = {"question": "q", "choices": ["a", "bb"], "answer": 1}


def test_questions_are_read_in_order(tmp_path):
    path = tmp_path / "q.jsonl"
    lines = [GOOD, {"context": "c", "choices": ["x", "y", "z"], "answer": "z"}, GOOD]
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    wanted = [Question("q", ("a", "bb"), 1), Question("c", ("x", "y", "z"), 2), Question("q", ("a", "bb"), 1)]
    assert read_questions(path) == wanted
    assert read_questions(path, limit=2) == wanted[:2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not a JSON object; write one question per line"),
        ("[1]", "is not a JSON object; write one question per line"),
        (json.dumps(GOOD | {"question": 3}), "has no text under question; add it, or context"),
        (json.dumps(GOOD | {"choices": ["a"]}), "has choices=['a'], which must be a list of two or more texts; correct the line"),
        (json.dumps(GOOD | {"choices": ["a", ""]}), "has choices=['a', ''], which must be a list of two or more texts; correct the line"),
        (json.dumps(GOOD | {"answer": 2}), "has answer=2, which must be one of its choices or an index below 2; correct the line"),
        (json.dumps(GOOD | {"answer": "c"}), "has answer='c', which must be one of its choices or an index below 2; correct the line"),
        (json.dumps(GOOD | {"answer": True}), "has answer=True, which must be one of its choices or an index below 2; correct the line"),
    ],
)  # fmt: skip
def test_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert str(caught.value) == f"{path}:2 {message}"


def test_file_without_questions_is_named(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    for name, message in (("empty.jsonl", "has no questions"), ("none.jsonl", "cannot be read")):
        with pytest.raises(DataError, match=f"{name} {message}"):
            read_questions(tmp_path / name)


def test_acc_takes_sums_and_acc_norm_sums_per_character(monkeypatch):
    """By sums the short wrong choice wins, per character the long right one."""
    questions = [Question("q", ("no", "certainly"), 1), Question("q", ("yes", "n"), 0), Question("q", ("é", "ü"), 0)]
    scores = [-4.0, -9.0, -3.0, -2.0, -1.0, -1.0]
    monkeypatch.setattr(multiple_choice, "tokenizer_of", lambda run: None)
    monkeypatch.setattr(multiple_choice, "prefix_token", lambda run: 0)
    monkeypatch.setattr(multiple_choice, "encode_request", lambda *_: ([0], [0]))
    monkeypatch.setattr(multiple_choice, "score_requests", lambda *_: [Score(s, False) for s in scores])
    found = score_questions(SimpleNamespace(), questions, "full")
    assert (found["acc"], found["acc_norm"], found["num_questions"]) == (1 / 3, 1.0, 3)
    assert found["acc_stderr"] == pytest.approx((2 / 9 / 2) ** 0.5) and found["acc_norm_stderr"] == 0.0


def test_requests_are_cut_where_the_context_ends():
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, " b": 3, " ": 4, "c": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(" ", "b")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\x00", "isolated")
    assert encode_request(tokenizer, "a", " b", 9) == ([1], [3])
    assert encode_request(tokenizer, "a ", "b", 9) == ([1], [3]), "the space belongs to the continuation's token"
    assert encode_request(tokenizer, "", "bc", 9) == ([9], [2, 5])
    assert encode_request(tokenizer, "", "bc", 2) == ([2], [5]), "a prefix that the text has already"
