"""Text in, indexed binaries out: the corpus side of pretraining, without torch.

The folders are the stages, and each imports only those before it:

    sources/     where text comes from: own files, the hub, packages
    corpus/      the text of a run, cut into shards; which documents are held out
    tokenizer/   training, converting and loading a tokenizer; encoding; checking a fast backend
    shards/      tokenizing shards in parallel, on one machine or many
    dataset/     joining shards into a dataset, committing it, validating it, its statistics

Above them are `cli` (arguments, exit codes), `own_settings` (a run without a source) and `pipeline` (the stages in their
order). `config` and `recipe` are between the sources, which have their own settings, and the other stages. Below all are
`readers`, `files`, `plain`, `progress`, `processes`, `run_config` and `errors`. The byte format is in
ssa_pretrain/data/indexed_format.py, the manifest in ssa_pretrain/data/manifest.py.
"""
