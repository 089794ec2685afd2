"""`python -m data_prep source=… tokenizer=… out=…`. Worker processes import this file too, so it imports nothing at module level."""

if __name__ == "__main__":
    import os
    import signal
    import sys

    def interrupt(number: int, frame: object) -> None:
        """Ends the run with one line. A second Ctrl-C, while workers are being stopped, ends the process at once."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    try:
        from data_prep.cli import main

        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all files are closed, and the interpreter's own shutdown takes tenths of a second
