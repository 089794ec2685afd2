"""What is wrong with prepared data, as an error that ends a run with exit code 4."""


class DataError(ValueError):
    """The prepared data cannot serve this run.

    Attributes:
        of_one_rank: only the rank that raises it has met it, so that rank has to say it.
    """

    of_one_rank = False


class DamagedData(DataError):
    """What a rank has read is not what was prepared."""

    of_one_rank = True
