"""An asynchronous checkpoint of a sharded model, and a resume from it on another layout.

The run trains two steps, copies its state and goes on while threads write the copy. Another layout then loads what was written and trains the same
steps again. Reported: how long the device copied, a step beside the writing over a step without it, size and seconds of the save, and how far the
resumed losses are from those of the run that went on.
"""

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.scaling.cases import Case, Size, case_config
from benchmarks.scaling.steps import largest, release, train
from ssa_pretrain.checkpoint.background import BackgroundSave
from ssa_pretrain.engine import build_engine
from ssa_pretrain.parallel.state import Placement, reset_layout, start

BEFORE, AFTER = 2, 3  # steps


def save_and_resume(
    case: Case, size: Size, placement: Placement, host_gpus: int, folder: Path
) -> tuple[list[dict[str, Any]], Placement]:
    """Returns the results, and this process's placement on the layout that resumed.

    Args:
        case: the layout that saves, and in `then` the one that resumes.
        size: the model.
        placement: this process on the first.
        host_gpus: GPUs of the host.
        folder: for the checkpoint, which is removed again.
    """
    config, other = case_config(case, size, host_gpus), case_config(case, size, host_gpus, case.then)
    if placement.is_rank_0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    engine = build_engine(config, placement, config.model.vocab_size)
    before, _ = train(engine, config, placement, range(BEFORE))
    begin = time.perf_counter()
    snapshot = engine.snapshot(weights=True)
    save = BackgroundSave(BEFORE, partial(snapshot.write, folder, group))
    kept, beside = train(engine, config, placement, range(BEFORE, BEFORE + AFTER))
    save.wait()
    written = time.perf_counter() - begin
    _, without = train(engine, config, placement, range(BEFORE + AFTER, BEFORE + AFTER + 2))
    found = {
        "copy_seconds": largest(snapshot.device_seconds(), placement),
        "save_seconds": largest(written, placement),
        "step_beside": largest(min(beside), placement) / largest(min(without), placement),
    }
    dist.barrier()
    found["gib"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**30
    del engine, snapshot, save
    release()
    reset_layout()
    placement = start(other.parallel, seed=other.seed)
    engine = build_engine(other, placement, other.model.vocab_size)
    engine.load(folder)
    resumed, _ = train(engine, other, placement, range(BEFORE, BEFORE + AFTER))
    dist.barrier()
    if placement.is_rank_0:
        shutil.rmtree(folder)
    del engine
    release()
    common = {"case": case.name, "layout": case.layout, "length": case.length, "gpus": case.gpus, "kind": "save"}
    names = {"resumed_on": ", ".join(case.then) or "data parallel", "losses": kept, "resumed_losses": resumed}
    return [common | names | found | {"losses_before": before}], placement
