"""Datasets on the Hugging Face hub: listing, downloading, streaming, and the text of blobs that a dataset lists by id."""
