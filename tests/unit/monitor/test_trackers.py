"""TensorBoard and trackio with their real libraries: files read back after a restart, alerts, pictures, and libraries that fail."""

import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from ssa_pretrain.config import LoggingConfig
from ssa_pretrain.monitor.alerts import Alert, Level
from ssa_pretrain.monitor.names import GROUPS
from ssa_pretrain.monitor.trackers import Opening, start_trackers
from support.wandb_runs import KEY, be_patient, evaluation_record, train_record

ALERT = Alert("not finite", f"step 3, key {KEY}", Level.error, 3)


@pytest.fixture(autouse=True, scope="module")
def patient() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        be_patient(patch)
        yield


def settings(*names: str) -> LoggingConfig:
    found = LoggingConfig()
    for name in names:
        getattr(found, name).enabled = True
    return found


def track(config: LoggingConfig, folder: Path, step: int, last: int, factor: float, lines: list[str]) -> None:
    """One start of a run: continues after `step`, passes the records from the first on, trains up to `last`.

    From `step` on, losses differ by a factor.
    """
    opening = Opening(name="a", folder=folder, config={"lr": 1}, step=step, decisive={"factor": factor})
    trackers = start_trackers(config, opening, lines.append)
    for number in range(1, last + 1):
        record = train_record(number) | {"skipped": True, "stream": "full"}
        record["loss"] *= factor if number > step else 1.0
        for tracker in trackers:
            tracker.log(record)
            if number % 2 == 0:
                tracker.log(evaluation_record(number, "full") | {"captured_mass_by_layer": [0.5, 0.75]})
    for tracker in trackers:
        if step:
            tracker.alert(ALERT)
        tracker.finish()
        tracker.finish()


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """A run that is tracked by both up to step 4, and again from step 2 to 6 with another loss; and what was printed."""
    folder, lines = tmp_path_factory.mktemp("tracked"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder / "store"))
        patch.delenv("TRACKIO_SPACE_ID", raising=False)
        for step, last, factor in ((0, 4, 1.0), (2, 6, 2.0)):
            track(settings("tensorboard", "trackio"), folder / "run", step, last, factor, lines)
        yield folder, lines


def test_tensorboard_has_every_step_once_after_a_restart(tracked: tuple[Path, list[str]]) -> None:
    events = EventAccumulator(str(tracked[0] / "run" / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(s, pytest.approx((2 if s > 2 else 1) / s)) for s in range(1, 7)], "from step 3 on, the new values"
    assert [event.step for event in events.Scalars("heldout/full/cross_entropy")] == [2, 4, 6]
    assert events.Scalars("train/tokens")[-1].value == 600
    tags = events.Tags()
    assert "train/captured_mass/layer_01" in tags["scalars"] and "train/skipped" in tags["scalars"]
    assert not [tag for tag in tags["scalars"] if tag.endswith(("stream", "step"))]
    picture = events.Images("heldout/full/captured_mass_map")[-1]
    assert picture.step == 6 and picture.encoded_image_string.startswith(b"\x89PNG")


def test_tensorboard_has_alerts_and_a_layout_of_the_groups(tracked: tuple[Path, list[str]]) -> None:
    events = EventAccumulator(str(tracked[0] / "run" / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    (alert,) = events.Tensors("alerts/not_finite")
    assert alert.step == 3 and alert.tensor_proto.string_val[0].decode() == "error: step 3, key <hidden>"
    stored = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(stored)
    titles = list(GROUPS.values())
    assert [category.title for category in layout.category] == [title for title in titles if title != GROUPS["tasks"]]
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    tags = ["^train/cross_entropy$", "^heldout/full/cross_entropy$", "^heldout/sparse/cross_entropy$"]
    assert charts["Cross entropy"] == tags


def stored_runs(store: Path) -> dict[str, list[dict]]:
    """Returns the rows of each of trackio's runs, from its file."""
    (file,) = store.glob("*.db")
    runs: dict[str, list[dict]] = {}
    with sqlite3.connect(file) as database:
        for name, step, values in database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step"):
            runs.setdefault(name, []).append({"row": step, **json.loads(values)})
    return runs


def test_trackio_starts_a_new_run_for_steps_that_other_settings_repeat(tracked: tuple[Path, list[str]]) -> None:
    first, second = sorted(stored_runs(tracked[0] / "store").values(), key=len)
    assert [(row["row"], row["train/loss"]) for row in first] == [(s, pytest.approx(1 / s)) for s in range(1, 5)]
    assert [row["train/loss"] for row in second] == [pytest.approx((2 if s > 2 else 1) / s) for s in range(1, 7)]
    assert "heldout/full/captured_mass/layer_01" in second[1] and second[1]["heldout_tokens"] == 200
    picture = second[5]["heldout/full/captured_mass_map"]
    assert (tracked[0] / "store" / "media" / picture["file_path"]).read_bytes().startswith(b"\x89PNG")
    (file,) = (tracked[0] / "store").glob("*.db")
    with sqlite3.connect(file) as database:
        (alert,) = database.execute("SELECT title, text, level FROM alerts").fetchall()
    assert alert == ("not finite", "step 3, key <hidden>", "error")
    assert tracked[1] == ["trackio: a new run, because the previous one has steps after 2 from other settings"]


def test_trackio_continues_a_run_with_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    lines: list[str] = []
    for step, last in ((0, 3), (2, 5)):
        track(settings("trackio"), tmp_path / "run", step, last, 1.0, lines)
        state = json.loads((tmp_path / "run" / "trackio" / "state.json").read_text())
        state["row"] = 0  # as after a kill of its process: the file in the store knows better
        (tmp_path / "run" / "trackio" / "state.json").write_text(json.dumps(state))
    (rows,) = stored_runs(tmp_path / "store").values()
    assert [row["row"] for row in rows] == [1, 2, 3, 4, 5] and lines == []
    evaluated = [row["heldout_step"] for row in rows if "heldout_step" in row]
    assert evaluated == [2, 4], "an evaluation that is there is not sent again as a late one"


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_library_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / f"{name}.py").write_text("raise TypeError('of its own')")
    monkeypatch.syspath_prepend(tmp_path)
    lines: list[str] = []
    track(settings(name), tmp_path / "run", 0, 3, 1.0, lines)
    label = {"tensorboard": "TensorBoard"}.get(name, name)
    (line,) = lines
    assert (
        line.startswith(f"{label} cannot start (") and "of its own" in line and line.endswith("; continuing without it")
    )


def test_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").touch()
    lines: list[str] = []
    track(settings("tensorboard"), tmp_path, 0, 3, 1.0, lines)
    assert lines == ["TensorBoard cannot start (File exists); continuing without it"] and os.listdir(tmp_path)
