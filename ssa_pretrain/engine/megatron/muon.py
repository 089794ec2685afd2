"""Muon for the matrices of the layers and AdamW for all other weights, as one chained optimizer of megatron-core.

Core's own Muon (core/optimizer/muon.py) cannot be used: it splits linear_qkv into three parts and here it has four, it takes [gate; up] for one matrix,
and it needs a package that Python 3.11 does not have. So core's wrappers hold the fp32 weights, and SplitMuon (engine/muon.py) and AdamW step.

*Data ranks.* Gradients are summed over them without core's distributed optimizer, which cuts parameters at any element. With
engine.distributed_optimizer each whole parameter, its fp32 weights and its states belong to one data rank instead (model/matrices.py `owners`), which sends
the new weights to the others after the step. So states are sharded as under ZeRO 1, by parameter; the rank with the embedding holds at least that.
Core's layer-wise optimizer does the same, but its checkpoints load only on the same number of data ranks, and not in fp32.

*Checkpoints.* Every fp32 weight and state is a sharded tensor of its parameter, with the parameter's name and place, whoever owns it. Any layout
reads them. The step count is one number.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from ssa_pretrain.config import Config
from ssa_pretrain.engine.megatron.optimizer import DeviceClippedOptimizer, core_settings, training_device
from ssa_pretrain.engine.muon import SplitMuon
from ssa_pretrain.model.matrices import HIDDEN, is_hidden, owners, rows_by_matrix
from ssa_pretrain.model.mup import multipliers

Named = list[tuple[str, torch.nn.Parameter]]
MAIN = "fp32_param"  # core's name of the fp32 weights in a checkpoint


class MuonOptimizer(DeviceClippedOptimizer):
    """Core's wrappers of Muon and AdamW, in this order.

    Attributes:
        owned: the parameters of the model that this rank updates, if each belongs to one data rank; else None.

    Args:
        optimizers: the wrappers, over the parameters of this rank only.
        skips: see DeviceClippedOptimizer.
        by_owner: every data rank's parameters of the model, if each belongs to one; None: every rank updates all.
        data_ranks: the ranks that share the parameters, in the order of `by_owner`.
    """

    def __init__(
        self,
        optimizers: list[MegatronOptimizer],
        *,
        skips: bool,
        by_owner: list[list[torch.nn.Parameter]] | None,
        data_ranks: dist.ProcessGroup,
    ) -> None:
        super().__init__(optimizers, skips=skips)
        self._by_owner, self._data_ranks = by_owner, data_ranks
        self.owned = None if by_owner is None else set(by_owner[data_ranks.rank()])

    @torch.no_grad()
    def step(self) -> tuple[bool, Tensor, None]:
        """See DeviceClippedOptimizer; then every data rank has the new weights."""
        queued = super().step()
        if queued[0]:
            self._send_weights()
        return queued

    def _send_weights(self) -> None:
        """Sends each owner's weights to the other data ranks."""
        for rank, parameters in enumerate(self._by_owner or ()):
            if parameters:
                source = dist.get_global_rank(self._data_ranks, rank)
                flat = torch.cat([p.detach().flatten() for p in parameters])
                dist.broadcast(flat, source, group=self._data_ranks)
                sent = flat.split([p.numel() for p in parameters])
                torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                    [p.detach() for p in parameters], [new.view_as(p) for new, p in zip(sent, parameters, strict=True)]
                )

    def sharded_state_dict(
        self, model_sharded_state_dict: ShardedStateDict, is_loading: bool = False, **_: object
    ) -> ShardedStateDict:
        """Returns the step count and the sharded tensors of this rank's fp32 weights and states; every rank calls it."""
        self._init_states()
        entries = list(self._entries())
        places = get_param_id_to_sharded_param_map(model_sharded_state_dict, [weight for weight, _ in entries])
        tensors: dict[str, Any] = {}
        for number, (_, values) in enumerate(entries):
            place = places[number]
            if self._by_owner is not None:  # nobody else has it
                place = replace(place, replica_id=(*place.replica_id[:2], 0))  # pyright: ignore[reportIndexIssue]
            for name, value in values.items():
                key = f"{number}.{name}"
                tensors[key] = make_sharded_optimizer_tensor(place, value, prefix=f"optimizer.state.{name}")
        return {"step": self._count_steps(), "tensors": tensors}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies what `sharded_state_dict` has described and core has read."""
        for number, (_, values) in enumerate(self._entries()):
            for name, value in values.items():
                value.copy_(state_dict["tensors"][f"{number}.{name}"])
        for inner in self._inner():
            for group in inner.param_groups:
                if not isinstance(inner, SplitMuon | torch.optim.AdamW):
                    group["step"] = int(state_dict["step"])
                for p in group["params"]:
                    if "step" in inner.state[p]:
                        inner.state[p]["step"] = torch.tensor(float(state_dict["step"]))

    def _inner(self) -> list[torch.optim.Optimizer]:
        return [wrapper.optimizer for wrapper in self.chained_optimizers]

    def _init_states(self) -> None:
        """Gives every parameter the states of step 0 that has none yet: those that a checkpoint holds."""
        for wrapper in self.chained_optimizers:
            wrapper.init_state_fn(wrapper.optimizer, wrapper.config)
            if isinstance(wrapper.optimizer, torch.optim.AdamW):
                for state in wrapper.optimizer.state.values():
                    state.setdefault("step", torch.zeros((), dtype=torch.float32))

    def _entries(self) -> Iterator[tuple[torch.nn.Parameter, dict[str, Tensor]]]:
        """Yields this rank's parameters of the model with their fp32 weights, if these are others, and states."""
        for wrapper in self.chained_optimizers:
            for weight, main in _weights(wrapper):
                state = wrapper.optimizer.state[main]
                values = {name: value for name, value in state.items() if name != "step" and value is not None}
                yield weight, values if main is weight else {MAIN: main} | values

    def _count_steps(self) -> int:
        """Returns AdamW's step count, from a rank that has any of its parameters."""
        found = [0.0]
        for inner in self._inner():
            found += [group["step"] for group in inner.param_groups if group["params"] and "step" in group]
            found += [float(state["step"]) for state in inner.state.values() if "step" in state]
        most = torch.tensor(max(found), device=training_device())
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)


