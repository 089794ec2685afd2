"""How the model's parameters are cut for tensor ranks and named over pipeline stages: the only module that knows it.

    embedding, output layer, QKV projection   rows (dim 0) over tensor ranks
    filters of the key convolution            rows: those of the rank's kv heads
    a trained scorer's projection             rows, grouped by kv head as the QKV projection's
    linear_fc1                                rows; its two halves, [gate; up], are cut separately
    linear_proj, linear_fc2                   columns (dim 1): megatron-core's row-parallel layers
    norms                                     whole on every tensor rank
    norms of query heads and keys             whole too, but each rank has the gradient of its own heads: the whole one is their sum

A parameter's name decides, so that a file that only has names (a checkpoint) is cut in the same way as a model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ROW_PARALLEL = ("linear_proj.weight", "linear_fc2.weight")
PAIRED = "linear_fc1.weight"  # [gate; up]
SCORER = "linear_index.weight"
NORMS = ("norm.weight", "layer_norm_weight")  # the second is fused into the projection after it

HEAD_NORMS = ("q_layernorm.weight", "k_layernorm.weight")


def global_name(name: str, layer_offset: int, *, tied: bool) -> str:
    """Returns a parameter's name in the whole model.

    Args:
        name: in this rank's pipeline stage, with layers counted from 0.
        layer_offset: layers of the whole model before this stage.
        tied: whether the output layer shares the embedding's weight, and then its name.
    """
    if tied and name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + layer_offset)
    return ".".join(parts)


def is_norm(name: str) -> bool:
    """Returns whether a parameter is a norm's weight."""
    return name.endswith(NORMS)


def is_head_norm(name: str) -> bool:
    """Returns whether a parameter norms heads, so that its gradient is the sum of those of all tensor ranks."""
    return name.endswith(HEAD_NORMS)


def is_scorer(name: str) -> bool:
    """Returns whether a parameter belongs to a trained scorer of blocks."""
    return name.endswith(SCORER)


def is_row_parallel(name: str) -> bool:
    """Returns whether a parameter is cut along its input dim."""
    return name.endswith(ROW_PARALLEL)


def is_paired(name: str) -> bool:
    """Returns whether a parameter stacks two matrices that are cut separately."""
    return name.endswith(PAIRED)


def partition_dim(name: str) -> int | None:
    """Returns the dim that is cut over tensor ranks, None for a parameter that every rank holds whole."""
    if is_norm(name):
        return None
    return 1 if is_row_parallel(name) else 0


def whole_shape(name: str, part_shape: Sequence[int], tp: int) -> tuple[int, ...]:
    """Returns a parameter's shape in the whole model from its shape on one of `tp` tensor ranks."""
    shape, dim = list(part_shape), partition_dim(name)
    if dim is not None:
        shape[dim] *= tp
    return tuple(shape)


def part(name: str, whole: Tensor, tp: int, tp_rank: int) -> Tensor:
    """Returns a tensor rank's part of a whole parameter, or of one of its optimizer states; may be a view."""
    dim = partition_dim(name)
    if dim is None or tp == 1:
        return whole
    if is_paired(name):
        return torch.cat([half.chunk(tp)[tp_rank] for half in whole.chunk(2)])
    return whole.chunk(tp, dim=dim)[tp_rank]


def join(name: str, parts: Sequence[Tensor]) -> Tensor:
    """Returns the whole parameter from the parts of all tensor ranks, in rank order."""
    dim = partition_dim(name)
    if dim is None or len(parts) == 1:
        return parts[0]
    if is_paired(name):
        gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([*gates, *ups])
    return torch.cat(list(parts), dim=dim)
