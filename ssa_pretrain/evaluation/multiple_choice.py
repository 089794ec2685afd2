r"""Multiple choice from a file of questions, scored as lm_eval's `multiple_choice` tasks are.

A line of the file is a JSON object:

    {"question": "Question: What do bees make?\nAnswer:", "choices": ["honey", "cheese"], "answer": 0}

`context` may stand for `question`, and `answer` may be the text of a choice. Each choice is scored by the log-likelihood of " " + choice after the
question. `acc` is the share of questions whose answer has the largest one. For `acc_norm` each is divided by the number of characters of the
choice. Of equal ones, the first is taken. Source: lm_eval 0.4.13, `ConfigurableTask.process_results`. There is no few-shot prompt: examples are
written into the questions.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from ssa_pretrain.errors import DataError
from ssa_pretrain.evaluation.scoring import encode_request, prefix_token, score_requests, tokenizer_of
from ssa_pretrain.run import Run

DELIMITER = " "  # between question and choice; lm_eval's default


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its choices and the index of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: Path, limit: int = 0) -> list[Question]:
    """Returns the questions of a file, the first `limit` if that is not 0.

    Raises:
        DataError: the file cannot be read, has no questions, or a line is not a question.
    """
    try:
        lines = [(n, line) for n, line in enumerate(path.read_text("utf-8").splitlines(), start=1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); give a file of JSON lines") from None
    if not lines:
        raise DataError(f"{path} has no questions; give a file with one JSON object per line")
    return [_question(line, f"{path}:{n}") for n, line in lines[: limit or None]]


def score_questions(run: Run, questions: list[Question], mode: str) -> dict[str, float]:
    """Returns the metrics of a mode: acc, acc_norm and their standard errors; every rank calls it."""
    tokenizer, prefix = tokenizer_of(run), prefix_token(run)
    requests = [
        encode_request(tokenizer, q.text, DELIMITER + choice, prefix) for q in questions for choice in q.choices
    ]
    scores = iter(score_requests(run, requests, mode))
    right, right_norm = 0, 0
    for question in questions:
        likelihoods = [next(scores).log_likelihood for _ in question.choices]
        normalised = [value / len(choice) for value, choice in zip(likelihoods, question.choices, strict=True)]
        right += likelihoods.index(max(likelihoods)) == question.answer
        right_norm += normalised.index(max(normalised)) == question.answer
    count = len(questions)
    acc, acc_norm = right / count, right_norm / count
    errors = {"acc_stderr": _standard_error(acc, count), "acc_norm_stderr": _standard_error(acc_norm, count)}
    return {"acc": acc, "acc_norm": acc_norm, **errors, "num_questions": count}


def _standard_error(share: float, count: int) -> float:
    """Returns the standard error of a share of right answers, from the sample's variance."""
    return math.sqrt(share * (1.0 - share) / (count - 1)) if count > 1 else 0.0


def _question(line: str, where: str) -> Question:
    """Returns the question of a line; DataError names what is wrong with it."""
    try:
        content = json.loads(line)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise DataError(f"{where} is not a JSON object; write one question per line")
    text = content.get("question", content.get("context"))
    if not isinstance(text, str):
        raise DataError(f"{where} has no text under question; add it, or context")
    choices, answer = content.get("choices"), content.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise DataError(f"{where} has choices={choices!r}, which must be a list of two or more texts; correct the line")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise DataError(
            f"{where} has answer={answer!r}, which must be one of its choices or an index below {len(choices)}; "
            "correct the line"
        )
    return Question(text, tuple(choices), answer)
