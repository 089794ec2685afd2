"""Where the running mean of the weights (engine/ema.py) finds megatron-core's fp32 weights.

The distributed optimizer keeps a slice of each flattened parameter on some of the ranks that share it, and sharded Muon a whole one on one of
them. Other optimizers keep a whole fp32 copy beside a bf16 parameter, and no copy of an fp32 one.
"""

from collections.abc import Sequence

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

from ssa_pretrain.config import Config
from ssa_pretrain.engine.ema import Fragment, WeightMean
from ssa_pretrain.engine.megatron.muon import MuonOptimizer
from ssa_pretrain.parallel.state import Placement


def build_mean(
    config: Config, optimizer: ChainedOptimizer, models: Sequence[torch.nn.Module], placement: Placement
) -> WeightMean | None:
    """Returns the running mean of a rank's weights, None without `optim.ema_decay`.

    Args:
        config: the run.
        optimizer: core's, over all parameters of the models.
        models: this rank's parts of the model.
        placement: this process's coordinates.
    """
    if not config.optim.ema_decay:
        return None
    mains, fragments = [], {}
    owned = optimizer.owned if isinstance(optimizer, MuonOptimizer) else None
    distributed = [o for o in optimizer.chained_optimizers if isinstance(o, DistributedOptimizer)]
    for one in distributed:
        for parameter, (group, place) in one.model_param_group_index_map.items():
            main, cut = one.optimizer.param_groups[group]["params"][place], one._get_model_param_range_map(parameter)
            fragments[parameter] = Fragment(len(mains), 0, cut["param"].start, main.numel())
            mains.append(main.view(-1))
    if not distributed:
        for parameter in (p for model in models for p in model.parameters() if owned is None or p in owned):
            main = getattr(parameter, "main_param", parameter)
            fragments[parameter] = Fragment(len(mains), 0, 0, main.numel())
            mains.append(main.data.view(-1))
    return WeightMean(config, mains, fragments, placement.groups.dp_cp if distributed or owned is not None else None)
