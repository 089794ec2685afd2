"""Initial weights: a function of (seed, parameter name) only, so every layout starts from the same model on the same kind of device."""

import hashlib

import torch

from ssa_pretrain.config import Config
from ssa_pretrain.model.mup import init_std
from ssa_pretrain.model.sharding import global_name, is_norm, part, whole_shape


@torch.no_grad()
def init_weights(model: torch.nn.Module, config: Config, *, tp_rank: int, layer_offset: int) -> None:
    """Sets norms to 1 and every matrix to N(0, init_std), narrower under muP (mup.py), drawn whole and cut to this tensor rank's part.

    Args:
        model: a pipeline stage on one tensor rank.
        config: the run.
        tp_rank: this rank's tensor-parallel coordinate.
        layer_offset: layers of the whole model before this stage.
    """
    tp = config.parallel.tp
    for name, parameter in model.named_parameters():
        if is_norm(name):
            parameter.fill_(1.0)
            continue
        whole = torch.empty(whole_shape(name, parameter.shape, tp), device=parameter.device)
        generator = torch.Generator(device=parameter.device)
        generator.manual_seed(_seed(config.seed, global_name(name, layer_offset, tied=config.model.tie_embeddings)))
        whole.normal_(std=init_std(name, config.model), generator=generator)
        parameter.copy_(part(name, whole, tp, tp_rank))


def _seed(seed: int, name: str) -> int:
    """Returns a parameter's seed, below 2^63."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
