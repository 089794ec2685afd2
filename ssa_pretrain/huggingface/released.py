"""The layout in which SSA's authors release their 1B models (model_type `llama-nsa`), as far as it differs from our own.

Names are those of a Llama. `g_proj` is [3 H, M]: row 3 h + i is the gate of query head h on branch i of NSA, 0 compressed, 1 selected, 2 window.
SSA, FullAttn and MoBA compute the selected branch only and use the rows 3 h + 1. The others never had a gradient and are dropped, so an export of
the imported model has H rows, and this layout is not written. NSA (`method=nsa`) uses all three, in the order of our own.

config.json has `block_size` and `block_counts` (our top_k), and its `max_position_embeddings` of 131,072 is not the length of training, which was
8,192. SSA and MoBA have the same config.json, so `method=` tells them apart. NSA is recognised by its `window_size` of 128, and no other method takes
it (settings.py). Nothing in the weights marks it: without that line its gates would be read as SSA's.

Source: github zhenyi4/ssa at 5303419, configs/ssa-1b-init/modeling_llama_nsa.py.
"""

from torch import Tensor

BRANCHES, SELECTED = 3, 1


def keep_used_gates(gates: Tensor) -> Tensor:
    """Returns the gates' weights [H, M] on the selected branch, from [3 H, M]."""
    return gates[SELECTED::BRANCHES]
