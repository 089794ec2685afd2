"""muP's factors of logits and queries (model/mup.py) as factors of weights, so that an exported folder needs no setting for them.

The factor of the logits goes into the final norm, whether the output layer is tied or not. That of the queries goes into their norm or, without
QK-norm, into their rows of linear_qkv: RoPE turns queries and does not change their length. Without muP nothing is multiplied.
"""

from torch import Tensor

from ssa_pretrain.config import Config
from ssa_pretrain.model.matrices import QKV, join, rows_by_matrix, split
from ssa_pretrain.model.mup import logits_multiplier, query_multiplier

FINAL_NORM, QUERY_NORM = "final_layernorm.weight", "q_layernorm.weight"


def fold(name: str, tensor: Tensor, config: Config) -> Tensor:
    """Returns a whole tensor of the training model as a model without factors needs it; in fp32 if it is multiplied."""
    return _multiplied(name, tensor, config, inverse=False)


def unfold(name: str, tensor: Tensor, config: Config) -> Tensor:
    """Returns the training model's tensor again."""
    return _multiplied(name, tensor, config, inverse=True)


def _multiplied(name: str, tensor: Tensor, config: Config, *, inverse: bool) -> Tensor:
    if name.endswith(FINAL_NORM):
        factor = logits_multiplier(config.model)
    elif name.endswith(QUERY_NORM if config.model.qk_norm else QKV):
        factor = query_multiplier(config.model)
    else:
        return tensor
    factor = 1.0 / factor if inverse else factor
    if factor == 1.0:
        return tensor
    if not name.endswith(QKV):
        return tensor.float() * factor
    rows = rows_by_matrix(name, config)
    queries, *others = split(tensor, rows)
    return join([queries.float() * factor, *(other.float() for other in others)], rows)
