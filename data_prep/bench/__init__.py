"""How fast, beside others: `python -m data_prep.bench`."""
