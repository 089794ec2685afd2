"""The health of a training run: skipped steps are counted, loss spikes are found, and weights are checked before they are published.

An optimizer step with a loss or gradient norm that is not finite is skipped on all ranks by the engine. Here such steps are counted. Too many in a row
end the run, before anything else is published. The counts and the windows of the spike detector belong to the state of a run: each checkpoint has
them in `health.json`, so a resumed run judges as one that was never interrupted. Every rank judges the same results and comes to the same verdicts.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ssa_pretrain.config import TrainingConfig
from ssa_pretrain.engine import Engine, StepResult
from ssa_pretrain.errors import DivergedError
from ssa_pretrain.monitor.spikes import Spike, SpikeDetector

FILE_NAME = "health.json"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is remarkable about a step.

    Attributes:
        record: additions to the step's record in metrics.jsonl; empty for a normal step.
        line: for the console; empty likewise.
        spike: the loss spike, if it is one.
    """

    record: dict[str, Any] = field(default_factory=dict)
    line: str = ""
    spike: Spike | None = None


class Health:
    """The state between steps.

    Args:
        training: `max_skipped_steps` and `spike_threshold`.

    Attributes:
        skipped: skipped steps since the start of the run.
        skipped_in_a_row: of these, the ones that directly precede the next step.
    """

    def __init__(self, training: TrainingConfig) -> None:
        self._most_in_a_row = training.max_skipped_steps
        self._spikes = SpikeDetector(training.spike_threshold)
        self.skipped = self.skipped_in_a_row = 0

    def judge(self, result: StepResult, step: int) -> Verdict:
        """Returns the verdict on a step and adds the step to the state; call it once for each trained step, in order."""
        if result.was_skipped:
            return self._skipped(result, step)
        self.skipped_in_a_row = 0
        spike = self._spikes.judge(result.cross_entropy_by_stream)
        if spike is None:
            return Verdict()
        record = {"spike": spike.stream, "spike_cross_entropy": spike.value, "spike_deviations": spike.distance}
        line = (
            f"spike at step {step}: {spike.stream} cross entropy {spike.value:.3f} is {spike.distance:.0f} deviations ({spike.deviation:.3f}) above "
            f"the median {spike.median:.3f} of the steps before"
        )
        return Verdict(record, line, spike)

    def require_progress(self, result: StepResult, step: int, folder: Path) -> None:
        """Ends the run, on every rank, if too many steps in a row were skipped.

        Args:
            result: of the step that was judged last.
            step: its number.
            folder: the run's, for the message.

        Raises:
            DivergedError: this step was skipped as the last one that is allowed, or it was not skipped although its loss is not finite.
        """
        values = f"cross entropy {result.cross_entropy:g} and gradient norm {result.grad_norm:g}"
        advice = (
            f"The same command trains again from the newest checkpoint in {folder}; lower optim.lr, lengthen the warm-up (optim.warmup_fraction), "
            "leave out the data with training.skip_steps, or start from an earlier checkpoint with checkpoint.init_from"
        )
        if result.was_skipped and self.skipped_in_a_row >= max(1, self._most_in_a_row):
            count = self.skipped_in_a_row
            which = f"{count} steps in a row were skipped" if count > 1 else "this step was one too many"
            raise DivergedError(
                f"step {step} has {values}: training has diverged, {which} (training.max_skipped_steps={self._most_in_a_row}), and nothing "
                f"more is saved. {advice}"
            )
        if not result.was_skipped and not math.isfinite(result.cross_entropy):
            raise DivergedError(
                f"step {step} has {values}: training has diverged, and this step was not saved. {advice}"
            )

    def text(self) -> str:
        """Returns the state as the content of a checkpoint's `health.json`."""
        state = {
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "cross_entropies": self._spikes.windows,
        }
        return json.dumps(state, indent=1)

    def load(self, folder: Path) -> None:
        """Restores the state from a checkpoint's folder. A checkpoint of an earlier version has none: then the counts begin at 0."""
        path = folder / FILE_NAME
        state = json.loads(path.read_text()) if path.is_file() else {}
        self.skipped = state.get("skipped", 0)
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        self._spikes.windows = {stream: list(values) for stream, values in state.get("cross_entropies", {}).items()}

    def _skipped(self, result: StepResult, step: int) -> Verdict:
        self.skipped += 1
        self.skipped_in_a_row += 1
        line = (
            f"step {step} skipped on all ranks: cross entropy {result.cross_entropy:g}, gradient norm {result.grad_norm:g}; weights unchanged "
            f"({self.skipped_in_a_row} in a row, {self.skipped} in all)"
        )
        return Verdict({"skipped": True, "skip_reason": "not finite"}, line)


def require_finite_weights(engine: Engine, step: int) -> None:
    """Refuses to publish weights or moments that are not finite; every rank calls it, and all ranks come to the same end. Waits for the device.

    Raises:
        DivergedError: some rank has such values.
    """
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, engine.first_not_finite())
    bad = [(rank, name) for rank, name in enumerate(names) if name]
    if bad:
        rank, name = bad[0]
        more = f" and on {len(bad) - 1} more ranks" if len(bad) > 1 else ""
        raise DivergedError(
            f"step {step} is not published: {name} on rank {rank}{more} has values that are not finite. Earlier checkpoints are unchanged; the same "
            "command trains again from the newest of them"
        )
