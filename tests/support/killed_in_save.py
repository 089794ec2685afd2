"""`python -m ssa_pretrain.train`, except that rank 1 is killed after step 8, while the save of step 6 is being written.

The save cannot end: rank 1 never finishes its part. Arguments: the command line's overrides.
"""

import os
import signal
import threading
from pathlib import Path

from ssa_pretrain.checkpoint import publish
from ssa_pretrain.saving import Saver
from ssa_pretrain.train import main

if __name__ == "__main__":
    read, after_step = publish.file_sha256, Saver.after_step

    def never_ends(path: Path) -> str:
        if ".step_00000006.tmp" in path.parts:
            threading.Event().wait()
        return read(path)

    def killed(self: Saver, step: int) -> None:
        after_step(self, step)
        if step == 8:
            assert self._pending is not None and self._pending.step == 6
            os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == "1":
        publish.file_sha256, Saver.after_step = never_ends, killed
    main()
