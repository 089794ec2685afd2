"""Indexed binaries on disk and what is made of them: the byte format (numpy only), datasets, packed rows, batches."""
