"""A rank of test_ema.py: trains three steps on each layout and engine, saves the running mean of the weights, and loads it on another layout.

Arguments: a JSON file with the cases, name -> [settings, those that load], and the folder for results. Each case leaves `NAME` as a checkpoint, `NAME.snapshot` as its copy from host memory, and `NAME.again` as the mean
after it was loaded into the next layout; rank 0 writes NAME.json with what the held-out rows cost with and without the mean.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from ssa_pretrain.config import Config
from ssa_pretrain.engine import build_engine
from ssa_pretrain.parallel.state import Placement, start
from support.layout_worker import LENGTH, VOCAB, batches, configure

COMMON = {
    "model.num_layers": 2,
    "training.global_batch_tokens": 4 * LENGTH,
    "optim.ema_decay": 0.25,
    "optim.clip_grad": 0.5,
}


def main(cases: dict, out: Path) -> None:
    """Runs the cases in order."""
    for name, (settings, others) in cases.items():
        config = configure(COMMON | settings)
        with_layout(config, lambda placement, n=name, c=config: train(n, c, placement, out))
        other = configure(COMMON | others)
        with_layout(other, lambda placement, n=name, c=other: load(n, c, placement, out))


def with_layout(config: Config, act) -> None:
    """Calls a function with the process groups of a layout."""
    act(start(config.parallel, seed=1))
    dist.barrier()
    parallel_state.destroy_model_parallel()


def train(name: str, config: Config, placement: Placement, out: Path) -> None:
    """Trains, evaluates with and without the mean, and saves both ways."""
    engine = build_engine(config, placement, VOCAB)
    for step in range(3):
        own = batches(config, placement.dp_rank, placement.dp, step)
        engine.train_step(own, step=step, learning_rate=1e-2).result()
    held_out, losses = batches(config, placement.dp_rank, placement.dp, 99), []
    for _ in range(2):
        losses.append(engine.evaluate(held_out, mode="full").cross_entropy)
        with engine.ema_weights():
            losses.append(engine.evaluate(held_out, mode="full").cross_entropy)
    write(out / name, engine.save)
    snapshot, group = engine.snapshot(weights=True), dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    write(out / f"{name}.snapshot", lambda folder: snapshot.write(folder, group))
    if placement.is_rank_0:
        (out / f"{name}.json").write_text(json.dumps(losses))


def load(name: str, config: Config, placement: Placement, out: Path) -> None:
    """Loads the mean into an engine of another layout, and saves it from there."""
    engine = build_engine(config, placement, VOCAB)
    ds = getattr(engine, "ds", None)  # building it builds the mean
    models = [ds.module] if ds else getattr(engine, "models")  # noqa: B009
    getattr(engine, "_mean" if ds else "mean").load(out / name, models, placement)
    write(out / f"{name}.again", engine.save)


def write(folder: Path, act) -> None:
    """Calls a function of every rank with a new folder."""
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    act(folder)
    dist.barrier()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
