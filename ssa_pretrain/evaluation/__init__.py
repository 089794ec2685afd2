"""Judges a model: held-out text, tasks, attention and samples. Reading order: held_out, text_size, packing, scoring, generation, tasks, results.

Every function that takes a `Run` is called by every rank and returns the same values on each of them. The model may be an engine in the middle of
training or a checkpoint without an optimizer; nothing here knows which. lm_eval_model.py is imported only when lm_eval is asked for.
"""

MODES = ("full", "sparse")
EMA_MODES = {f"ema_{mode}": mode for mode in MODES}  # of the running mean of the weights, in a run's records
