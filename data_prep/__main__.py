"""`python -m data_prep source=… tokenizer=… out=…`; worker processes import this file too, so it imports nothing by itself."""

if __name__ == "__main__":
    import os
    import sys

    from data_prep.cli import main

    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all files are closed, and taking the interpreter apart costs tenths of a second
