"""`python -m ssa_pretrain.train` whose storage fails in some saves, then recovers. Arguments: the fault as JSON, then the command line's overrides.

steps   the saves that fail
rank    the rank on which they fail
place   module:function, called by the save, during which no file of the rank may grow past a limit, as on a full disk
"""

import importlib
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

from ssa_pretrain.train import main

MOST = 2**15  # bytes of a file


def install(place: str, steps: list[int]) -> None:
    """Replaces a function by one during which files are limited, in the saves of some steps; it has the step or the save's folder among its arguments."""
    module, _, name = place.partition(":")
    owner: Any = importlib.import_module(module)
    plain: Callable = getattr(owner, name)

    def limited(*arguments: Any, **options: Any) -> Any:
        fails = any(step in arguments or f".step_{step:08d}.tmp" in str(arguments[:2]) for step in steps)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if fails:
            resource.setrlimit(resource.RLIMIT_FSIZE, (MOST, before[1]))
        try:
            return plain(*arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    setattr(owner, name, limited)


if __name__ == "__main__":
    fault = json.loads(sys.argv.pop(1))
    if int(os.environ.get("RANK", "0")) == fault["rank"]:
        install(fault["place"], fault["steps"])
    main()
