"""Copies weights between an engine's sharded parameters and the common weights format (weights.py).

Writing: each parameter is joined over its tensor ranks and written by one data rank, stage by stage, so no rank holds more than a few GB of
whole tensors. `copy_weights` keeps them all in host memory instead, for a thread that writes them while training goes on. Reading: each rank reads whole tensors one at a time and keeps its part. A parameter of ZeRO-3 is whole only inside `gathered`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from ssa_pretrain.checkpoint.staging import HostCopies
from ssa_pretrain.checkpoint.weights import WEIGHTS, WeightsReader, WeightsWriter, canonical_name, write_index
from ssa_pretrain.config import Config
from ssa_pretrain.model.sharding import global_name, is_scorer, join, part, partition_dim, whole_shape
from ssa_pretrain.parallel.agreement import Attempts
from ssa_pretrain.parallel.state import Placement

Gathered = Callable[[torch.nn.Parameter], AbstractContextManager]
Values = Callable[[torch.nn.Parameter], Tensor]  # of a parameter, in its shape; every rank calls it


def already_gathered(_: torch.nn.Parameter) -> AbstractContextManager:
    """Gathers nothing: every data rank holds the whole parameter."""
    return nullcontext()


@torch.no_grad()
def save_weights(
    folder: Path,
    models: Iterable[GPTModel],
    config: Config,
    placement: Placement,
    gathered: Gathered = already_gathered,
) -> None:
    """Writes a model's weights into `folder`/weights; every rank calls it.

    Args:
        folder: exists; usually a checkpoint's.
        models: this rank's GPTModels, one per virtual stage.
        config: the run.
        placement: this process's coordinates.
        gathered: context in which a parameter is sharded by tensor parallelism only.
    """
    write_whole(folder / WEIGHTS, whole_weights(models, config, placement, gathered), placement)


@torch.no_grad()
def copy_weights(
    copies: HostCopies,
    models: Iterable[GPTModel],
    config: Config,
    placement: Placement,
    gathered: Gathered = already_gathered,
) -> dict[str, Tensor]:
    """Returns the whole tensors that this rank will write, in host memory, complete after `copies.wait()`; every rank calls it."""
    whole = whole_weights(models, config, placement, gathered)
    return {name: copies.tensor(f"weights.{name}", tensor) for name, tensor in whole}


def write_copies(target: Path, copied: dict[str, Tensor], placement: Placement, group: dist.ProcessGroup) -> None:
    """Writes the result of `copy_weights` into a new folder; a thread of every rank calls it, with its own group of all ranks."""
    write_whole(target, copied.items(), placement, group)


def whole_weights(
    models: Iterable[GPTModel],
    config: Config,
    placement: Placement,
    gathered: Gathered = already_gathered,
    values: Values = torch.Tensor.detach,
) -> Iterator[tuple[str, Tensor]]:
    """Yields the whole tensors that this rank writes, one at a time; every rank runs it to its end.

    Args:
        models: this rank's GPTModels, one per virtual stage.
        config: the run.
        placement: this process's coordinates.
        gathered: context in which a parameter is sharded by tensor parallelism only.
        values: returns what is written of a parameter.
    """
    groups = placement.groups
    joins = groups.dp_cp.rank() == 0
    writes = joins and placement.tp_rank == 0
    for name, parameter in named_weights(models, config):
        with gathered(parameter):
            own = values(parameter)
            whole = _join_over_ranks(name, own, groups.tp) if joins else None
        if writes and whole is not None:
            yield name, whole


def write_whole(
    target: Path,
    whole: Iterable[tuple[str, Tensor]],
    placement: Placement,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Writes every rank's whole tensors and their index into a new folder; every rank calls it.

    Raises:
        AgreedFailure: on every rank, if any rank could not write.
    """
    parts, writer = Attempts(), WeightsWriter(target, f"stage_{placement.pp_rank:03d}")
    if placement.is_rank_0:
        parts.run(target.mkdir)
    parts.agree(group)
    for name, tensor in whole:  # to its end, also after a failure: its collectives need every rank
        parts.run(partial(writer.add, name, tensor))
    parts.run(writer.flush)
    parts.agree(group)
    if placement.is_rank_0:
        parts.run(partial(write_index, target))
    parts.agree(group)


@torch.no_grad()
def load_weights(
    folder: Path, models: Iterable[GPTModel], config: Config, placement: Placement, *, new_scorer: bool = False
) -> None:
    """Fills a model's parameters with this rank's parts of common weights; every rank calls it.

    With `new_scorer`, a trained scorer of blocks that the folder does not hold keeps its initial weights: a run may begin to train one.

    Raises:
        WeightsError: the folder holds another model.
    """
    tp, reader = config.parallel.tp, WeightsReader(folder)
    named = list(named_weights(models, config, tied_copies=True))
    if new_scorer and not any(map(is_scorer, reader.tensors)):
        named = [(name, parameter) for name, parameter in named if not is_scorer(name)]
    shapes = {name: whole_shape(name, parameter.shape, tp) for name, parameter in named}
    reader.require(shapes, exact=config.parallel.pp == 1)
    for name, parameter in named:
        whole = reader.read(name).to(parameter.device)
        parameter.copy_(part(name, whole, tp, placement.tp_rank))


def named_weights(
    models: Iterable[GPTModel], config: Config, *, tied_copies: bool = False
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yields every parameter with its canonical name; a last stage's copy of a tied embedding only if `tied_copies`."""
    tied = config.model.tie_embeddings
    for model in models:
        first = next(iter(model.decoder.layers), None)
        offset = int(first.layer_number) - 1 if first is not None else 0  # pyright: ignore[reportArgumentType]
        for local_name, parameter in model.named_parameters():
            if local_name == "output_layer.weight" and tied and not tied_copies:
                continue
            yield canonical_name(global_name(local_name, offset, tied=tied)), parameter


def _join_over_ranks(name: str, parameter: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns a whole parameter; every rank of the tensor-parallel group calls it."""
    if partition_dim(name) is None or group.size() == 1:
        return parameter.detach().clone()
    parts = [torch.empty_like(parameter) for _ in range(group.size())]
    dist.all_gather(parts, parameter.detach().contiguous(), group=group)
    return join(name, parts)
