"""The two ways in which a user's run can be refused, and the exit code of each.

Both are ValueErrors of one sentence that says what is wrong, where, and what to do. Nothing else is caught: any other
exception is a fault of this program and keeps its traceback.
"""


class ConfigurationError(ValueError):
    """A setting is unknown, has the wrong type, or cannot work with another."""

    exit_code = 3


class InputError(ValueError):
    """A file, package or text that the settings name is missing or unreadable."""

    exit_code = 4


class UnreadableText(InputError):
    """Text of an input file cannot be read: not UTF-8, no JSON, no text where it should be, a damaged archive."""
