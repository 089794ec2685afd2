"""The choices of the configuration: one enumeration per setting that takes one of a few words.

The comment on each member is printed by `--explain`. Standard library only.
"""

from enum import StrEnum


class Method(StrEnum):
    """What a layer's attention computes in training."""

    ssa = "ssa"  # both streams, gated, aligned; the main stream is drawn
    full = "full"  # the full stream alone
    moba = "moba"  # the sparse stream alone


class Score(StrEnum):
    """How a token scores the blocks before its own."""

    softmax_sum = "softmax_sum"
    per_head = "per_head"
    official_compat = "official_compat"


class KernelImpl(StrEnum):
    """Which implementation of the attention kernels runs."""

    auto = "auto"  # Triton on a GPU, the reference elsewhere
    triton = "triton"
    reference = "reference"


class StreamDraw(StrEnum):
    """How often the main stream is drawn."""

    microbatch = "microbatch"
    step = "step"


class EngineName(StrEnum):
    """Which library runs forward, backward and the optimizer step."""

    megatron = "megatron"
    deepspeed = "deepspeed"


class AdamImpl(StrEnum):
    """Whose AdamW steps."""

    torch = "torch"  # torch's fused one, on a GPU and on a CPU; nothing is compiled
    deepspeed = "deepspeed"  # FusedAdam, or CPUAdam under offload: compiled on first use, which takes minutes


class Recompute(StrEnum):
    """Which activations are computed again in the backward."""

    none = "none"
    selective = "selective"  # SwiGLU's output, F wide and cheap to make again; attention is kept
    full = "full"  # whole layers


class LayerSpec(StrEnum):
    """Which layers megatron-core builds the model from."""

    auto = "auto"  # Transformer Engine where it is installed and a GPU is used, local elsewhere
    local = "local"
    transformer_engine = "transformer_engine"


class PrecisionName(StrEnum):
    """Number format of the matrix products."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"


class Fp8Recipe(StrEnum):
    """How Transformer Engine scales FP8 tensors."""

    tensorwise = "tensorwise"  # by the tensor's own largest value
    delayed = "delayed"  # by the largest values of earlier steps
    blockwise = "blockwise"  # by 128 values, or 128 x 128 of a weight


class Schedule(StrEnum):
    """Shape of the learning rate after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class WandbMode(StrEnum):
    """Where Weights & Biases writes."""

    online = "online"
    offline = "offline"
    off = "off"


class Timestamps(StrEnum):
    """What stands before every line on the console."""

    off = "off"
    time = "time"  # 14:05:31, local time
    datetime = "datetime"  # 2026-11-29 14:05:31
