"""What a step costs: `python -m ssa_pretrain.bench`. Reading order: __main__, goals, cases, variants, ..engine.plain, timing, tables."""
