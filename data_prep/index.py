"""The stage `index`: what megatron-core's GPTDataset would build first, made ahead of time and off the GPUs.

The work is done by `python -m ssa_pretrain.data.gpt_index` in a process of its own, which may import torch; data_prep does not. The
folder is cache/ and the manifest's hash, so that a dataset which is made anew never meets the indices of its predecessor.
"""

import subprocess
import sys

from data_prep.config import Config
from data_prep.errors import ConfigurationError, InputError
from data_prep.files import only_writer
from data_prep.pipeline import folder
from data_prep.progress import Say
from ssa_pretrain.data.indexed_format import load_manifest


def build_index(config: Config, say: Say) -> str:
    """Builds the indices unless they are there, and returns a line that says where.

    Raises:
        InputError: there is no finished dataset in `out`, or the indices cannot be built.
        ConfigurationError: no samples were asked for.
    """
    index = config.index
    if not index.samples:
        raise ConfigurationError(
            "index.samples=0 asks for nothing; set it to the samples of a training run, steps x global_batch_size (this "
            "project's own training needs no index)"
        )
    out = folder(config)
    try:
        manifest = load_manifest(out)
    except ValueError as error:
        raise InputError(str(error)) from None
    for split, name in (("train", "samples"), ("heldout", "heldout_samples")):
        if getattr(index, name) and not manifest.splits[split]:
            raise ConfigurationError(
                f"index.{name}={getattr(index, name)} needs a {split} split and {out} has none; choose another out= or 0"
            )
    numbers = (index.sequence_length, index.samples, index.heldout_samples, index.seed)
    command = [sys.executable, "-m", "ssa_pretrain.data.gpt_index", str(out), *map(str, numbers)]
    with only_writer(out):
        say("index: building megatron-core's indices")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()
        raise InputError(f"the indices of {out} could not be built ({reason[-1] if reason else done.returncode})")
    return done.stdout.splitlines()[-1] + "\n"
