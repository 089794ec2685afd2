"""Shared by the tests of W&B: the client without an account, records, and a reader of the client's files."""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

from ssa_pretrain.config import WandbConfig, WandbMode
from ssa_pretrain.monitor.tracking import WandbTracker, start_tracking

KEY = "0123456789abcdef" * 2 + "01234567"  # 40 hex digits, the shape of a W&B key
BLOCK = 32_768
RESENT = "the next start sends the missing records"
# The limits of a tracker's process, and of training for it, on a busy machine. Each is below the next, as those of the product are.
PROGRAM = """
from ssa_pretrain.monitor import tracking_loop
tracking_loop.START_SECONDS, tracking_loop.END_SECONDS = 100, 50
from ssa_pretrain.monitor import {module}
{module}.FINISH_SECONDS = 40.0
{module}.main()
"""
PATIENCE = {
    "tracking.CLIENT_SECONDS": 60.0,
    "tracking.START_SECONDS": 200.0,
    "trackers.START_SECONDS": 200.0,
    "client_tracker.FINISH_SECONDS": 60.0,
    "tracking_client.PROGRAM": PROGRAM,
}
PATIENT = "from ssa_pretrain.monitor import client_tracker, trackers, tracking, tracking_client\n"
PATIENT += "".join(f"{name} = {value!r}\n" for name, value in PATIENCE.items())


def be_patient(patch: pytest.MonkeyPatch) -> None:
    """Gives a tracker's process the time that a busy machine needs. A test's own process runs PATIENT."""
    for name, value in PATIENCE.items():
        patch.setattr(f"ssa_pretrain.monitor.{name}", value)


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hides the machine's W&B key and settings from a test, and is patient with W&B's client."""
    be_patient(monkeypatch)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def stored_records(file: Path) -> Iterator[Record]:
    """Yields the records of a .wandb file: LevelDB's log format after a header of 7 bytes.

    Blocks of 32 KiB hold chunks of crc (4), length (2), type (1: full, 2: first, 3: middle, 4: last) and data.
    """
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    position, whole = 7, b""
    while position + 7 <= len(data):
        room = BLOCK - position % BLOCK
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0:
            break
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/*run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def history(folder: Path) -> list[dict]:
    """Returns every row of every segment of a run, in the order of upload."""
    rows = []
    for file in segments(folder):
        for record in stored_records(file):
            if record.WhichOneof("record_type") == "history":
                rows.append({(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item})
    return rows


def train_record(step: int) -> dict:
    layers = [0.5, 0.25]
    return {
        "kind": "train",
        "step": step,
        "tokens": 100 * step,
        "loss": 1.0 / step,
        "captured_mass_by_layer": layers,
        "mfu": None,
    }


def evaluation_record(step: int, mode: str) -> dict:
    return {
        "kind": "evaluation",
        "step": step,
        "tokens": 100 * step,
        "split": "heldout",
        "mode": mode,
        "cross_entropy": 2.5,
    }


def offline(folder: Path, config: dict | None = None, lines: list[str] | None = None) -> WandbTracker:
    settings = WandbConfig(mode=WandbMode.offline, project="p", group="g", tags=["t"])
    tracker = start_tracking(
        settings,
        name="a-run",
        folder=folder,
        config=config or {},
        print_line=(lines if lines is not None else []).append,
    )
    assert tracker is not None
    return tracker
