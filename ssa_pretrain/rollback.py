"""Goes back to a checkpoint after a loss spike and leaves out the data before it (`training.rollback_on_spike`).

The remedy of PaLM (arXiv 2204.02311, section 5.1): train again from a checkpoint before the spike, without the batches around it. The run goes back to
its newest intact checkpoint. The `training.rollback_window` steps that end with the spike are left out then, as far as they come after that checkpoint
(step_ranges.py). An incident record in the run's folder keeps the decision (incidents.py). The result is that of a run with the same range in
`training.skip_steps`.

A run without a checkpoint continues instead. If the checkpoints get no newer, spikes have another cause than these data: after MOST rollbacks to
one checkpoint the run ends.
"""

import time

import torch.distributed as dist

from ssa_pretrain.errors import DataError, DivergedError
from ssa_pretrain.incidents import ROLLED_BACK, WENT_ON, Incident, read_incidents, write_incident
from ssa_pretrain.monitor.spikes import Spike
from ssa_pretrain.parallel.agreement import on_rank_0
from ssa_pretrain.resume import newest_checkpoint
from ssa_pretrain.run import Run

MOST = 5  # rollbacks to one checkpoint


def load_incidents(run: Run) -> None:
    """Reads the incidents of the run's folder, which decide the steps that it leaves out; every rank calls it.

    Raises:
        DataError: on every rank, if a record cannot be read.
    """

    def read() -> list[Incident]:
        try:
            return read_incidents(run.folder)
        except ValueError as error:
            raise DataError(str(error)) from error

    found = [on_rank_0(read, is_rank_0=run.placement.is_rank_0, errors=(DataError,))]
    dist.broadcast_object_list(found, src=0)
    run.incidents = found[0] or []


def roll_back(run: Run, spike: Spike, step: int) -> bool:
    """Decides on a spike and records the decision; every rank calls it.

    Args:
        run: its `incidents` get the new one.
        spike: the spike.
        step: its step, from 1.

    Returns:
        Whether the run goes back; then it must be restored from its newest checkpoint.

    Raises:
        CheckpointError: there are checkpoints, but none is intact.
        DivergedError: the run has gone back to this checkpoint MOST times.
    """
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        incident = _incident(run, spike, step, 0, "the run has no checkpoint yet")
    else:
        incident = _incident(run, spike, step, checkpoint.step)
        earlier = [i for i in run.incidents if i.decision == ROLLED_BACK and i.checkpoint_step == checkpoint.step]
        if len(earlier) >= MOST:
            raise DivergedError(
                f"step {step} has a loss spike ({spike.stream} cross entropy {spike.value:g}, median {spike.median:g}), and the run has gone back to "
                f"{checkpoint.folder} {MOST} times: the data are not the cause. Lower optim.lr or raise training.spike_threshold"
            )
    run.incidents = [*run.incidents, incident]
    if run.placement.is_rank_0:
        path = write_incident(run.folder, incident)
        run.print(_sentence(incident) + f"; {path} has the record")
    return incident.decision == ROLLED_BACK


def _incident(run: Run, spike: Spike, step: int, checkpoint_step: int, reason: str = "") -> Incident:
    """Returns the record of a spike; `reason` is why the run continues."""
    first = max(checkpoint_step + 1, step - run.config.training.rollback_window + 1)
    return Incident(
        step=step,
        stream=spike.stream,
        cross_entropy=spike.value,
        median=spike.median,
        deviation=spike.deviation,
        threshold=run.config.training.spike_threshold,
        decision=WENT_ON if reason else ROLLED_BACK,
        reason=reason,
        checkpoint_step=checkpoint_step,
        skipped_steps=[] if reason else [first, step],
        skipped_rows=[] if reason else [run.plan.rows_before(first - 1), run.plan.rows_before(step) - 1],
        time=time.time(),
    )


def _sentence(incident: Incident) -> str:
    """Returns the decision as a line for the user."""
    if incident.decision == WENT_ON:
        return f"no rollback after the spike at step {incident.step}: {incident.reason}"
    first, last = incident.skipped_steps
    return f"rollback after the spike at step {last}: back to step {incident.checkpoint_step}, without the data of steps {first} to {last}"
