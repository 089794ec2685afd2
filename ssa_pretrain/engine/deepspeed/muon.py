"""Muon for the matrices of the layers and AdamW for all other weights, as one optimizer that DeepSpeed takes.

ZeRO joins the parameters of a group in one flat tensor, and each data rank steps one part of it. Here every parameter of Muon is a group of its own, so
a rank's part is a known piece of one parameter, under every stage. Momentum and weights stay in pieces. In a step the data ranks gather a parameter's U
(engine/muon.py), in the dtype of the orthogonalisation; each computes the same O and keeps its piece. Stage 0 has whole parameters and gathers nothing.

DeepSpeed's own Muon is not used. It takes a parameter for one matrix, or cuts an attention projection into heads, its scale is `original` only, and it
clips the orthogonalised update rather than the gradient under ZeRO 2 and 3. Under this optimizer its `use_muon` is set nowhere.

*Checkpoints.* DeepSpeed's converter, which reshapes a checkpoint for other numbers of ranks, reads two moments of every parameter. So the momentum is
named like AdamW's first moment, and a checkpoint names the same tensor a second time as the other moment, which is dropped after loading.

What this does not do: share the work. DeepSpeed steps the groups one by one, so every data rank orthogonalises every matrix.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssa_pretrain.config import Config, PrecisionName
from ssa_pretrain.engine.muon import SplitMuon
from ssa_pretrain.model.matrices import HIDDEN, rows_by_matrix
from ssa_pretrain.model.mup import multipliers
from ssa_pretrain.parallel.state import Placement

SECOND = "exp_avg_sq"  # AdamW's second moment


class PartitionedMuon(SplitMuon):
    """SplitMuon over whole parameters or the pieces of ZeRO; each group has one parameter, and its `shape` on this tensor rank.

    Args:
        groups: SplitMuon's.
        config: the run.
        placement: the process groups of data and tensor ranks, and the device that orthogonalises, also under offload.
    """

    MOMENTUM = "exp_avg"

    def __init__(self, groups: list[dict[str, Any]], config: Config, placement: Placement) -> None:
        dtype = torch.float32 if config.precision.name is PrecisionName.fp32 else torch.bfloat16
        super().__init__(groups, config.optim, dtype=dtype, tensor_ranks=placement.groups.tp)
        self._data_ranks, self._device = placement.groups.dp, placement.device

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Takes one parameter's step, without what only a converted checkpoint has."""
        for name in (SECOND, "step"):
            self.state[parameter].pop(name, None)
        super()._update(parameter, group)

    def _orthogonal(self, narrow: Tensor, group: dict[str, Any], dtype: torch.dtype) -> Tensor:
        """Returns the piece of SplitMuon's result that belongs to a piece of an update."""
        if narrow.dim() > 1:
            return super()._orthogonal(narrow, group, dtype)
        ranks, count = self._data_ranks.size(), math.prod(group["shape"])
        padded = torch.empty(ranks * narrow.numel(), dtype=narrow.dtype, device=self._device)
        assert count <= padded.numel() < 2 * count, f"{ranks} pieces of {narrow.numel()} elements of {group['shape']}"
        dist.all_gather_into_tensor(padded, narrow.to(self._device), group=self._data_ranks)
        found = super()._orthogonal(padded[:count].view(group["shape"]), group, dtype).flatten()
        found = torch.nn.functional.pad(found, (0, padded.numel() - count))
        return found.chunk(ranks)[self._data_ranks.rank()].to(narrow.device)


class MuonAndAdamW(torch.optim.Optimizer):
    """AdamW and Muon as one optimizer, with the groups of both in this order and one state.

    DeepSpeed exchanges the groups' parameters, the list of groups within a step, and groups and state in loading. So both optimizers get theirs in
    every step. A group's `kind` tells whose it is; AdamW's is None.
    """

    def __init__(self, adamw: torch.optim.Optimizer, muon: SplitMuon) -> None:
        for group in adamw.param_groups:
            group["kind"] = None
        super().__init__([*adamw.param_groups, *muon.param_groups], {})
        self._adamw, self._muon = adamw, muon

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Updates every parameter that has a gradient."""
        for inner in (self._adamw, self._muon):
            inner.state = self.state
            inner.param_groups = [g for g in self.param_groups if (g["kind"] is None) == (inner is self._adamw)]
            inner.step()

    def state_dict(self) -> dict[str, Any]:
        """Returns groups and state, with Muon's momentum as both moments."""
        found = super().state_dict()
        matrices = {i for group in found["param_groups"] if group["kind"] is not None for i in group["params"]}
        state = {i: s | {SECOND: s[self._muon.MOMENTUM]} if i in matrices else s for i, s in found["state"].items()}
        return found | {"state": state}


def build_muon(config: Config, named: list[tuple[str, torch.nn.Parameter]], placement: Placement) -> PartitionedMuon:
    """Returns Muon over the layers' matrices; call it before DeepSpeed cuts them.

    Args:
        config: the run.
        named: those matrices of this rank's model, by name.
        placement: this process's coordinates.
    """
    factors, groups = multipliers(config), []
    for name, parameter in named:
        kind = next(end for end in HIDDEN if name.endswith(end))
        lr, decay = factors(name, 2)
        places = {"kind": kind, "rows": rows_by_matrix(kind, config), "shape": tuple(parameter.shape)}
        groups.append({"params": [parameter], "lr": 0.0, "lr_mult": lr, "wd_mult": decay, **places})
    return PartitionedMuon(groups, config, placement)
