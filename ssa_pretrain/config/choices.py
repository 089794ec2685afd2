"""The choices of the configuration: one enumeration per setting that takes one of a few words.

The comment on each member is printed by `--explain`. Standard library only.
"""

from enum import StrEnum


class Method(StrEnum):
    """Attention method: what each layer computes in training."""

    ssa = "ssa"  # both streams, gated and aligned; the main stream is drawn at random
    full = "full"  # only the full stream
    moba = "moba"  # only the sparse stream
    nsa = "nsa"  # the sparse stream, attention over the means of blocks and a sliding window, with a gate each
    indexer = "indexer"  # the sparse stream with a trained scorer, after a warm-up on the full stream

    @property
    def streams(self) -> tuple[str, ...]:
        """Returns the streams that a layer computes in training: the one fact that rules, FLOPs, memory and routing need of a method."""
        one = {Method.full: ("full",), Method.moba: ("sparse",), Method.nsa: ("sparse",)}
        return one.get(self, ("full", "sparse"))


class Score(StrEnum):
    """How a query scores the blocks before its own."""

    softmax_sum = "softmax_sum"  # softmax over blocks, summed over the heads of a kv head (SSA)
    per_head = "per_head"  # logit of each query head by itself (MoBA)
    compressed = "compressed"  # softmax_sum with the probabilities of NSA's compressed branch
    official_compat = "official_compat"  # softmax_sum with the chunked top-k of the official SSA code
    indexer = "indexer"  # share of a small trained attention on the block (attention.indexer)


class KernelImpl(StrEnum):
    """Implementation of the attention kernels."""

    auto = "auto"  # Triton on a GPU, the reference on a CPU
    triton = "triton"  # needs a GPU
    reference = "reference"  # plain torch, on any device


class StreamDraw(StrEnum):
    """How often the main stream is drawn."""

    microbatch = "microbatch"  # for each microbatch
    step = "step"  # once per step, for all its microbatches


class RowPacking(StrEnum):
    """How documents fill the rows of training."""

    flow = "flow"  # one after another over the ends of rows; no padding, and a row's ends cut documents
    best_fit = "best_fit"  # whole in rows by best fit, with padding; only documents longer than a row are cut


class EngineName(StrEnum):
    """Library that runs forward, backward and the optimizer step."""

    megatron = "megatron"  # megatron-core, with all kinds of parallelism
    deepspeed = "deepspeed"  # DeepSpeed's ZeRO; no pipeline or context parallelism, no FP8


class AdamImpl(StrEnum):
    """Implementation of AdamW."""

    torch = "torch"  # torch's fused AdamW, on a GPU or a CPU; nothing is compiled
    deepspeed = "deepspeed"  # FusedAdam, or CPUAdam with offload_optimizer; compiled on first use, which takes minutes; not beside Muon


class Recompute(StrEnum):
    """Activations that are recomputed in the backward pass to save memory."""

    none = "none"  # nothing
    selective = "selective"  # SwiGLU's output, which is F wide and cheap to recompute; attention is kept
    full = "full"  # whole layers; only their inputs are kept


class LayerSpec(StrEnum):
    """Layers that megatron-core builds the model from."""

    auto = "auto"  # Transformer Engine if it is installed and a GPU is used, otherwise local
    local = "local"  # megatron-core's own layers, without Transformer Engine
    transformer_engine = "transformer_engine"  # Transformer Engine's fused layers; needs a GPU


class PrecisionName(StrEnum):
    """Number format of the matrix products."""

    fp32 = "fp32"  # everything in fp32
    bf16 = "bf16"  # bf16, with fp32 main weights and optimizer states
    fp8 = "fp8"  # FP8 in the linear layers, through Transformer Engine; the rest as bf16


class Fp8Recipe(StrEnum):
    """How Transformer Engine scales FP8 tensors."""

    tensorwise = "tensorwise"  # by the largest value of the tensor
    delayed = "delayed"  # by the largest values of earlier steps
    blockwise = "blockwise"  # per 128 values, or per 128 x 128 values of a weight


class Schedule(StrEnum):
    """Shape of the learning rate after the warm-up."""

    cosine = "cosine"  # half a cosine wave down to min_lr
    linear = "linear"  # straight down to min_lr
    constant = "constant"  # stays at its peak
    wsd = "wsd"  # stays at its peak, then goes down to min_lr over the last optim.decay_fraction of all steps


class Shape(StrEnum):
    """How the learning rate goes from the start of a piece to its end."""

    linear = "linear"  # in equal steps
    cosine = "cosine"  # half a cosine wave
    sqrt = "sqrt"  # by the square root of the progress: fast at first (arXiv 2405.18392)
    constant = "constant"  # is at its end from its start on


class OptimizerName(StrEnum):
    """Optimizer of the weights."""

    adamw = "adamw"  # AdamW for all weights
    muon = "muon"  # Muon for the matrices of the layers, AdamW for embedding, output layer and norms


class MuonScale(StrEnum):
    """Size of Muon's update of a matrix with r rows and c columns, in units of the learning rate."""

    match_rms_adamw = "match_rms_adamw"  # 0.2 * sqrt(max(r, c)): AdamW's usual size, so that its learning rate fits
    original = "original"  # sqrt(max(1, r / c)): the spectral norm; its learning rates are near 0.02


class WandbMode(StrEnum):
    """Where Weights & Biases sends the metrics."""

    online = "online"  # to its server
    offline = "offline"  # to disk; `wandb sync` uploads them later
    off = "off"  # nowhere


class Timestamps(StrEnum):
    """Time stamp before every console line."""

    off = "off"
    time = "time"  # 14:05:31, local time
    datetime = "datetime"  # 2026-11-29 14:05:31


class Haystack(StrEnum):
    """The text around a needle."""

    noise = "noise"  # the same few sentences, repeated
    heldout = "heldout"  # text of the dataset's held-out split


class Auto(StrEnum):
    """The word that stands for a number which the run chooses."""

    auto = "auto"
