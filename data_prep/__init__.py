"""Text in, indexed binaries out: the corpus side of pretraining, without torch.

Reading order: `cli` (arguments, exit codes) -> `pipeline` (the verbs) -> `sources` (where text comes from) -> `planning`
(files into shards) -> `tokenizer` (train, convert, load, encode) -> `shards` (one shard to disk) -> `readers`, `progress`,
`files` (helpers). The byte format and the manifest are ssa_pretrain/data/indexed_format.py.
"""
