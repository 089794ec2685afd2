"""What a step costs: `python -m ssa_pretrain.bench`. Reading order: __main__, goals, cases, variants, plain_megatron, timing, tables."""
