"""Benchmarks of a training step: `python -m ssa_pretrain.bench`.

Reading order: __main__, options, goals, cases, variants, plain_megatron, measure, timing, tables.
"""
