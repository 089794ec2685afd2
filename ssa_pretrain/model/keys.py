"""A layer's convolution of keys (`attention.key_convolution`): k <- k + silu(causal depthwise convolution of width W over k).

Method (FlashMoBA, arXiv 2511.11571). Neighbouring keys become alike, so the mean of a block tells more about the keys in it. Both the choice of
blocks and attention use the convolved keys: the choice has no gradient, so the filters learn through attention only, and the released
kernels take one tensor of keys for both. The convolution is over the projected keys, and QK-norm and RoPE come after it, so its result does not
depend on a key's position. Documents are separate.

A tensor rank holds the filters of its kv heads. Under context parallelism plain keys are gathered, and each rank convolves and rotates all of them:
the single process's mathematics, without an exchange of borders. A text that is continued token by token keeps its last W plain keys (text_cache.py).

Not done here: filters that heads share; a convolution of queries or values.
"""

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from ssa_kernels import key_convolution
from ssa_pretrain.model.text_cache import TextCache


class KeyConvolution(torch.nn.Module):
    """The filters of this rank's kv heads, [G * D, 1, W] as in a depthwise Conv1d.

    Args:
        config: of the layer.
        num_kv_heads: this rank's.
        taps: W.
        tp_group: the ranks that share the kv heads.
        impl: the kernels' implementation, None to choose by device.
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_kv_heads: int,
        taps: int,
        *,
        tp_group: torch.distributed.ProcessGroup,
        impl: str | None,
    ) -> None:
        super().__init__()
        shape = (num_kv_heads * config.kv_channels, 1, taps)
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)
        self.tp_group, self.impl = tp_group, impl

    def forward(
        self,
        k_SGD: Tensor,
        positions_S: Tensor,
        layer_number: int,
        *,
        keep: TextCache | None,
        continues: TextCache | None,
    ) -> Tensor:
        """Returns the convolved keys of packed documents, or of the newest tokens of texts.

        Args:
            k_SGD: plain keys, of all the microbatch's tokens.
            positions_S: each token's position in its document.
            layer_number: from 1.
            keep: receives the last plain keys of the texts that the first documents are; None: nobody does.
            continues: the texts whose newest tokens the first tokens are; the others are padding. None: documents are whole.
        """
        taps = self.weight.shape[2]
        if keep is not None:
            keep.keep_plain_keys(layer_number, k_SGD.detach(), taps)
        if continues is None:
            return key_convolution(k_SGD, self.weight, positions_S, impl=self.impl)
        count = len(continues)
        window_BWGD = continues.plain_keys(layer_number, k_SGD[:count], positions_S[:count])
        positions = positions_S[:count].repeat_interleave(taps)
        convolved = key_convolution(window_BWGD.flatten(0, 1), self.weight, positions, impl=self.impl)
        newest_BGD = convolved.unflatten(0, (count, taps))[:, -1]
        return torch.nn.functional.pad(newest_BGD, (0, 0, 0, 0, 0, len(k_SGD) - count))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Returns the filters as megatron-core's checkpoints take them: rows over tensor ranks."""
        groups = {"tp_group": self.tp_group, "dp_cp_group": (metadata or {})["dp_cp_group"]}
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets, **groups)
