"""Tokenized shards: planning, writing and committing them, in worker processes or on a cluster."""
