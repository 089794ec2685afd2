"""The model as a Hugging Face folder, out and in. `python -m ssa_pretrain.export` and `python -m ssa_pretrain.import_hf` are the commands.

Reading order: weights (names and layout of the tensors), settings (config.json), shards (the safetensors files), then export and import_.
"""
