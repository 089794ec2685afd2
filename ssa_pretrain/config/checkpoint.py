"""The settings of checkpoints, and of where a run starts. The rules on files are in rules/files.py. Standard library only."""

import re
from dataclasses import dataclass

from ssa_pretrain.config.choices import Auto
from ssa_pretrain.settings.problems import Problem, at_least

MIRROR = re.compile(r"s3://[A-Za-z0-9.-]+(/[^\s@?#]*)?")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints, and the weights that a run starts from."""

    interval: int | Auto = 0  # steps between checkpoints; 0: only at the end; auto: chosen by what a save costs
    mean_hours_between_failures: float = 0.0  # of the whole run, for interval=auto; 0: 8,090 hours / number of GPUs
    asynchronous: bool = False  # training continues while a checkpoint is written, from a copy in host memory
    max_failed_saves: int = (
        10  # saves in a row that may fail while training goes on; the next one ends the run; 0: the first ends it
    )
    keep: int = 2  # how many of the newest intact checkpoints are kept
    mirror: str = ""  # also copy each checkpoint to this object store, such as s3://BUCKET/PREFIX, and resume from there; empty: no
    weights: bool = True  # also save the weights in the common format, which both engines read
    init_from: str = (
        ""  # start at step 0 from these weights: RUN, RUN@STEP, or a folder of a checkpoint or of common weights
    )
    branch_from: str = (
        ""  # continue this run, RUN, RUN@STEP or a checkpoint, in this folder: weights, optimizer and step
    )

    def problems(self) -> list[Problem]:
        """Returns the problems within this section."""
        counted = [] if isinstance(self.interval, Auto) else ["interval"]
        found = at_least("checkpoint", self, 0, *counted, "mean_hours_between_failures", "max_failed_saves")
        if self.mirror and not MIRROR.fullmatch(self.mirror):
            rule, advice = "must be the address of a bucket", "try s3://BUCKET/PREFIX"
            found.append(Problem("checkpoint.mirror", self.mirror, rule, advice))
        if self.init_from and self.branch_from:
            rule = f"and checkpoint.init_from={self.init_from} both say where the run starts"
            advice = "leave out one: init_from starts at step 0 with weights only, branch_from continues"
            found.append(Problem("checkpoint.branch_from", self.branch_from, rule, advice))
        return found + at_least("checkpoint", self, 1, "keep")
