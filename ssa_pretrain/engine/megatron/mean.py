"""Where the running mean of the weights (engine/ema.py) finds megatron-core's fp32 weights.

The distributed optimizer keeps a slice of each flattened parameter on some of the ranks that share it. Other optimizers keep a whole fp32 copy beside a
bf16 parameter, and no copy of an fp32 one; where each parameter belongs to one data rank, the others keep nothing of it.
"""

from collections.abc import Iterator
from itertools import chain

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, MegatronOptimizer
from torch import Tensor

from ssa_pretrain.config import Config
from ssa_pretrain.engine.ema import Fragment, WeightMean
from ssa_pretrain.parallel.state import Placement


def build_mean(config: Config, optimizer: ChainedOptimizer, placement: Placement) -> WeightMean | None:
    """Returns the running mean of a rank's weights, None without `optim.ema_decay`.

    Args:
        config: the run.
        optimizer: core's, over all parameters of the rank.
        placement: this process's coordinates.
    """
    if not config.optim.ema_decay:
        return None
    mains: list[Tensor] = []
    fragments: dict[torch.nn.Parameter, Fragment] = {}
    for parameter, main, start in (found for one in optimizer.chained_optimizers for found in _main_weights(one)):
        fragments[parameter] = Fragment(len(mains), 0, start, main.numel())
        mains.append(main.detach().view(-1))
    return WeightMean(config, mains, fragments, placement.groups.dp_cp if config.engine.distributed_optimizer else None)


def _main_weights(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, Tensor, int]]:
    """Yields an optimizer's parameters of the model, what this rank has of their fp32 weights, and its place in the flattened parameter."""
    if isinstance(optimizer, DistributedOptimizer):
        for parameter, (group, place) in optimizer.model_param_group_index_map.items():
            cut = optimizer._get_model_param_range_map(parameter)["param"]
            yield parameter, optimizer.optimizer.param_groups[group]["params"][place], cut.start
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        both = zip(chain(*optimizer.float16_groups), chain(*optimizer.fp32_from_float16_groups), strict=True)
        yield from ((parameter, main, 0) for parameter, main in both)
        yield from ((parameter, parameter, 0) for parameter in chain(*optimizer.fp32_from_fp32_groups))
    else:
        yield from ((parameter, parameter, 0) for parameter in optimizer.get_parameters())
