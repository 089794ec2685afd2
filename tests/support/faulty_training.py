"""Trains for real, with faults in chosen steps: `faulty_training.py FAULTS OVERRIDES…`, where FAULTS is JSON.

    nan       {"steps": [3], "rank": 1}: one gradient of one weight of this rank is NaN in these steps; "value": "inf" for infinity
    loss      likewise: the cross entropies of the first tokens of this rank are infinite, without a gradient of their own
    spike     {"steps": [40], "factor": 10.0, "stream": "sparse"}: cross entropies of microbatches with this main stream are larger
    weights   {"step": 5, "rank": 0}: a weight of this rank is NaN after this step
    stop      {"step": 11, "rank": 1, "file": FILE}: this rank writes its process id to FILE and stops (SIGSTOP) before this step, unless FILE exists
    finish    60.0: seconds that a tracker's process has at the end of the run
    deterministic    true: torch's deterministic mode, in which memory that nobody has written holds NaN
    states    FILE: after each step, a JSON line is appended to FILE.RANK: the step, the digest of this rank's weights, and that of its weights,
              moments and step counts

Steps count from 1. The faults enter where real ones do: gradients in a hook of the backward, losses in the model's output.
"""

import hashlib
import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ssa_pretrain.config import EngineName
from ssa_pretrain.engine.step import Microbatches
from ssa_pretrain.engine.step_sums import StepSums


def models_of(engine: Any) -> list[torch.nn.Module]:
    """Returns this rank's models."""
    return engine.models if engine.config.engine.name is EngineName.megatron else [engine.model]


def digests(engine: Any) -> tuple[str, str]:
    """Returns digests of every bit of this rank's weights, and of its weights, moments and step counts."""
    if engine.config.engine.name is EngineName.megatron:
        from ssa_pretrain.engine.megatron.checkpoint import inner_optimizers

        inner = inner_optimizers(engine.optimizer)
    else:
        inner = [engine.ds.basic_optimizer]
    weights = [getattr(p, "ds_tensor", p) for model in models_of(engine) for p in model.parameters()]
    tensors = list(weights)
    for optimizer in inner:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        # In the order of the weights and names, which loading does not keep. A state that is not there yet is one of zeros.
        states = (state for p in held for _, state in sorted(optimizer.state.get(p, {}).items()))
        tensors += held + [state for state in states if isinstance(state, torch.Tensor) and state.any()]
    return digest(weights), digest(tensors)


def digest(tensors: list[torch.Tensor]) -> str:
    """Returns the sha256 of tensors' bytes."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def install(faults: dict[str, Any]) -> None:
    """Patches the engines' shared step and the trainer with the faults."""
    rank, now = int(os.environ.get("RANK", "0")), {"step": 0}
    begin, loss = Microbatches.begin_step, StepSums.loss

    def begin_step(self, batches, step):
        now["step"] = step + 1
        return begin(self, batches, step)

    def is_here(name: str) -> bool:
        fault = faults.get(name, {})
        return now["step"] in fault.get("steps", ()) and fault.get("rank", rank) == rank

    def faulty_loss(self, losses, batch, main):
        if not losses.requires_grad:  # an evaluation
            return loss(self, losses, batch, main)
        if is_here("loss"):
            extra = torch.zeros_like(losses)
            extra[..., :8] = torch.inf
            batch, losses = replace(batch, loss_mask=torch.ones_like(batch.loss_mask)), losses + extra
        if is_here("spike") and faults["spike"].get("stream", main) == main:
            losses = losses * faults["spike"]["factor"]
        return loss(self, losses, batch, main)

    Microbatches.begin_step, StepSums.loss = begin_step, faulty_loss

    import ssa_pretrain.trainer as trainer
    from ssa_pretrain.monitor import client_tracker

    client_tracker.FINISH_SECONDS = faults.get("finish", client_tracker.FINISH_SECONDS)
    train_step, hooked = trainer.train_step, []

    def faulty_gradient(grad):
        if is_here("nan"):
            grad = grad.clone()
            grad.view(-1)[0] = float(faults["nan"].get("value", "nan"))
        return grad

    def train_step_and_record(run, step):
        if (stop := faults.get("stop")) and (stop["step"], stop["rank"]) == (step + 1, rank):
            with suppress(FileExistsError), Path(stop["file"]).open("x") as file:
                file.write(str(os.getpid()))
                file.close()
                os.kill(os.getpid(), signal.SIGSTOP)
        weight = list(models_of(run.engine)[-1].parameters())[-1]
        if not any(weight is other for other in hooked):
            hooked.append(weight)
            weight.register_hook(faulty_gradient)
        queued = train_step(run, step)
        if queued.pending is not None:
            queued.pending.result()
        if (bad := faults.get("weights")) and bad["step"] == step + 1 and bad["rank"] == rank:
            with torch.no_grad():
                next(iter(models_of(run.engine)[0].parameters())).view(-1)[0] = torch.nan
        if "states" in faults:
            with Path(f"{faults['states']}.{rank}").open("a") as file:
                file.write(json.dumps([step + 1, *digests(run.engine)]) + "\n")
        return queued

    trainer.train_step = train_step_and_record


if __name__ == "__main__":
    chosen = json.loads(sys.argv[1])
    torch.use_deterministic_algorithms(chosen.get("deterministic", False))
    install(chosen)
    from ssa_pretrain.train import main

    sys.argv = ["train", *sys.argv[2:]]
    main()
