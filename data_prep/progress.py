"""Progress while shards are made: a bar on a terminal, otherwise a JSON line every few seconds."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

Log = Callable[[str], None]  # prints a line for the user

LINE_SECONDS = 5.0


class Display:
    """Shows documents, tokens, MB/s and the time left. The time left is estimated from bytes of input, whose total is known."""

    def __init__(self, input_bytes: int, num_shards: int, stream: TextIO | None = None) -> None:
        self._total, self._num_shards = input_bytes, num_shards
        self._stream: TextIO = stream or sys.stderr
        self._started = self._last_line = time.monotonic()
        self._shards = 0
        self._now = (0, 0, 0, 0)
        self._bar = None
        if self._stream.isatty():
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # workers are forked, and its thread could hold a lock at that moment
            columns, rows = shutil.get_terminal_size()  # 80 x 24 if the terminal does not know its size
            layout = "tokenizing {percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]"
            self._bar = tqdm(total=max(1, input_bytes), bar_format=layout, file=self._stream, ncols=columns, nrows=rows)

    def update(self, documents: int, tokens: int, text_bytes: int, input_bytes: int) -> None:
        """Shows the sums so far."""
        self._now = (documents, tokens, text_bytes, input_bytes)
        if self._bar is not None:
            self._bar.set_description_str(self._counts(), refresh=False)
            self._bar.update(min(input_bytes, self._total) - self._bar.n)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._line()

    def shard_done(self) -> None:
        """Counts a finished shard."""
        self._shards += 1

    def close(self) -> None:
        """Shows the last state and ends the line."""
        if self._bar is not None:
            self._bar.set_description_str(self._counts())
            self._bar.close()
        else:
            self._line()

    def _counts(self) -> str:
        documents, tokens, text_bytes, _ = self._now
        seconds = max(1e-9, time.monotonic() - self._started)
        return (
            f"shards {self._shards}/{self._num_shards}, docs {documents:,}, tokens {tokens / 1e6:.2f} M, "
            f"{text_bytes / 1e6 / seconds:.1f} MB/s"
        )

    def _line(self) -> None:
        documents, tokens, text_bytes, input_bytes = self._now
        self._last_line = time.monotonic()
        seconds = max(1e-9, self._last_line - self._started)
        done = input_bytes / max(1, self._total)
        line = {
            "stage": "tokenize",
            "done": round(min(1.0, done), 4),
            "shards": self._shards,
            "of_shards": self._num_shards,
            "documents": documents,
            "tokens": tokens,
            "mb_per_s": round(text_bytes / 1e6 / seconds, 1),
            "seconds": round(seconds, 1),
            "eta_s": round(seconds * (1 - done) / done) if 0 < done <= 1 else None,
        }
        print(json.dumps(line), file=self._stream, flush=True)
