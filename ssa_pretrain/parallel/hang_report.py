"""The report on a hang: the ranks that are missing with their stacks, and where the others wait. The watchdog writes it to the log and to hang.txt.

A rank that hangs in C code while it holds Python's lock publishes no stack of its own; that of `faulthandler` is read from the folder STACKS.
"""

import socket
from pathlib import Path

from ssa_pretrain.parallel.heartbeat import Beat, describe_process, missing

STACKS = ".stacks"  # folder in the run's; one file per rank
MAX_SHOWN = 4  # ranks with their stacks in the log


def report(beats: list[Beat], silent: set[int], folder: Path) -> str:
    """Returns the report on a hang: a sentence with the ranks that are missing, then their stacks and where the others are.

    Args:
        beats: the last beat of every rank that has published one.
        silent: ranks whose beats have stopped.
        folder: the run's.
    """
    beats = [*beats, *(Beat(rank, phase="start") for rank in silent - {beat.rank for beat in beats})]
    found = missing(beats, silent)
    shown = found[:MAX_SHOWN]
    lines = [_sentence(shown[0], beats, found, silent)]
    for beat in shown:
        lines.append(f"  {beat.name}: {beat.place}, {_why(beat, silent) or f'{beat.seconds:.0f} s'}")
        written = _written_stack(folder / STACKS / f"rank_{beat.rank}.txt") if beat.rank in silent else []
        lines += [f"    {line}" for line in written or beat.stack]
    if len(found) > MAX_SHOWN:
        lines.append(f"  and {len(found) - MAX_SHOWN} more: ranks {', '.join(str(b.rank) for b in found[MAX_SHOWN:])}")
    others = [beat for beat in beats if beat not in found]
    places = {(beat.place, *beat.stack[:1]) for beat in others}
    for here in sorted(places):
        ranks = [str(beat.rank) for beat in others if (beat.place, *beat.stack[:1]) == here]
        lines.append(f"  waiting: rank{'s' * (len(ranks) > 1)} {', '.join(ranks[:16])}: {', '.join(here)}")
    return "\n".join(lines)


def _sentence(first: Beat, beats: list[Beat], found: list[Beat], silent: set[int]) -> str:
    """Returns the first line of a report."""
    if len(found) > 1 and len(found) == len(beats):
        return (
            f"hang: no rank has moved for {min(beat.seconds for beat in beats):.0f} s in {first.place}, and none is behind the others: "
            "a collective or a kernel does not finish"
        )
    names = ", ".join(beat.name for beat in found[:MAX_SHOWN])
    what = "gives no sign of life" if first.rank in silent else "does not move"
    others = len(beats) - len(found)
    here = max(beats, key=lambda beat: (beat.order, beat.seconds))  # a silent rank may be further than it could tell
    waiting = f"; {others} other{'s' * (others > 1)} wait{'s' * (others == 1)} for it" if others else ""
    return f"hang: {names} {what} in {here.place} for {here.seconds:.0f} s (limit {here.limit or 0:.0f} s){waiting}"


def _why(beat: Beat, silent: set[int]) -> str:
    """Returns what is known of a rank without a stack."""
    if beat.rank not in silent:
        return ""
    known = describe_process(beat.pid) if beat.host == socket.gethostname() else ""
    return f"at its last sign of life{'; ' * bool(known)}{known}"


def _written_stack(path: Path) -> list[str]:
    """Returns the lines that `faulthandler` has written for a rank that holds Python's lock."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [line.strip() for line in lines if line.strip()][:40]
