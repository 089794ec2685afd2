"""Tokenized data on disk and in training: the byte format (numpy only), the parts of a dataset, packed rows, batches."""
