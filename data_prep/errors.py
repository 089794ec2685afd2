"""The two ways to refuse a user's run, each with its exit code.

Both are ValueErrors of one sentence: what is wrong, where, and what to do. Nothing else is caught. Any other exception
is a bug in this program and keeps its traceback.
"""


class ConfigurationError(ValueError):
    """A setting is unknown, has the wrong type, or conflicts with another."""

    exit_code = 3


class InputError(ValueError):
    """A file, package or text named by the settings is missing or unreadable."""

    exit_code = 4


class UnreadableText(InputError):
    """Text of an input file cannot be read: not UTF-8, not JSON, no text where it should be, a damaged archive."""
