"""The process that writes TensorBoard's event files for a training run (tracking_loop.py): RUN/tensorboard, with the library `tensorboard` only.

An event holds all values of a record; its step is the record's. Tags are the names of names.py, and a layout of the tab "Custom scalars" has its groups.
A held-out evaluation adds the picture of the captured mass by layer (mass_map.py), an alert a text under `alerts/`.

A restart writes another file. It begins with a mark that makes TensorBoard drop what the files before it have from a step on (SessionLog.START), and the
records from there on are written again. The step is the one that the run continues after, or the last one that is known to be on the disk, which
`state.json` beside them has, whichever is less.

What it does not do: TensorBoard has no alerts and no summaries of a run.
"""

# pyright: reportAttributeAccessIssue=false
# Protocol buffers make their names at import.

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalar
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from ssa_pretrain.monitor.alerts import Alert
from ssa_pretrain.monitor.mass_map import MassMaps
from ssa_pretrain.monitor.names import GROUPS, HELDOUT, METRICS, TRAIN, names
from ssa_pretrain.monitor.redaction import redact
from ssa_pretrain.monitor.tracking_loop import Send, serve
from ssa_pretrain.monitor.tracking_rows import flatten, series
from ssa_pretrain.settings.files import write_atomically

STATE_FILE, FOLDER = "tensorboard/state.json", "tensorboard"
FLUSH_SECONDS = 10.0


class Session:
    """One start's event file.

    Args:
        opening: training's first message: folder, the configuration, the step to continue after.
        send: sends a message to training.
    """

    def __init__(self, opening: Mapping[str, Any], send: Send) -> None:
        folder = Path(opening["folder"])
        self._file, self._send = folder / STATE_FILE, send
        self._received: dict[str, int] = {}  # last step of each series in the files
        self._maps = MassMaps()
        self._written: dict[str, int] = {}
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            self._received = {str(k): int(v) for k, v in json.loads(self._file.read_text())["received"].items()}
        self._resume = min(int(opening["step"]), self._received.get(TRAIN, 0))
        restarts = any((folder / FOLDER).glob("events.out.tfevents.*"))
        self._writer = EventFileWriter(str(folder / FOLDER), flush_secs=int(FLUSH_SECONDS))
        self._flushed_at = time.monotonic()
        if restarts:
            first = self._resume + 1 if self._received else 0
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=first, session_log=start))
        self._received = {name: min(step, self._resume) for name, step in self._received.items()}
        self._add([_layout_value()], 0)
        text = json.dumps(opening["config"], indent=1, default=str)
        self._add(text_pb("configuration", f"    {text}".replace("\n", "\n    ")).value, 0)  # markdown's code block

    def ready(self) -> dict[str, Any]:
        """Returns what training is told once records are taken."""
        return {"step": self._resume}

    def add(self, record: Mapping[str, Any]) -> None:
        """Writes the values of a record, unless the files have them from before a restart."""
        self._maps.add(record)
        name, step = series(record), record["step"]
        if step <= self._received.get(name, -1):
            return
        flat = redact(flatten(record))
        values = [
            Summary.Value(tag=tag, simple_value=float(value)) for tag, value in flat.items() if _is_drawn(tag, value)
        ]
        if name == TRAIN:
            values.append(Summary.Value(tag=f"{TRAIN}/tokens", simple_value=float(record["tokens"])))
        for tag, png in self._maps.pictures(flat).items():
            values.append(Summary.Value(tag=tag, image=Summary.Image(encoded_image_string=png)))
        self._add(values, step)
        self._written[name] = step
        if time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self._flush()

    def alert(self, alert: Alert) -> None:
        """Writes an alert as a text, at once."""
        title = alert.title.replace(" ", "_")
        self._add(text_pb(f"alerts/{title}", redact(f"{alert.level}: {alert.text}")).value, alert.step or 0)
        self._writer.flush()

    def finish(self, *, orderly: bool) -> None:
        """Writes everything to the disk. What was received is complete whether or not training was killed."""
        self._flush()
        self._writer.close()

    def _add(self, values: Iterable[Summary.Value], step: int) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=list(values))))

    def _flush(self) -> None:
        """Writes to the disk, then notes what is there."""
        self._writer.flush()
        self._received |= self._written
        self._flushed_at = time.monotonic()
        with suppress(OSError):  # the next start writes more of it again
            write_atomically(self._file, json.dumps({"received": self._received}) + "\n")


def layout() -> layout_pb2.Layout:
    """Returns TensorBoard's layout: a category per group, a chart per metric with all series and layers that have it."""
    categories = []
    for group, title in GROUPS.items():
        charts = []
        for metric in METRICS:
            tags = [name for kind in (TRAIN, HELDOUT) if kind in metric.kinds for name in names(metric, kind)]
            if metric.group != group or not metric.is_number or not tags:
                continue
            patterns = [f"^{tag}{metric.pattern}$" for tag in tags]
            content = layout_pb2.MultilineChartContent(tag=patterns)
            charts.append(layout_pb2.Chart(title=metric.title, multiline=content))
        if charts:
            categories.append(layout_pb2.Category(title=title, chart=charts))
    return layout_pb2.Layout(category=categories)


def _layout_value() -> Summary.Value:
    """Returns the layout as TensorBoard stores it. Its own function for that imports TensorFlow."""
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=[layout().SerializeToString()])
    return Summary.Value(
        tag=custom_scalar.CONFIG_SUMMARY_TAG, metadata=custom_scalar.create_summary_metadata(), tensor=tensor
    )


def _is_drawn(tag: str, value: Any) -> bool:
    """Returns whether a flat value becomes a scalar: a number that is not one of the x axes, which are steps here."""
    return "/" in tag and isinstance(value, int | float)


def main() -> None:
    """Writes the records on standard input until `finish` or the end of the input."""
    serve(Session, lock_name="tensorboard/.lock")
