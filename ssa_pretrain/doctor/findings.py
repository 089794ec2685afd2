"""What the doctor finds: one line per check, and the page and the JSON that they make. Stdlib only."""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

from ssa_pretrain.errors import ExitCode

CHECK_SECONDS = 60.0  # for one check; storage that hangs answers nobody
Check = Callable[[], "list[Finding]"]
EXPECTED = (
    OSError,
    RuntimeError,
    ValueError,
    ImportError,
    AttributeError,
    KeyError,
)  # of a check that meets a broken machine


class Status(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"  # a run works, but slowly or at a risk
    FAIL = "fail"  # a run fails or hangs


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check.

    Attributes:
        status: how bad it is.
        name: what was checked, in one to three words.
        found: what is there.
        remedy: what to do; empty if there is nothing to do.
        host: the node; empty for a finding about all of them.
    """

    status: Status
    name: str
    found: str
    remedy: str = ""
    host: str = ""


def ok(name: str, found: str) -> Finding:
    """Returns a finding that needs no remedy."""
    return Finding(Status.OK, name, found)


def warn(name: str, found: str, remedy: str) -> Finding:
    """Returns a finding that costs speed or is a risk."""
    return Finding(Status.WARN, name, found, remedy)


def fail(name: str, found: str, remedy: str) -> Finding:
    """Returns a finding that makes a run fail or hang."""
    return Finding(Status.FAIL, name, found, remedy)


def run_check(name: str, check: Check, seconds: float = CHECK_SECONDS) -> list[Finding]:
    """Returns what a check finds. A check that raises or does not answer is itself a finding.

    Args:
        name: its name, for that case.
        check: runs in a thread, which is left behind if it does not answer.
        seconds: the time for it.
    """
    found: list[list[Finding]] = []

    def act() -> None:
        try:
            found.append(check())
        except EXPECTED as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            found.append([fail(name, f"the check failed: {text}", "repair what the message names")])

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    late = fail(name, f"no answer in {seconds:g} s", "look for storage or a driver that hangs (dmesg, ps -eo stat,cmd)")
    return found[0] if found else [late]


def exit_code(findings: Sequence[Finding]) -> int:
    """Returns 1 if something would make a run fail, else 0."""
    return ExitCode.FAILED if any(one.status is Status.FAIL for one in findings) else ExitCode.DONE


def page(findings: Sequence[Finding], heading: str) -> str:
    """Returns the findings as lines: status, name, what was found, the remedy after an arrow. The same finding of several hosts is one line."""
    merged: dict[Finding, list[str]] = {}
    for one in findings:
        key = Finding(one.status, one.name, one.found, one.remedy)
        merged.setdefault(key, []).append(one.host)
    hosts = {one.host for one in findings if one.host}
    width = max((len(one.name) for one in merged), default=0)
    lines = [heading]
    for one, where in merged.items():
        named = "" if len(hosts) < 2 or set(where) >= hosts or where == [""] else f"{', '.join(where[:4])}: "
        more = f"({len(where)} hosts) " if named and len(where) > 4 else ""
        remedy = f"  -> {one.remedy}" if one.remedy else ""
        lines.append(f"{one.status:<4}  {one.name:<{width}}  {more}{named}{one.found}{remedy}")
    counts = {status: sum(one.status is status for one in merged) for status in Status}
    lines.append(f"{counts[Status.FAIL]} fail, {counts[Status.WARN]} warn, {counts[Status.OK]} ok")
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    """Returns the findings as a JSON object."""
    return json.dumps({"exit_code": int(exit_code(findings)), "findings": [asdict(one) for one in findings]}, indent=1)
