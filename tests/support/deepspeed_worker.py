"""One process of DeepSpeed's tests: runs a list of small jobs on two engines, layout by layout, and writes their results.

Arguments: a JSON file with the jobs in order and the folder for results. A job is {"name", "do", "set", …} with `set` the configuration's overrides:

    train    steps [0, stop) on a new engine, then both held-out evaluations; `save`: checkpoints into a folder after step `save_at`
    resume   load the folder `from`, then steps [first, stop)
    weights  load the weights of the folder `from`, then both evaluations and last_logits
    mean     steps [0, stop) on a new engine, then the norm of the running mean of each weight
    uneven   evaluate where the last data rank has no microbatch

After each job every process group, including DeepSpeed's, must have the configured timeout. All jobs of one layout share its process groups, and all
jobs of one world size share its processes: starting them costs more than the steps.
"""

import itertools
import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ssa_pretrain.config import EngineName
from ssa_pretrain.engine import build_engine
from ssa_pretrain.parallel.state import Placement, start
from support.layout_worker import LENGTH, VOCAB, batches, by_part, configure, free_memory

SMALL = {
    "model.num_layers": 2,
    "training.micro_batch_size": 2,
    "training.global_batch_tokens": 8 * LENGTH,
    "optim.clip_grad": 0.5,  # the norms are about 1.1
    "parallel.timeout_minutes": 7.0,
}


def train(engine, config, placement: Placement, steps: range) -> list[list[float]]:
    """Returns each step's results."""
    found = []
    for step in steps:
        mine = batches(config, placement.dp_rank, placement.dp, step)
        begin = time.monotonic()
        pending = engine.train_step(mine, step=step, learning_rate=1e-2)
        result = pending.result()
        by_part(result, batches(config, 0, 1, step))
        assert 0 < pending.own_seconds() < time.monotonic() - begin
        by_layer = (*result.alignment_by_layer, *result.captured_mass_by_layer, *result.index_loss_by_layer)
        found.append([result.cross_entropy, result.grad_norm, *by_layer])
    return found


def held_out_metrics(engine, mine) -> list[list[float]]:
    """Returns the held-out metrics of both modes, with 1 in place of the gradient norm."""
    found = []
    for mode in ("full", "sparse"):
        result = engine.evaluate(mine, mode=mode)
        found.append([result.cross_entropy, 1.0, *result.alignment_by_layer, *result.captured_mass_by_layer])
    return found


def logits(engine, config) -> list[list[float]]:
    """Returns the last tokens' logits in the sparse stream."""
    return [engine.last_logits(batches(config, 0, 1, 99)[0], mode="sparse").float().flatten().tolist()]


def save(engine, folder: Path) -> None:
    """Writes a checkpoint like the trainer."""
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    engine.save(folder)
    engine.save_weights(folder)


def run(job: dict, placement: Placement, out: Path) -> list[list[float]]:
    """Runs one job and return its results."""
    config = configure(SMALL | job["set"] | {"output_dir": str(out / "run")})  # where a checkpoint is reshaped
    engine = build_engine(config, placement, VOCAB)
    held_out = batches(config, placement.dp_rank, placement.dp, 99, num_rows=4)
    if job["do"] == "train":
        found = train(engine, config, placement, range(job.get("save_at", job["stop"])))
        if "save_at" in job:
            save(engine, out / f"{job['name']}.checkpoint")
            found += train(engine, config, placement, range(job["save_at"], job["stop"]))
        found += held_out_metrics(engine, held_out)
        return found
    if job["do"] == "resume":
        engine.load(out / f"{job['from']}.checkpoint")
        return train(engine, config, placement, range(job["first"], job["stop"])) + held_out_metrics(engine, held_out)
    if job["do"] == "mean":
        train(engine, config, placement, range(job["stop"]))
        mean = engine.mean if config.engine.name is EngineName.megatron else engine._mean
        models = engine.models if config.engine.name is EngineName.megatron else [engine.model]
        return [[float(mean.of(p).norm()) for model in models for p in model.parameters()]]
    if job["do"] == "weights":
        engine.load_weights(out / f"{job['from']}.checkpoint")
        return held_out_metrics(engine, held_out) + logits(engine, config)
    return held_out_metrics(engine, held_out if placement.dp_rank < placement.dp - 1 else [])


def timeouts() -> set[timedelta]:
    """Returns how long this rank waits for the others, over all its process groups."""
    groups = list(dist.distributed_c10d._world.pg_map)
    return {group._get_backend(group._device_types[0]).options._timeout for group in groups}


def main() -> None:
    """Runs the jobs in order."""
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for _, group in itertools.groupby(jobs, key=lambda job: repr(configure(SMALL | job["set"]).parallel)):
        chosen = list(group)
        placement = start(configure(SMALL | chosen[0]["set"]).parallel, seed=1)
        for job in chosen:
            found = run(job, placement, out)
            (out / f"{job['name']}.{placement.rank}.json").write_text(json.dumps(found))
            free_memory()
            assert timeouts() == {timedelta(minutes=7)}, (job, timeouts())
            torch.distributed.barrier()
        parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    main()
