"""Pages about runs: `python -m ssa_pretrain.report RUN` and `python -m ssa_pretrain.report.compare RUN RUN …`."""
