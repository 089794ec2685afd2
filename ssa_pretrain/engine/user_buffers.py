"""Transformer Engine's user buffers: tensor-parallel gathers and scatters split up and run beside the matrix products that need them.

The buffers belong to the process and have one shape, a microbatch's hidden states; an engine makes them before its first layer runs, in the place
of an earlier engine's. Transformer Engine refuses by itself where the GPUs cannot reach each other's memory, and says what to set.
"""

from ssa_pretrain.config import Config, PrecisionName


def start_user_buffers(config: Config) -> None:
    """Make the buffers for a run's microbatches; every rank calls it, after the process groups exist."""
    from transformer_engine.pytorch import UserBufferQuantizationMode, destroy_ub, initialize_ub

    tokens = config.training.micro_batch_size * config.data.sequence_length
    low = config.precision.name is PrecisionName.fp8
    destroy_ub()
    initialize_ub(
        [tokens, config.model.hidden_size],
        config.parallel.tp,
        quantization_modes=[UserBufferQuantizationMode.FP8 if low else UserBufferQuantizationMode.NONE],
        bootstrap_backend="nccl",
    )
