"""Errors of prepared data. They end a run with exit code 4."""


class DataError(ValueError):
    """The prepared data cannot be used in this run.

    Attributes:
        of_one_rank: only the rank that raises the error has seen it, so that rank has to print it.
    """

    of_one_rank = False


class DamagedData(DataError):
    """The data that a rank has read differ from those that were prepared."""

    of_one_rank = True
