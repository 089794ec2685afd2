"""Needle in a haystack: a seven-digit number hidden in a long text, which the model must repeat. Scored by what it generates.

The prompt is that of RULER's single needle (arXiv 2404.06654, niah_single): an instruction, the haystack with the sentence that names a key and its
number, and the question for the number, with the beginning of the answer. There are two haystacks: `noise` repeats a few sentences (niah_single_1),
and `heldout` is text of the dataset's held-out split, where RULER has essays (niah_single_2). The needle stands between two sentences, after a
given share of them. The haystack is as long as it can be so that prompt and answer have at most the given number of tokens.

The model continues greedily. It is right if the first number that it writes is the needle's. RULER also accepts the number anywhere in 128 tokens,
which is never less. Every prompt is a function of (seed, haystack, length, depth, number), and of the data for `heldout`.
"""

import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from tokenizers import Tokenizer

from ssa_pretrain.config import Haystack, NeedleTask
from ssa_pretrain.data.rows import HeldOutRows
from ssa_pretrain.evaluation.generation import generate_greedily
from ssa_pretrain.evaluation.scoring import encode, tokenizer_of
from ssa_pretrain.evaluation.text_size import row_pieces
from ssa_pretrain.run import Run

INSTRUCTION = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards."
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic numbers for {key} is: {value}."
QUESTION = (
    "What is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)
FIRST = (
    "amber brisk calm dusty eager faint giant hollow icy jolly keen lunar misty noble odd plain quiet rusty sunny tidy"
)
SECOND = (
    "anchor bridge candle desert engine feather garden harbor island jacket kettle ladder mirror needle orchard piano"
)
DIGITS = 7
SPARE_TOKENS = 3  # of the answer, before and after the number


@dataclass(frozen=True, slots=True)
class Needle:
    """A prompt in tokens, the number that is hidden in it, and where: length in tokens, depth in percent."""

    prompt: list[int]
    value: str
    length: int
    depth: float


def build_needles(run: Run, task: NeedleTask) -> list[Needle]:
    """Returns the prompts of a task, by length, depth and number."""
    tokenizer, found = tokenizer_of(run), []
    for length in task.lengths_within(run.config.data.sequence_length):
        for depth in task.depths:
            for number in range(task.samples):
                draw = random.Random(f"{run.config.seed}:{task.haystack}:{length}:{depth:g}:{number}")
                if task.haystack is Haystack.noise:
                    sentences, joint = [NOISE] * (length // 8), "\n"
                else:
                    sentences, joint = held_out_sentences(run, tokenizer, length, draw), " "
                found.append(hide(tokenizer, sentences, joint, length, depth, draw))
    return found


def score_needles(run: Run, needles: Sequence[Needle], mode: str) -> tuple[dict[str, float], list[dict]]:
    """Returns the shares of numbers found, in all and by length, and one entry per length and depth; every rank calls it."""
    tokenizer = tokenizer_of(run)
    num_new = max(answer_tokens(tokenizer, needle.value) for needle in needles)

    def is_answered(tokens: list[int]) -> bool:
        return re.search(r"\d\D", tokenizer.decode(tokens)) is not None

    prompts = [needle.prompt for needle in needles]
    texts = [tokenizer.decode(t) for t in generate_greedily(run, prompts, mode=mode, num_new=num_new, stop=is_answered)]
    right = [first_number(text) == needle.value for text, needle in zip(texts, needles, strict=True)]
    metrics, cells = {"accuracy": sum(right) / len(right)}, []
    places = list(dict.fromkeys((needle.length, needle.depth) for needle in needles))
    for length in dict.fromkeys(needle.length for needle in needles):
        own = [hit for hit, needle in zip(right, needles, strict=True) if needle.length == length]
        metrics[f"accuracy_{length}"] = sum(own) / len(own)
    for length, depth in places:
        own = [i for i, needle in enumerate(needles) if (needle.length, needle.depth) == (length, depth)]
        answers = [{"wanted": needles[i].value, "text": texts[i]} for i in own]
        share = sum(right[i] for i in own) / len(own)
        cells.append({"length": length, "depth": depth, "accuracy": share, "answers": answers})
    return metrics, cells


def first_number(text: str) -> str | None:
    """Returns the first run of digits in a text; None without one."""
    found = re.search(r"\d+", text)
    return found[0] if found else None


def hide(
    tokenizer: Tokenizer, sentences: Sequence[str], joint: str, length: int, depth: float, draw: random.Random
) -> Needle:
    """Returns the prompt with the most sentences that fits.

    Args:
        tokenizer: the model's.
        sentences: the haystack, in order, at least as long as needed.
        joint: text between two sentences.
        length: most tokens of prompt and answer together.
        depth: percent of the sentences before the needle.
        draw: chooses key and number.
    """
    key = f"{draw.choice(FIRST.split())}-{draw.choice(SECOND.split())}"
    value = str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS))
    most = length - answer_tokens(tokenizer, value)

    def prompt(count: int) -> list[int]:
        before = round(count * depth / 100)
        lines = [*sentences[:before], NEEDLE.format(key=key, value=value), *sentences[before:count]]
        return encode(tokenizer, f"{INSTRUCTION}\n{joint.join(lines)}\n{QUESTION.format(key=key)}")

    sizes = {text: len(encode(tokenizer, joint + text)) for text in set(sentences)}
    ends = list(accumulate(sizes[text] for text in sentences))
    count = bisect_right(ends, most - len(prompt(0)))  # nearly right: a token may reach over two sentences
    while count and len(prompt(count)) > most:
        count -= 1
    while count < len(sentences) and len(prompt(count + 1)) <= most:
        count += 1
    return Needle(prompt(count), value, length, depth)


def answer_tokens(tokenizer: Tokenizer, value: str) -> int:
    """Returns the number of tokens that an answer needs."""
    return len(encode(tokenizer, f" {value}.")) + SPARE_TOKENS


def held_out_sentences(run: Run, tokenizer: Tokenizer, num_tokens: int, draw: random.Random) -> list[str]:
    """Returns sentences of the held-out split with at least `num_tokens` tokens, from a drawn row on; a small split repeats."""
    rows = HeldOutRows(run.manifest, sequence_length=run.config.data.sequence_length, rows=0)
    first, found, count = draw.randrange(rows.num_rows), [], 0
    for i in range(num_tokens):
        for piece in row_pieces(rows.row((first + i) % rows.num_rows), isolate_documents=True):
            found += [text for text in re.split(r"(?<=[.!?])\s+|\n+", tokenizer.decode(piece)) if text.strip()]
            count += len(piece)
        if count >= num_tokens:
            break
    return found
