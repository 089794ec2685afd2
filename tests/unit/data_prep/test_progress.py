"""A bar where a person looks at a terminal, plain lines where the output is piped."""

import io

from data_prep.progress import Display


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_gets_a_bar_that_redraws_its_line():
    stream = Terminal()
    display = Display(1000, 4, stream)
    display.shard_done()
    display.update(10, 2_000_000, 500, 500)
    display.close()
    last = stream.getvalue().rstrip().split("\r")[-1]
    assert "tokenizing  50%|" in last
    assert "| shards 1/4, docs 10, tokens 2.00 M, " in last and "MB/s" in last


def test_pipe_gets_lines_with_the_time_left():
    stream = io.StringIO()
    display = Display(1000, 4, stream)
    display.update(10, 2_000_000, 500, 250)
    display.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1 and "\r" not in stream.getvalue()
    assert lines[0].startswith("tokenizing  25 %: shards 0/4, docs 10, tokens 2.00 M, ")
    assert lines[0].endswith(" s")


def test_nothing_done_gives_no_guess():
    stream = io.StringIO()
    Display(1000, 4, stream).close()
    assert stream.getvalue().endswith("ETA unknown\n")
