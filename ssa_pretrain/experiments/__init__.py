"""The paper's experiments as one-command recipes: `python -m ssa_pretrain.experiments NAME` (docs/experiments.md).

A recipe (recipes/) is a value: settings × seeds, evaluations, benchmarks, and how tables, figure and verdicts are made of the results. The command
trains, evaluates and measures with the existing programs, each in a process of its own, and writes the report from their files.
"""
