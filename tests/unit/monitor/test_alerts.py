"""ssa_pretrain/monitor/alerts.py: which events become alerts, and that they reach every tracker once."""

import math
from pathlib import Path

import pytest

from ssa_pretrain.errors import DivergedError, Interrupted
from ssa_pretrain.monitor.alerts import (
    Alert,
    Level,
    StepAlerts,
    failed,
    finished,
    hung,
    restarted,
    save_failed,
    saved_again,
)
from ssa_pretrain.monitor.metrics import MetricsLogger
from ssa_pretrain.monitor.timeline import Timeline, read_timeline


class Recorder:
    """A tracker that keeps what it gets."""

    def __init__(self) -> None:
        self.alerts: list[Alert] = []
        self.records: list[dict] = []
        self.alerts_at_the_end = -1

    def log(self, record: dict) -> None:
        self.records.append(record)

    def alert(self, alert: Alert) -> None:
        self.alerts.append(alert)

    def finish(self) -> None:
        self.alerts_at_the_end = len(self.alerts)


def record(step: int, **more: object) -> dict:
    values = {"loss": 1.0, "cross_entropy": 1.0, "grad_norm": 1.0, "learning_rate": 1e-3}
    return {"step": step, "tokens": 10 * step, **values} | more


SKIPPED = {"skipped": True, "skip_reason": "not finite", "cross_entropy": math.nan, "grad_norm": math.inf}


def logger(folder: Path, tracker: Recorder, resume_step: int = 0) -> MetricsLogger:
    return MetricsLogger(
        folder, total_steps=9, tokens_per_step=10, resume_step=resume_step, trackers=[tracker], interval=100
    )


def test_first_of_a_row_of_skipped_steps_is_an_alert(tmp_path: Path) -> None:
    tracker = Recorder()
    with logger(tmp_path, tracker) as log:
        for step in (1, 2, 3, 4, 5):
            log.log_step(record(step, **(SKIPPED if step in (2, 3, 5) else {})))
    assert [(alert.title, alert.step, alert.level) for alert in tracker.alerts] == [
        ("not finite", 2, Level.warning),
        ("not finite", 5, Level.warning),
    ]
    assert "cross entropy nan, gradient norm inf" in tracker.alerts[0].text
    again = Recorder()
    with logger(tmp_path, again, resume_step=5):
        assert len(again.records) == 5 and again.alerts == [], "a restart repeats the records, not the alerts"


def test_spikes_are_alerts_and_steps_that_are_left_out_are_not() -> None:
    alerts = StepAlerts()
    assert alerts.judge(record(1, skipped=True, skip_reason="rollback", cross_entropy=None)) is None
    found = alerts.judge(record(2, spike="sparse", spike_cross_entropy=9.0, spike_deviations=11.6))
    assert found is not None and found.text.startswith("step 2: sparse cross entropy 9.000 is 12 deviations")


def test_error_that_ends_a_run_is_an_alert_before_the_tracker_ends(tmp_path: Path) -> None:
    tracker = Recorder()
    with pytest.raises(DivergedError), logger(tmp_path, tracker) as log:
        log.log_step(record(1))
        raise DivergedError("step 2 has\ncross entropy nan")
    (alert,) = tracker.alerts
    assert (alert.title, alert.level) == ("failed", Level.error)
    assert alert.text == "DivergedError: step 2 has cross entropy nan" and tracker.alerts_at_the_end == 1


def test_a_stop_on_request_is_no_failure() -> None:
    assert failed(Interrupted("SIGTERM: stopped after step 3")).level is Level.info
    assert failed(KeyError()).text == "KeyError: KeyError"


def test_finish_and_stop_at_a_step_have_other_titles() -> None:
    assert finished(10, 10, 1_000_000, 3700).text == "step 10 of 10, 1.00M tokens, 1h01m"
    assert [finished(step, 10, 1, 1).title for step in (10, 5)] == ["finished", "stopped"]


def test_report_of_a_hang_is_cut_to_what_mail_and_chat_take() -> None:
    alert = hung("hang: rank 1 does not move\n" + "x" * 5000)
    assert alert.level is Level.error and alert.text.startswith("hang: rank 1") and len(alert.text) == 2000


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (None, "was killed"),
        ("hung", "hung"),
        ("RuntimeError", "ended by RuntimeError"),
        ("finished", ""),
        ("rolled back", ""),
    ],
)
def test_start_after_a_kill_or_a_hang_reports_the_one_before(tmp_path: Path, how: str | None, says: str) -> None:
    timeline = Timeline(tmp_path, now=lambda: 1000.0)
    timeline.begin(0, began=999.0)
    timeline.enter("saving", 14)
    if how:
        timeline.end(how, 14)
    alert = restarted(read_timeline(tmp_path), 10, 1090.0)
    if not says:
        assert alert is None
        return
    assert alert is not None and alert.level is Level.warning
    assert alert.text == (
        f"the start before {says} at about step 14, 1m30s ago; training continues after step 10, and 4 steps are trained again"
    )
    assert restarted([], 0, 0.0) is None


def test_failed_save_is_a_warning_and_its_recovery_is_news() -> None:
    assert save_failed("step 6 could not be saved", 7) == Alert(
        "save failed", "step 6 could not be saved", Level.warning, 7
    )
    assert saved_again(1200, 1) == Alert("saved again", "step 1,200 is saved, after 1 failed save", Level.info, 1200)
    assert saved_again(8, 2).text == "step 8 is saved, after 2 failed saves"
