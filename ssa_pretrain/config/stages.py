"""How the layers are split over the stages of a pipeline."""

from ssa_pretrain.config.schema import Config


def layers_per_stage(config: Config) -> tuple[int, int]:
    """Returns the layers of each stage but the last, and those of the last; without a pipeline both are all layers."""
    layers, parallel = config.model.num_layers, config.parallel
    if parallel.pp == 1:
        return layers, layers
    last = parallel.layers_on_last_stage or layers // parallel.pp
    return (layers - last) // (parallel.pp - 1), last
