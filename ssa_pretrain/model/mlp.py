"""The feed-forward: megatron-core's MLP with SwiGLU in one kernel each way, its output recomputed where the recomputation is selective.

SwiGLU's output is F wide, the widest tensor of a layer after its own input, and costs one pass over memory: dropping it after the second
projection and making it again when the backward arrives there saves more for less time than anything else in the layer.
"""

from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from ssa_kernels import swiglu


class FeedForward(MLP):
    """fc2(silu(a) * b) with [a, b] = fc1(x); no biases. `impl` names the kernels' implementation, None by device."""

    def __init__(self, *args: object, impl: str | None = None, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.impl = impl

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: object
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output, None) for hidden states [tokens, 1, M]."""
        assert per_token_scale is None  # mixtures of experts alone have one
        projected, _ = self.linear_fc1(hidden_states)
        if self.config.recompute_granularity == "selective" and self.training:
            recomputed = CheckpointWithoutOutput(fp8=None)  # the kernel is the same under FP8
            output, bias = self.linear_fc2(recomputed.checkpoint(self._activate, projected))
            recomputed.discard_output_and_register_recompute(output)
            return output, bias
        return self.linear_fc2(self._activate(projected))

    def _activate(self, projected: Tensor) -> Tensor:
        return swiglu(projected, impl=self.impl)
