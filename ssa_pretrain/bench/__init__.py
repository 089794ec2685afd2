"""Benchmarks of a training step: `python -m ssa_pretrain.bench`.

Reading order: __main__, options, goals, cases, share, variants, documents, plain_megatron, measure, timing, tables.
"""
