"""The running mean of the weights (EMA): kept in fp32 beside the main weights, sharded as they are, and saved in the common format.

After step t, counted from 1, the mean m of the main weights w becomes

    m + (1 - d) * (w - m),   d = min(optim.ema_decay, (1 + t) / (10 + t)),

so the initial weights are forgotten early in a run, and from about step 9 / (1 - ema_decay) on the decay is the configured one. A step whose
gradient norm is not finite changes nothing; whether it is finite is read on the device, so no step waits for the host. The mean begins as the weights
at which it is switched on.

An engine says where each parameter's numbers lie in its main weights (`Fragment`). A checkpoint has the mean as common weights in fp32, in its folder
`ema` (checkpoint/weights.py). So it loads on any layout and in either engine, and `evaluate` and `export` read it like weights.

Source: Polyak and Juditsky, 1992; the warm-up of the decay is that of TensorFlow's ExponentialMovingAverage (`num_updates`).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ssa_pretrain.checkpoint.sharded_weights import named_weights, whole_weights, write_whole
from ssa_pretrain.checkpoint.staging import HostCopies
from ssa_pretrain.checkpoint.weights import EMA, WeightsReader, find_weights
from ssa_pretrain.config import Config
from ssa_pretrain.model.sharding import part, whole_shape
from ssa_pretrain.parallel.state import Placement


@dataclass(frozen=True, slots=True)
class Fragment:
    """This rank's part of one parameter in the main weights.

    Attributes:
        tensor: number of the main tensor that holds it.
        offset: place of its first number there.
        start: place of its first number in the parameter, flattened.
        numel: how many numbers it has.
    """

    tensor: int
    offset: int
    start: int
    numel: int


class WeightMean:
    """The running mean of one rank's part of the weights.

    Args:
        config: the run.
        mains: the optimizer's fp32 weights on this rank; a step changes them in place.
        fragments: where this rank's part of each parameter lies in them.
        group: ranks that share each parameter's numbers; None: each rank has all of them.
    """

    def __init__(
        self,
        config: Config,
        mains: Sequence[Tensor],
        fragments: dict[torch.nn.Parameter, Fragment],
        group: dist.ProcessGroup | None,
    ) -> None:
        self._config, self._decay = config, config.optim.ema_decay
        self._mains, self._fragments, self._group = mains, fragments, group
        self._means = [main.detach().clone() for main in mains]

    @torch.no_grad()
    def update(self, step: int, grad_norm: Tensor) -> None:
        """Takes the weights after a step into the mean.

        Args:
            step: steps done, from 1.
            grad_norm: of this step; if it is not finite, nothing changes.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        weight = torch.where(grad_norm.isfinite(), 1.0 - decay, 0.0)
        for mean, main in zip(self._means, self._mains, strict=True):
            mean.lerp_(main, weight.to(mean.device, mean.dtype))

    @torch.no_grad()
    def restart(self) -> None:
        """Makes the mean the weights as they are."""
        for mean, main in zip(self._means, self._mains, strict=True):
            mean.copy_(main)

    @torch.no_grad()
    def of(self, parameter: torch.nn.Parameter) -> Tensor:
        """Returns the mean of a parameter, fp32 in this tensor rank's shape; all ranks of the group call it together."""
        fragment = self._fragments.get(parameter)
        if self._group is None:
            assert fragment is not None
            return self._means[fragment.tensor].narrow(0, fragment.offset, fragment.numel).view(parameter.shape).clone()
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if fragment is not None:
            own = self._means[fragment.tensor].narrow(0, fragment.offset, fragment.numel)
            whole.narrow(0, fragment.start, fragment.numel).copy_(own)
        dist.all_reduce(whole, group=self._group)
        return whole.view(parameter.shape)

    @contextmanager
    def in_model(self, models: Iterable[torch.nn.Module]) -> Iterator[None]:
        """The context in which the models have the mean as weights; afterwards they have their own again, to the bit. Every rank opens it."""
        kept: list[tuple[torch.nn.Parameter, Tensor]] = []
        with torch.no_grad():
            for parameter in (p for model in models for p in model.parameters()):
                kept.append((parameter, parameter.detach().clone()))
                parameter.copy_(self.of(parameter))
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, own in kept:
                    parameter.copy_(own)

    def save(self, folder: Path, models: Iterable[torch.nn.Module], placement: Placement) -> None:
        """Writes the mean into `folder`/ema; every rank calls it."""
        write_whole(folder / EMA, self._whole(models, placement), placement)

    def copy(self, copies: HostCopies, models: Iterable[torch.nn.Module], placement: Placement) -> dict[str, Tensor]:
        """Returns the whole tensors that this rank will write, in host memory (sharded_weights.py `copy_weights`); every rank calls it."""
        whole = self._whole(models, placement)
        return {name: copies.tensor(f"ema.{name}", tensor) for name, tensor in whole}

    @torch.no_grad()
    def load(self, folder: Path, models: Iterable[torch.nn.Module], placement: Placement) -> None:
        """Restores the mean from a checkpoint of any layout; one without a mean restarts it.

        Raises:
            WeightsError: the folder holds another model.
        """
        found, tp = find_weights(folder / EMA), self._config.parallel.tp
        if found is None:
            if placement.is_rank_0:
                print(f"{folder} has no running mean of the weights: it begins here", flush=True)
            self.restart()
            return
        reader, named = WeightsReader(found), list(named_weights(models, self._config, tied_copies=True))
        shapes = {name: whole_shape(name, parameter.shape, tp) for name, parameter in named}
        reader.require(shapes, exact=self._config.parallel.pp == 1)
        for name, parameter in named:
            if (fragment := self._fragments.get(parameter)) is not None:
                own = part(name, reader.read(name), tp, placement.tp_rank).flatten()
                mean = self._means[fragment.tensor].narrow(0, fragment.offset, fragment.numel)
                mean.copy_(own.narrow(0, fragment.start, fragment.numel))

    def _whole(self, models: Iterable[torch.nn.Module], placement: Placement) -> Iterator[tuple[str, Tensor]]:
        """Yields the whole tensors that this rank writes, with their names; every rank runs it to its end."""
        return whole_weights(models, self._config, placement, values=self.of)
