"""One process of test_replicas.py: trains small cases on their layouts, with and without comparisons, and flips one bit of one weight on one rank.

Arguments: a JSON file with the cases (name -> configuration overrides) and the folder for results. Each case trains three times from the same weights:
without comparisons, with them, and with a flipped bit. Every rank writes the metrics and the messages.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ssa_pretrain.checkpoint.sharded_weights import named_weights
from ssa_pretrain.config import Config
from ssa_pretrain.engine import build_engine
from ssa_pretrain.errors import ReplicaError
from ssa_pretrain.parallel.state import Placement
from support.layout_worker import VOCAB, batches, run_cases

STEPS, FLIPPED_IN = 4, 2
ON_LAST = ("alone", "pp2", "zero3")  # cases in which the last rank's bit flips, not the first one's
WEIGHT = "decoder.final_layernorm.weight"


def models_of(engine) -> list[torch.nn.Module]:
    return engine.models if hasattr(engine, "models") else [engine.ds.module]


def flip_bit(engine, config: Config) -> None:
    """Flips the lowest bit of the last element of a weight: in fp32, a relative change of 1e-7.

    That happens after the forward, which may gather the weights anew.
    """
    weight = dict(named_weights(models_of(engine), config, tied_copies=True))[WEIGHT]
    with torch.no_grad():
        bits = weight.view(torch.int32 if weight.element_size() == 4 else torch.int16)
        bits[-1] ^= 1


def train(config: Config, placement: Placement, interval: int, flipping_rank: int | None) -> dict:
    """Returns the metrics of each step, and how the run ended."""
    config = replace(config, training=replace(config.training, replica_check_interval=interval))
    engine, found = build_engine(config, placement, VOCAB), []
    compare = engine.replicas.compare

    def flip_and_compare(named, step):
        if step == FLIPPED_IN and placement.rank == flipping_rank:
            flip_bit(engine, config)
        return compare(named, step)

    engine.replicas.compare = flip_and_compare
    for step in range(STEPS):
        mine = batches(config, placement.dp_rank, placement.dp, step)
        result = engine.train_step(mine, step=step, learning_rate=1e-2).result()
        found.append([result.cross_entropy, result.grad_norm, *result.alignment_by_layer])
        assert (result.differing_weights is not None) == engine.replicas.is_due(step) or step == 0
        if result.differing_weights is not None:
            try:
                engine.replicas.require_equal(result.differing_weights, step)
            except ReplicaError as error:
                return {"metrics": found, "step": step, "error": str(error), "code": error.exit_code}
    return {"metrics": found}


def run_case(name: str, config: Config, placement: Placement, out: Path) -> None:
    """Runs one case and writes what this rank saw."""
    interval = config.training.replica_check_interval
    flipping_rank = placement.world_size - 1 if name in ON_LAST else 0
    seen = {
        "off": train(config, placement, 0, None),
        "on": train(config, placement, interval, None),
        "flipped": train(config, placement, interval, flipping_rank),
    }
    (out / f"{name}.{placement.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run_cases(run_case)
