"""Rows about the user's errors on the command line."""

import string
import sys
import time

from faults.rows import Row
from faults.stage import SETTINGS, Stage
from faults.tally import Tally
from ssa_pretrain.cli import resolve_config
from ssa_pretrain.config import Config
from ssa_pretrain.config.machine import this_machine
from ssa_pretrain.settings.convert import config_to_dict
from ssa_pretrain.settings.problems import ConfigError
from ssa_pretrain.settings.tree import flatten_settings

VALUES = (
    "optim.lr=abc",
    "optim.lr=",
    "optim.lr=-1",
    "training=5",
    "training.steps=1.5",
    "training.steps=-3",
    "data.sequence_length=63",
    "training.global_batch_tokens=100",
    "model.num_kv_heads=3",
    "model.head_dim=7",
    "attention.block_size=17",
    "attention.top_k=0",
    "attention.method=spare",
    "parallel.tp=3",
    "precision=fp99",
    "engine=deepspeeed",
    "experiment=quickstrat",
    "checkpoint.keep=0",
    "evaluation.rows=many",
    "attention.full_ratio=1.5",
)


def refusal(arguments: list[str]) -> str | None:
    """Returns the message with which a command line is refused; None if it is accepted."""
    try:
        resolve_config("train", arguments, this_machine())
    except ConfigError as error:
        assert error.exit_code == 3
        return str(error)
    return None


def mistyped(key: str, stage: Stage) -> str:
    """Returns a name with one typing error in its last part."""
    head, dot, word = key.rpartition(".")
    place, kind = stage.random.randrange(len(word)), stage.random.randrange(4)
    letter = stage.random.choice(string.ascii_lowercase)
    if kind == 0:
        word = word[:place] + word[place + 1 :]
    elif kind == 1:
        word = word[:place] + letter + word[place:]
    elif kind == 2:
        word = word[:place] + word[place + 1 : place + 2] + word[place] + word[place + 2 :]
    else:
        word = word[:place] + letter + word[place + 1 :]
    return head + dot + word


def typing_errors(stage: Stage) -> Tally:
    """Types names of settings with one error; the first suggestion must be the name."""
    tally = Tally()
    keys = [key for key, _ in flatten_settings(config_to_dict(Config())) if len(key.rpartition(".")[2]) > 3]
    known = set(keys)
    while tally.tries < stage.tries(200, 10):
        key = stage.random.choice(keys)
        typed = mistyped(key, stage)
        if typed in known:
            continue
        begin = time.monotonic()
        plus = "+" if tally.tries % 4 == 3 else ""
        message = refusal(["experiment=quickstart", f"{plus}{typed}=1"])
        tally.detect.append(time.monotonic() - begin)
        if message is None:
            tally.add(f"{plus}{typed}=1 was accepted")
        else:
            tally.add(None if key in message else f"{typed}: {message[:200]}", code=3)
    return tally


def wrong_values(stage: Stage) -> Tally:
    """Gives values of the wrong type, out of range, or that do not fit together."""
    tally = Tally()
    for text in VALUES[:: max(1, round(1 / stage.scale))]:
        key = text.partition("=")[0]
        message = refusal([*SETTINGS, f"data.path={stage.corpus}", "output_dir=unused", text])
        tally.add(None if message and key in message else f"{text}: {message}", code=3 if message else 0)
    return tally


def whole_commands(stage: Stage) -> Tally:
    """The same through the real entry point, in a child: the exit code, one message, no trace."""

    def act(arguments: list[str]) -> None:
        sys.argv = ["train", *arguments]
        from ssa_pretrain.train import main

        main()

    tally = Tally()
    for arguments in (
        ["experiment=quickstart", "optim.lrr=1"],
        [*SETTINGS, "data.path=/nowhere"],
        [*SETTINGS, "optim.lr=abc", "attention.top_k=0"],
    ):
        begin = time.monotonic()
        child = stage.fork(lambda arguments=arguments: act(arguments))
        code, text = child.wait(), child.text()
        tally.detect.append(time.monotonic() - begin)
        wrong = code not in (3, 4) or "Traceback" in text or not text.strip()
        if arguments[-1] == "attention.top_k=0":
            wrong = wrong or not ("optim.lr" in text and "attention.top_k" in text)
        tally.add(f"{arguments[-1]}: exit code {code}, {text[-300:]}" if wrong else None, code=code)
    return tally


ROWS = [
    Row(
        "typing_errors",
        "one typing error in the name of a setting, also with Hydra's `+`",
        "3 before anything is imported; the message suggests the right name",
        typing_errors,
        must_fail=True,
    ),
    Row(
        "wrong_values",
        "wrong types, values out of range, sizes that do not fit, unknown groups",
        "3, with the key",
        wrong_values,
        must_fail=True,
    ),
    Row(
        "whole_commands",
        "the same through the entry point; several errors at once",
        "3 or 4, one message with every problem, no trace",
        whole_commands,
        must_fail=True,
    ),
]
