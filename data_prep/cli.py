"""The command line of data_prep: what the shared one (ssa_pretrain/settings/command_line.py) does not know.

It passes the root dataclass, the conf folder and the recipe of the dataset in `out`, and turns errors into one message
and an exit code: 0 done, 3 a setting is wrong, 4 an input cannot be used. `__main__` handles Ctrl-C.
"""

import errno
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.config import Config
from data_prep.errors import InputError
from data_prep.own_settings import own_settings
from data_prep.pipeline import run_stages
from ssa_pretrain.errors import Answered, CommandError
from ssa_pretrain.settings.command_line import Program, report, resolve
from ssa_pretrain.settings.output import pipe_may_close
from ssa_pretrain.settings.problems import ConfigError, Problem, independent

PROGRAM = Program(
    name="data_prep",
    root=Config,
    conf=Path(__file__).parent / "conf",
    help="""\
Text in, indexed binaries out.

  python -m {name} source=quickstart tokenizer=bpe8k out=outputs/quickstart/data
  python -m {name} source=jsonl 'source.paths=[texts/*.jsonl.gz]' tokenizer=llama3 out=outputs/mine
  python -m {name} stage=validate out=outputs/mine
""",
    footer="""\
What a key or section means:           --explain split.heldout_fraction
Show the settings without starting:    --cfg job
Show what will be made and its cost:   --dry-run
Where each group comes from:           --info defaults
Guide: docs/data.md
""",
    packages=("tokenizers", "tiktoken", "gigatoken", "pyarrow", "datatrove"),
    dry_run="stage=plan",
)

# Errors of the file system that the user can resolve. Any other one is a bug of this program.
NO_ROOM = "there is no room left for {path}; make room or choose another out= or cache="
FORBIDDEN = "{path} may not be read or written by this user; change its permissions or choose another path"
REFUSALS = {
    errno.ENOSPC: NO_ROOM,
    errno.EDQUOT: NO_ROOM,
    errno.EACCES: FORBIDDEN,
    errno.EPERM: FORBIDDEN,
    errno.EROFS: "{path} is on a read-only disk; choose another out= or cache=",
    errno.ENOTDIR: "{path} cannot be reached, since one of its folders is a file; choose another path",
    errno.EEXIST: "{path} is a file where a folder is needed; move it away or choose another path",
    errno.EISDIR: "{path} is a folder where a file is needed; choose another path",
    errno.ENAMETOOLONG: "{path} is longer than the disk allows; choose a shorter path",
    errno.ELOOP: "{path} is a link that leads back to itself; remove it or choose another path",
}


def main(arguments: Sequence[str]) -> int:
    """Runs data_prep and returns its exit code."""
    try:
        with pipe_may_close():
            try:
                run_stages(read_config(arguments), _log, sys.stdout.write)
            except Answered as answer:
                sys.stdout.write(answer.text)
                return answer.exit_code
    except ConfigError as error:
        _log(report(PROGRAM.name, error))
        return error.exit_code
    except CommandError as error:
        _log(f"error: {error}")
        return error.exit_code
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        path = error.filename or "a file"
        _log(f"error: {REFUSALS[error.errno].format(path=path)}, then run the same command again")
        return InputError.exit_code
    return 0


def read_config(arguments: Sequence[str]) -> Config:
    """Returns the checked configuration of a command.

    Raises:
        Answered: a flag asks for a text instead of a run.
        ConfigError: with all problems at once.
        InputError: the recipe of the dataset in `out` cannot be used.
    """
    return resolve(PROGRAM, arguments, _check, recipe=lambda overrides: own_settings(overrides, _log))


def _check(config: Config, problems: list[Problem], _: bool) -> list[Problem]:
    return [*problems, *independent(config.problems(), {problem.key for problem in problems})]


def _log(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