def build_muon(config: Config, chunks: list[DistributedDataParallel], groups: ProcessGroupCollection) -> MuonOptimizer:
    """Returns Muon and AdamW over a rank's model chunks.

    Args:
        config: the run.
        chunks: under core's data parallelism without its distributed optimizer.
        groups: process groups of megatron-core.
    """
    named: Named = [pair for chunk in chunks for pair in chunk.named_parameters()]
    own, by_owner, ranks = named, None, groups.dp_cp.size()
    if config.engine.distributed_optimizer and ranks > 1:
        owner = owners([p.numel() for _, p in named], ranks)
        by_owner = [[p for (_, p), o in zip(named, owner, strict=True) if o == rank] for rank in range(ranks)]
        own = [pair for pair, o in zip(named, owner, strict=True) if o == groups.dp_cp.rank()]
    adamw = _adamw(config, chunks, own)
    muon = _muon(config, own, groups.tp, adamw.config)
    if by_owner is not None:  # each rank counts the gradients of its parameters
        adamw.grad_stats_parallel_group = dist.group.WORLD  # pyright: ignore[reportAttributeAccessIssue]
    muon.grad_stats_parallel_group = adamw.get_grad_stats_parallel_group()  # pyright: ignore[reportAttributeAccessIssue]
    muon.tp_group = groups.tp  # pyright: ignore[reportAttributeAccessIssue]
    skips = config.training.max_skipped_steps > 0
    return MuonOptimizer([muon, adamw], skips=skips, by_owner=by_owner, data_ranks=groups.dp_cp)


def muon_groups(config: Config, named: Named) -> list[dict[str, Any]]:
    """Returns the groups of SplitMuon over the layers' matrices among named parameters; one kind of parameter each, in the same order on every rank."""
    factors, groups = multipliers(config), []
    for each in HIDDEN:
        lr, decay = factors(each, 2)
        parameters, rows = [p for name, p in named if name.endswith(each)], rows_by_matrix(each, config)
        groups.append({"params": parameters, "kind": each, "rows": rows, "lr_mult": lr, "wd_mult": decay})
    return groups


def _muon(
    config: Config, own: Named, tensor_ranks: dist.ProcessGroup, settings: OptimizerConfig
) -> Float16OptimizerWithFloat16Params | FP32Optimizer:
    """Returns Muon over the matrices of this rank's layers, in the wrapper that holds their fp32 weights."""
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    inner = SplitMuon(muon_groups(config, own), config.optim, dtype=dtype, tensor_ranks=tensor_ranks)

    def init_states(optimizer: SplitMuon, _: object = None) -> None:
        optimizer.init_states()

    if settings.bf16:
        return Float16OptimizerWithFloat16Params(inner, settings, None, init_states)
    return FP32Optimizer(inner, settings, init_states)


def _adamw(config: Config, chunks: list[DistributedDataParallel], own: Named) -> MegatronOptimizer:
    """Returns core's AdamW over those of this rank's parameters that Muon does not update."""
    mine = {id(parameter) for name, parameter in own if not is_hidden(name)}
    others = [p for chunk in chunks for p in chunk.parameters() if id(p) not in mine]
    for parameter in others:  # core leaves out what is frozen
        parameter.requires_grad = False
    try:
        (adamw,) = get_megatron_optimizer(core_settings(config, distributed=False), chunks).chained_optimizers
    finally:
        for parameter in others:
            parameter.requires_grad = True
    return adamw


def _weights(wrapper: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Yields a wrapper's parameters of the model, each with the fp32 weights that step."""
    if isinstance(wrapper, Float16OptimizerWithFloat16Params):
        low, main = chain(*wrapper.float16_groups), chain(*wrapper.fp32_from_float16_groups)
        yield from zip(low, main, strict=True)
        yield from ((p, p) for p in chain(*wrapper.fp32_from_fp32_groups))
    else:
        yield from ((p, p) for p in wrapper.get_parameters())
