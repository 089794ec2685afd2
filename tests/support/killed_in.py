"""Runs a module that is killed: `killed_in.py PLACE COUNT MODULE ARGUMENTS…`. PLACE is module:name.of.function; at its COUNT-th call comes SIGKILL."""

import importlib
import os
import runpy
import signal
import sys
from typing import Any


def install(place: str, count: int) -> None:
    """Replaces a function by one that ends this process at its `count`-th call."""
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function, calls = getattr(owner, name), []

    def killed(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    setattr(owner, name, killed)


if __name__ == "__main__":
    install(sys.argv[1], int(sys.argv[2]))
    sys.argv = sys.argv[3:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
