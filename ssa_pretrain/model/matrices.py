"""The matrices that the layers' parameters are made of, and who updates them when data ranks share whole parameters.

    linear_qkv               per kv head group_size * D rows of queries, D of keys, D of values, group_size of gates    4 matrices
    linear_fc1               [gate; up]                                                                               2
    linear_proj, linear_fc2                                                                                           1

An optimizer that treats a matrix as a whole, such as Muon, must not see the first two as one: q, k, v and gates map to different spaces. The gates are
a matrix [H, M] of their own. Rows are those of the whole parameter, not of a tensor rank's part (sharding.py).
"""

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ssa_pretrain.config import Config, gates_per_head

if TYPE_CHECKING:
    from torch import Tensor

QKV, FC1, PROJ, FC2 = "linear_qkv.weight", "linear_fc1.weight", "linear_proj.weight", "linear_fc2.weight"
HIDDEN = (QKV, PROJ, FC1, FC2)


def is_hidden(name: str) -> bool:
    """Returns whether a parameter is a matrix of a layer, from hidden states to hidden states, by its name."""
    return name.endswith(HIDDEN)


def rows_by_matrix(name: str, config: Config) -> tuple[int, ...]:
    """Returns the rows of each matrix in a parameter; linear_qkv repeats them per kv head."""
    model = config.model
    if name.endswith(QKV):
        group_size = model.num_attention_heads // model.num_kv_heads
        rows = (group_size * model.head_dim, model.head_dim, model.head_dim)
        gates = group_size * gates_per_head(config.attention)
        return (*rows, gates) if gates else rows
    return (model.ffn_hidden_size,) * 2 if name.endswith(FC1) else (model.hidden_size,)


def whole_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """Returns the whole shapes of a layer's four parameters, by the end of their names."""
    model = config.model
    return {
        QKV: (model.qkv_width(gates=gates_per_head(config.attention)), model.hidden_size),
        PROJ: (model.hidden_size, model.query_width),
        FC1: (2 * model.ffn_hidden_size, model.hidden_size),
        FC2: (model.hidden_size, model.ffn_hidden_size),
    }


def matrix_shapes(config: Config) -> list[tuple[int, int]]:
    """Returns the shapes of a layer's matrices."""
    found = []
    for name, (count, columns) in whole_shapes(config).items():
        rows = rows_by_matrix(name, config)
        found += [(each * (count // sum(rows)), columns) for each in rows]
    return found


def split(whole: "Tensor", rows: Sequence[int]) -> "list[Tensor]":
    """Returns the matrices of a whole parameter; copies where their rows do not lie together.

    Args:
        whole: [a multiple of the sum of rows, columns].
        rows: of each matrix, repeated over the parameter.
    """
    return [part.flatten(0, 1) for part in whole.unflatten(0, (-1, sum(rows))).split(list(rows), 1)]


def join(matrices: "Sequence[Tensor]", rows: Sequence[int]) -> "Tensor":
    """Returns the whole parameter of `split`'s matrices."""
    import torch  # imported here because the planner reads this module without it

    groups = [matrix.unflatten(0, (-1, count)) for matrix, count in zip(matrices, rows, strict=True)]
    return torch.cat(groups, 1).flatten(0, 1)


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Returns the rank that updates each parameter: the largest first, each to the rank that has least.

    Args:
        sizes: elements of each parameter.
        ranks: that share them.
    """
    found = [0] * len(sizes)
    load = [(0, rank) for rank in range(ranks)]
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
        held, found[place] = load[0]
        heapq.heapreplace(load, (held + sizes[place], found[place]))
    return found
