"""Transformer Engine's user buffers: tensor-parallel gathers and scatters split up and run beside the matrix products that need them.

The buffers belong to the process and have one shape, a microbatch's hidden states; they are made once, before the first layer runs. Transformer
Engine refuses by itself where the GPUs cannot reach each other's memory, and says what to set.
"""

from ssa_pretrain.config import Config, PrecisionName


def start_user_buffers(config: Config) -> None:
    """Make the buffers for a run's microbatches; every rank calls it, after the process groups exist."""
    from transformer_engine.pytorch import initialize_ub

    tokens = config.training.micro_batch_size * config.data.sequence_length
    initialize_ub(
        [tokens, config.model.hidden_size],
        config.parallel.tp,
        use_fp8=config.precision.name is PrecisionName.fp8,
        bootstrap_backend="nccl",
    )
