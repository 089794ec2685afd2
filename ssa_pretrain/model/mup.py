"""muP: what changes with the width of the model, so that the best learning rate does not.

With m = hidden_size / base_width, and every other width (F, H * D) growing like hidden_size:

    initial std of a layer's matrices                    init_std / sqrt(m)
    learning rate of a layer's matrices, AdamW           lr / m
                                         Muon            lr / sqrt(m) under match_rms_adamw, lr under original
    decoupled weight decay of the same                   lr * weight_decay as at base_width
    logits                                               times output_multiplier / m
    attention scale, if base_head_dim is set             sqrt(base_head_dim) / D in place of 1 / sqrt(D)

Embedding, output layer and norms keep their std and learning rate. AdamW's update of a matrix has one sign per element and aligns with its input, so it
grows the output by the width; Muon's has a spectral norm of 0.2 sqrt(max(r, c)), or of sqrt(max(1, r / c)), whatever the gradient.

The attention's scale is applied to the queries, so that selection sees it too. Nothing here is saved with the weights: an export multiplies the
factors into them (huggingface/weights.py).

Source: Yang et al., Tensor Programs V (arXiv 2203.03466), table 8; the form with a multiplier of tied logits as in Dey et al., arXiv 2304.03208.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from ssa_pretrain.config import Config, ModelConfig, MuonScale, OptimizerName
from ssa_pretrain.model.matrices import is_hidden


class Multipliers(NamedTuple):
    """Factors of a parameter's learning rate and weight decay."""

    lr: float
    weight_decay: float


def width_ratio(model: ModelConfig) -> float:
    """Returns m, 1 without muP."""
    return model.hidden_size / model.mup.base_width if model.mup.base_width else 1.0


def init_std(name: str, model: ModelConfig) -> float:
    """Returns the standard deviation of a matrix's initial weights."""
    return model.init_std / math.sqrt(width_ratio(model)) if is_hidden(name) else model.init_std


def logits_multiplier(model: ModelConfig) -> float:
    """Returns the factor of the logits."""
    return model.mup.output_multiplier / width_ratio(model)


def query_multiplier(model: ModelConfig) -> float:
    """Returns the factor of the queries, beside the kernels' 1 / sqrt(D)."""
    base = model.mup.base_head_dim
    return math.sqrt(base / model.head_dim) if base else 1.0


def multipliers(config: Config) -> Callable[[str, int], Multipliers]:
    """Returns the function (name, number of dims) -> factors of a parameter's learning rate and weight decay."""
    optim, ratio = config.optim, width_ratio(config.model)
    hidden, own = 1.0 / ratio, 1.0
    if optim.name is OptimizerName.muon:
        hidden = 1.0 if optim.muon.scale is MuonScale.original else 1.0 / math.sqrt(ratio)
        own = optim.muon.lr_multiplier

    def of(name: str, dims: int) -> Multipliers:
        if is_hidden(name):
            return Multipliers(own * hidden, 1.0 / hidden)
        return Multipliers(1.0, 1.0 if dims > 1 else 0.0)

    return of
