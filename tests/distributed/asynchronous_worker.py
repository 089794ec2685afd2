"""A rank of test_asynchronous.py.

Arguments: what to do, then a folder.

    content CASES   for each case of a JSON object: train, copy the state, save it, go on training while the copy is written; then load it and
                    train again
    failure         rank 1 cannot write a save in the background
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ssa_pretrain.checkpoint.background import BackgroundSave
from ssa_pretrain.checkpoint.publish import publish
from ssa_pretrain.engine import build_engine
from ssa_pretrain.errors import CheckpointError
from ssa_pretrain.parallel.state import start
from support.layout_worker import LENGTH, VOCAB, batches, configure

SMALL = {"model.num_layers": 2, "training.micro_batch_size": 2, "training.global_batch_tokens": 8 * LENGTH}


def train(engine, config, placement, steps: range) -> list[list[float]]:
    """Returns each step's loss and norm."""
    found = []
    for step in steps:
        mine = batches(config, placement.dp_rank, placement.dp, step)
        result = engine.train_step(mine, step=step, learning_rate=1e-2).result()
        found.append([result.cross_entropy, result.grad_norm])
    return found


def write_after(event: threading.Event, write: Callable, *arguments: object) -> None:
    """Waits, then writes."""
    event.wait()
    write(*arguments)


def new_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def content(out: Path, settings: dict, group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Writes one state twice, at once and from a copy while training goes on, and what training continues with from each.

    Returns:
        The group of the writing threads, for the next case.
    """
    config = configure(SMALL | settings)
    placement = start(config.parallel, seed=1)
    group = group or new_group()
    if placement.is_rank_0:
        out.mkdir()
    dist.barrier()
    engine = build_engine(config, placement, VOCAB)
    results = {}
    for number in (1, 2):  # the second copy uses the memory of the first
        now, later = out / f"now_{number}", out / f"later_{number}"
        if placement.is_rank_0:
            now.mkdir()
            later.mkdir()
        train(engine, config, placement, range(2 * number - 2, 2 * number))
        snapshot = engine.snapshot(weights=True)
        engine.save(now)
        engine.save_weights(now)
        trained = threading.Event()

        # The live weights have changed when the copy is written.
        save = BackgroundSave(2, partial(write_after, trained, snapshot.write, later, group))
        results[f"live_{number}"] = train(engine, config, placement, range(2 * number, 2 * number + 2))
        trained.set()
        save.wait()
        dist.barrier()
        engine.load(later)
        results[f"loaded_{number}"] = train(engine, config, placement, range(2 * number, 2 * number + 2))
    (out / f"results_{placement.rank}.json").write_text(json.dumps(results))
    dist.barrier()
    parallel_state.destroy_model_parallel()
    return group


def failure(out: Path) -> None:
    """Writes the step after which this rank raises, and the message: the ranks train at different speeds."""
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), new_group()

    def write(folder: Path) -> None:
        if rank == 1:
            raise OSError(28, "No space left on device")
        (folder / f"part_{rank}").write_bytes(bytes(100))

    save = BackgroundSave(1, lambda: publish(out, 1, {}, write, keep=1, is_rank_0=rank == 0, group=group))
    value = torch.zeros(1)
    for step in range(2, 3000):
        dist.all_reduce(value)
        time.sleep(0.02 * rank)
        try:
            save.poll(step)
        except CheckpointError as error:
            (out / f"message_{rank}").write_text(f"{step} {error}")
            dist.barrier()
            return
    raise AssertionError("the failure was not noticed")


def main() -> None:
    """Does one of the two."""
    out = Path(sys.argv[2])
    if sys.argv[1] == "failure":
        failure(out)
        return
    group = None
    for name, settings in json.loads(sys.argv[3]).items():
        group = content(out / name, settings, group)


if __name__ == "__main__":
    main()
