"""Where the running mean of the weights (engine/ema.py) finds DeepSpeed's fp32 weights.

ZeRO 1 and 2 keep one flat partition per parameter group on each data rank. A parameter knows which part of itself lies where in that partition. Stage 0
in bf16 keeps an fp32 copy of each parameter, or with FusedAdam a flat one of each group. In fp32 it has no main weights beside the model's. ZeRO-3 has no
flat partition and is refused (config/rules/schedule.py).
"""

import torch

from ssa_pretrain.config import Config
from ssa_pretrain.engine.ema import Fragment, WeightMean
from ssa_pretrain.parallel.state import Placement


def build_mean(config: Config, ds, placement: Placement) -> WeightMean | None:
    """Returns the running mean of a rank's weights, None without `optim.ema_decay`.

    Args:
        config: the run.
        ds: DeepSpeed's engine.
        placement: this process's coordinates.
    """
    if not config.optim.ema_decay:
        return None
    if config.deepspeed.zero_stage == 0:
        return WeightMean(config, *_whole(ds), None)
    mains = [group["params"][0] for group in ds.basic_optimizer.param_groups]
    fragments = {}
    for parameter in ds.module.parameters():
        if (mapped := parameter._hp_mapping) is not None:
            main, own = mapped.hp_fragment_address, mapped.lp_fragment_address
            fragments[parameter] = Fragment(mapped.param_group_index, main.start, own.start, main.numel)
    return WeightMean(config, mains, fragments, placement.groups.dp)


def _whole(ds) -> tuple[list[torch.Tensor], dict[torch.nn.Parameter, Fragment]]:
    """Returns the main weights of stage 0 as flat tensors, and where each parameter lies in them."""
    groups = getattr(ds.optimizer, "fp16_groups", None)  # of parameters, whose type is bf16
    if groups is None:
        groups = [[parameter] for parameter in ds.module.parameters()]
        mains = [parameter.data for (parameter,) in groups]
    elif hasattr(ds.optimizer, "fp32_groups_flat"):
        mains = ds.optimizer.fp32_groups_flat
    else:
        mains = [main for group in ds.optimizer.fp32_groups for main in group]
        groups = [[parameter] for group in groups for parameter in group]
    fragments = {}
    for i, group in enumerate(groups):
        offset = 0
        for parameter in group:
            fragments[parameter] = Fragment(i, offset, 0, parameter.numel())
            offset += parameter.numel()
    return [main.detach().view(-1) for main in mains], fragments
