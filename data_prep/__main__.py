"""`python -m data_prep source=… tokenizer=… out=…`; worker processes import this file too, so it imports nothing by itself."""

if __name__ == "__main__":
    import sys

    from data_prep.cli import main

    sys.exit(main(sys.argv[1:]))
