"""The user's own files: JSON lines, Parquet, plain text."""

from data_prep.config import JsonlSource, ParquetSource, TextSource
from data_prep.planning import JSONL_SUFFIXES, Subset, expand_paths
from data_prep.progress import Say


def find_files(source: JsonlSource | ParquetSource | TextSource, say: Say | None = None) -> Subset:
    """Returns the files that a source names, and says which others it leaves out; InputError where there are none."""
    if isinstance(source, TextSource):
        return Subset(source.name, "text", expand_paths(source.paths, tuple(source.suffixes), "text", say))
    suffixes = JSONL_SUFFIXES if isinstance(source, JsonlSource) else (".parquet",)
    files = expand_paths(source.paths, suffixes, source.kind, say)
    return Subset(source.name, source.kind, files, source.text_column)
