"""ssa_pretrain/health.py: counts of skipped steps, their limit, the state in a checkpoint, and what the user is told."""

import math

import pytest

from ssa_pretrain.config import TrainingConfig
from ssa_pretrain.engine import StepResult
from ssa_pretrain.errors import DivergedError, ExitCode
from ssa_pretrain.health import FILE_NAME, Health


def result(cross_entropy: float = 2.0, norm: float = 1.0) -> StepResult:
    """Returns the result of a step with one stream."""
    return StepResult(cross_entropy, [], [], norm, 1.0, {"full": cross_entropy})


def test_skipped_steps_are_counted_in_all_and_in_a_row():
    health = Health(TrainingConfig(max_skipped_steps=3))
    found = []
    for norm in (1.0, math.nan, math.inf, 1.0, math.nan):
        verdict = health.judge(result(norm=norm), len(found) + 1)
        found.append((bool(verdict.record.get("skipped")), health.skipped, health.skipped_in_a_row))
    assert found == [(False, 0, 0), (True, 1, 1), (True, 2, 2), (False, 2, 0), (True, 3, 1)]
    assert verdict.line == (
        "step 5 skipped on all ranks: cross entropy 2, gradient norm nan; weights unchanged (1 in a row, 3 in all)"
    )


@pytest.mark.parametrize(("most", "allowed"), [(0, 0), (1, 0), (2, 1), (10, 9)])
def test_too_many_in_a_row_end_the_run(tmp_path, most, allowed):
    health = Health(TrainingConfig(max_skipped_steps=most))
    for step in range(1, allowed + 2):
        bad = result(norm=math.nan)
        assert health.judge(bad, step).record == {"skipped": True, "skip_reason": "not finite"}
        if step <= allowed:
            health.require_progress(bad, step, tmp_path)
    with pytest.raises(DivergedError, match=f"step {allowed + 1} has .*gradient norm nan") as caught:
        health.require_progress(bad, step, tmp_path)
    assert caught.value.exit_code == ExitCode.DIVERGED and f"training.max_skipped_steps={most}" in str(caught.value)


def test_loss_that_is_not_finite_ends_the_run_if_the_step_was_taken(tmp_path):
    health, bad = Health(TrainingConfig()), result(math.nan)
    health.judge(bad, 1)
    with pytest.raises(DivergedError, match="this step was not saved"):
        health.require_progress(bad, 1, tmp_path)


def test_state_of_a_checkpoint_continues_the_judgement(tmp_path):
    """After any step, a run that continues from the saved state judges as the one that wrote it."""
    settings = TrainingConfig(max_skipped_steps=50)
    values = [(3.0 + 0.01 * (i % 5), math.nan if i in (7, 8, 30, 41) else 1.0) for i in range(40)]
    values += [(9.0, 1.0), (3.0, 1.0), (3.0, math.inf), (8.0, 1.0)]
    whole = Health(settings)
    verdicts = [whole.judge(result(*pair), step) for step, pair in enumerate(values, 1)]
    assert [step for step, verdict in enumerate(verdicts, 1) if verdict.spike] == [41, 44]
    for cut in (8, 9, 31, 40, 41, 43):
        first, second = Health(settings), Health(settings)
        for step, pair in enumerate(values[:cut], 1):
            first.judge(result(*pair), step)
        (tmp_path / "health.json").write_text(first.text())
        second.load(tmp_path)
        assert [second.judge(result(*pair), step) for step, pair in enumerate(values[cut:], cut + 1)] == verdicts[cut:]
        assert (second.skipped, second.skipped_in_a_row) == (whole.skipped, whole.skipped_in_a_row)


def test_checkpoint_without_state_begins_at_zero(tmp_path):
    health = Health(TrainingConfig())
    health.judge(result(norm=math.nan), 1)
    assert not (tmp_path / FILE_NAME).exists()
    health.load(tmp_path)
    assert (health.skipped, health.skipped_in_a_row) == (0, 0)


def test_spike_is_recorded_and_described():
    health = Health(TrainingConfig(spike_threshold=8.0))
    for step in range(1, 41):
        assert health.judge(result(), step).record == {}
    verdict = health.judge(result(20.0), 41)
    assert verdict.record == {"spike": "full", "spike_cross_entropy": 20.0, "spike_deviations": pytest.approx(450.0)}
    assert verdict.line == (
        "spike at step 41: full cross entropy 20.000 is 450 deviations (0.040) above the median 2.000 of the steps before"
    )
