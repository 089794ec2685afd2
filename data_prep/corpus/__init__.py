"""The text of a run: which files it consists of, how they are cut into shards, which documents are held out."""
