"""The exit codes of all commands, and the exceptions that lead to them.

A `CommandError` is an error that a user can cause. It carries one sentence and an exit code, and is reported without a trace. Every
other exception is a bug: it is reported with its trace and ends the process with 1. docs/launch.md has the table for users. Stdlib only.

`Answered` is not an error. It takes the answer to a flag such as --help to the entry point, which prints it and exits.

`ConfigError` is in settings/problems.py, beside the problems that it lists.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of all commands."""

    DONE = 0
    FAILED = 1  # a bug, a rank that was killed, a collective that timed out
    CONFIGURATION = 3  # the configuration, the command line, a port in use, an output_dir that cannot be written
    DATA = 4
    CHECKPOINT = 5
    DIVERGED = 6  # steps in a row or the weights are not finite, or rollbacks do not help
    STOPPED = 7  # on request; the same command resumes
    HUNG = 8  # a rank made no progress; the watchdog has named it
    REPLICAS = 12  # data ranks hold different copies of the weights
    INTERRUPTED = 130  # by Ctrl-C, at once; the code that shells report
    READER_GONE = 141  # the reader of its output, such as `head`, has exited; the code that shells report


class CommandError(Exception):
    """An error that a user can cause; its text is one sentence.

    Attributes:
        exit_code: the exit code of the process.
        of_one_rank: only the rank that raises it has this error, so that rank must report it itself.
    """

    exit_code: int = ExitCode.FAILED
    of_one_rank: bool = False


class Answered(Exception):
    """A flag such as --help asks for a text instead of a run; the entry point prints the text and exits.

    Attributes:
        text: the answer, for standard output.
        exit_code: the exit code of the process.
    """

    def __init__(self, text: str, exit_code: int = ExitCode.DONE) -> None:
        self.text, self.exit_code = text, exit_code
        super().__init__(text)


class DataError(CommandError, ValueError):
    """The prepared data is missing, damaged or too small for this run."""

    exit_code = ExitCode.DATA


class DamagedData(DataError):
    """A rank has read tokens that differ from the prepared ones."""

    of_one_rank = True


class CheckpointError(CommandError, ValueError):
    """There is no usable checkpoint, it belongs to another run, or it could not be saved."""

    exit_code = ExitCode.CHECKPOINT


class SaveError(CheckpointError):
    """A checkpoint could not be saved. All ranks know it and are in step, and their state is sound, so the run may go on.

    Attributes:
        reason: what failed, without advice.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}: free space and run the same command again")


class UnsafePickle(CheckpointError):
    """A file of a checkpoint names a function or class that no checkpoint needs, so it was not unpickled."""

    of_one_rank = True


class WeightsError(CommandError, ValueError):
    """A folder of weights is incomplete, damaged or holds another model."""

    exit_code = ExitCode.CHECKPOINT


class DivergedError(CommandError, RuntimeError):
    """Too many steps in a row were not finite, or the weights are not, or rollbacks do not help."""

    exit_code = ExitCode.DIVERGED


class ReplicaError(CommandError, RuntimeError):
    """Data ranks hold different copies of the weights."""

    exit_code = ExitCode.REPLICAS


class Interrupted(CommandError):
    """The run was stopped on request and has saved; the same command resumes it."""

    exit_code = ExitCode.STOPPED


class UsageError(CommandError):
    """The arguments of a command cannot be used."""

    exit_code = ExitCode.CONFIGURATION


class LaunchError(CommandError):
    """A launcher's flags or environment variables are wrong."""

    exit_code = ExitCode.CONFIGURATION
