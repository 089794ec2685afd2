"""Between an engine's sharded parameters and the common weights format.

Writing: each parameter is joined over its tensor ranks and written by one data rank, stage by stage, so no rank ever holds more than a few GB of
the whole. Reading: each rank reads whole tensors one by one and keeps its part. ZeRO-3's parameters are whole only inside `gathered`.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ssa_pretrain.config import Config
from ssa_pretrain.model.llama import global_name, tensor_rank_part
from ssa_pretrain.parallel.state import Placement
from ssa_pretrain.weights import WeightsReader, WeightsWriter, canonical_name, write_index

Gathered = Callable[[torch.nn.Parameter], AbstractContextManager]


def whole(_: torch.nn.Parameter) -> AbstractContextManager:
    """Gather nothing: the parameter is whole on its data ranks."""
    return nullcontext()


@torch.no_grad()
def save_weights(
    folder: Path, models: Iterable[torch.nn.Module], config: Config, placement: Placement, gathered: Gathered = whole
) -> None:
    """Write a model's weights into `folder`/weights; every rank calls it.

    Args:
        folder: exists; usually a checkpoint's.
        models: this rank's GPTModels, one or one a virtual stage.
        config: the run.
        placement: where this process stands.
        gathered: inside it a parameter is whole but for tensor parallelism.
    """
    target, groups = folder / "weights", placement.groups
    if placement.is_first:
        target.mkdir()
    dist.barrier()
    writes = groups.dp_cp.rank() == 0 and placement.tp_rank == 0
    writer = WeightsWriter(target, f"stage_{placement.pp_rank:03d}")
    for name, local_name, parameter in _named(models, config):
        with gathered(parameter):
            joined = _join(parameter, local_name, groups.tp) if groups.dp_cp.rank() == 0 else None
        if writes and joined is not None:
            writer.add(name, joined)
    writer.flush()
    dist.barrier()
    if placement.is_first:
        write_index(target)
    dist.barrier()


@torch.no_grad()
def load_weights(folder: Path, models: Iterable[torch.nn.Module], config: Config, placement: Placement) -> None:
    """Fill a model's parameters from a folder of common weights, cut to this rank's part; every rank calls it.

    Raises:
        WeightsError: the folder holds another model.
    """
    reader, models = WeightsReader(folder), list(models)
    named = list(_named(models, config, tied_copies=True))
    shapes = {name: _whole_shape(p, config.parallel.tp) for name, _, p in named}
    reader.require(shapes, exact=config.parallel.pp == 1)
    for name, local_name, parameter in named:
        full = reader.read(name).to(parameter.device)
        parameter.copy_(tensor_rank_part(full, local_name, parameter, config.parallel.tp, placement.tp_rank))


def _named(models: Iterable[torch.nn.Module], config: Config, *, tied_copies: bool = False):
    """Every parameter once: its canonical name, its name in this rank's module, itself. A last stage's copy of a tied embedding is left out."""
    for model in models:
        first = next(iter(model.decoder.layers), None)
        offset = first.layer_number - 1 if first is not None else 0
        for local_name, parameter in model.named_parameters():
            copy = local_name == "output_layer.weight" and config.model.tie_embeddings
            if copy and not tied_copies:
                continue
            name = global_name(local_name, offset, tied=config.model.tie_embeddings)
            yield canonical_name(name), local_name, parameter


def _whole_shape(parameter: torch.nn.Parameter, tp: int) -> tuple[int, ...]:
    shape = list(parameter.shape)
    if (dim := getattr(parameter, "partition_dim", -1)) >= 0:
        shape[dim] *= tp
    return tuple(shape)


def _join(parameter: Tensor, name: str, group: dist.ProcessGroup) -> Tensor:
    """Return a parameter put together from its tensor ranks' parts."""
    dim, tp = getattr(parameter, "partition_dim", -1), group.size()
    if dim < 0 or tp == 1:
        return parameter.detach().clone()
    parts = [torch.empty_like(parameter) for _ in range(tp)]
    dist.all_gather(parts, parameter.detach().contiguous(), group=group)
    if "linear_fc1" in name:  # [gate; up], each sharded on its own
        halves = [part.chunk(2, dim=0) for part in parts]
        return torch.cat([h[0] for h in halves] + [h[1] for h in halves])
    return torch.cat(parts, dim=dim)
