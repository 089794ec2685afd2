"""A bar on a terminal, JSON lines if the output is piped."""

import io
import json

from data_prep.progress import Display


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_shows_a_bar_that_redraws_its_line():
    stream = Terminal()
    display = Display(1000, 4, stream)
    display.shard_done()
    display.update(10, 2_000_000, 500, 500)
    display.close()
    last = stream.getvalue().rstrip().split("\r")[-1]
    assert "tokenizing  50%|" in last
    assert "| shards 1/4, docs 10, tokens 2.00 M, " in last and "MB/s" in last


def test_pipe_gets_json_lines_with_the_remaining_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("data_prep.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    display = Display(1000, 4, stream)
    now[0] += 2
    display.update(5, 1_000_000, 250, 100)  # too early for a line
    now[0] += 8
    display.shard_done()
    display.update(10, 2_000_000, 50_000_000, 250)
    assert json.loads(stream.getvalue()) == {
        "stage": "tokenize",
        "done": 0.25,
        "shards": 1,
        "of_shards": 4,
        "documents": 10,
        "tokens": 2_000_000,
        "mb_per_s": 5.0,
        "seconds": 10.0,
        "eta_s": 30,
    }
    display.close()
    assert len(stream.getvalue().splitlines()) == 2 and "\r" not in stream.getvalue()


def test_no_progress_gives_no_estimate():
    stream = io.StringIO()
    Display(1000, 4, stream).close()
    assert json.loads(stream.getvalue())["eta_s"] is None
