"""Where the running mean of the weights (engine/ema.py) finds DeepSpeed's fp32 weights.

ZeRO 1 and 2 keep one flat partition per parameter group on each data rank, and so does the bf16 optimizer of stage 0. A parameter knows which part of
itself lies where in that partition. Stage 0 in fp32 has no main weights beside the model's. ZeRO-3 has no flat partition and is refused
(config/rules/schedule.py).
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
    parameters: list[torch.nn.Parameter] = list(ds.module.parameters())
    if not hasattr(parameters[0], "_hp_mapping"):
        fragments = {p: Fragment(i, 0, 0, p.numel()) for i, p in enumerate(parameters)}
        return WeightMean(config, [p.data.view(-1) for p in parameters], fragments, None)
    mains = [group["params"][0] for group in ds.basic_optimizer.param_groups]
    fragments = {}
    for parameter in parameters:
        if (mapped := parameter._hp_mapping) is not None:  # pyright: ignore[reportAttributeAccessIssue]
            main, own = mapped.hp_fragment_address, mapped.lp_fragment_address
            fragments[parameter] = Fragment(mapped.param_group_index, main.start, own.start, main.numel)
    return WeightMean(config, mains, fragments, placement.groups.dp)
