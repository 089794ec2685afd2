"""The errors with which data_prep refuses a command, on the table of exit codes that all commands share.

Each is one sentence that names the fault, its place and the remedy. Any other exception is a bug and keeps its trace.
"""

from ssa_pretrain.errors import CommandError, ExitCode


class ConfigurationError(CommandError, ValueError):
    """A setting is unknown, has the wrong type or contradicts another."""

    exit_code = ExitCode.CONFIGURATION


class InputError(CommandError, ValueError):
    """A file, package or text that the settings name is missing or unreadable."""

    exit_code = ExitCode.DATA


class UnreadableText(InputError):
    """Text of an input file cannot be read: it is not UTF-8 or not JSON, lacks the text field, or its archive is damaged."""
