"""The settings of the data: how a dataset is cut into rows, and how its parts are mixed over a run.

`weights` hold from the first step on. Each entry of `stages` replaces them from one step on:

    data:
      weights: {web: 0.9, code: 0.1}
      stages:
        - {from_tokens: 80e9, weights: {web: 0.5, code: 0.3, maths: 0.2}}
        - {from_tokens: 95e9, weights: {maths: 1}}
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ssa_pretrain.config.choices import RowPacking
from ssa_pretrain.settings.problems import Problem, at_least

if TYPE_CHECKING:
    from ssa_pretrain.config.schedule import Batches


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """A stage of the mixture: it begins at a step, and ends where the next one begins or with the run."""

    from_step: int = 0  # first step of the stage, counted from 1; 0: set by from_tokens
    from_tokens: int = 0  # instead of from_step: the first step after this many tokens
    weights: dict[str, float] = field(default_factory=dict)  # as data.weights

    def problems(self, key: str) -> list[Problem]:
        """Returns the problems within this stage, whose key is such as data.stages[0]."""
        found = at_least(key, self, 0, "from_step", "from_tokens")
        if not found and (self.from_step > 0) == (self.from_tokens > 0):
            rule = f"and from_tokens={self.from_tokens} must be one positive number and one 0: where the stage begins"
            advice = "the run begins with data.weights; try {from_step: 1001, weights: {…}}"
            found.append(Problem(f"{key}.from_step", self.from_step, rule, advice, (f"{key}.from_tokens",)))
        return found + weight_problems(f"{key}.weights", self.weights)

    def steps_before(self, sizes: "Batches") -> int:
        """Returns the optimizer steps before the stage; `sizes` are the tokens of each step."""
        return self.from_step - 1 if self.from_step else sizes.steps_for(self.from_tokens)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Prepared data and how it is cut into rows."""

    path: str = "???"  # folder of a dataset written by data_prep (with manifest.json)
    sequence_length: int = 512  # tokens per row
    weights: dict[str, float] = field(default_factory=dict)  # tokens by source; empty: the dataset's, or in proportion
    stages: list[StageConfig] = field(default_factory=list)  # later mixtures: [{from_step: 801, weights: {web: 1}}]
    packing: RowPacking = RowPacking.flow
    index_path: str = ""  # folder for the index of data.packing=best_fit; empty: the dataset's own folder
    isolate_documents: bool = True  # no attention across documents; positions restart at each document

    def problems(self) -> list[Problem]:
        """Returns the problems within this section."""
        found = at_least("data", self, 1, "sequence_length") + weight_problems("data.weights", self.weights)
        for number, stage in enumerate(self.stages):
            found += stage.problems(f"data.stages[{number}]")
        if self.index_path and self.packing is RowPacking.flow:
            rule = "is for the index of data.packing=best_fit, and data.packing=flow has none"
            advice = "try data.index_path='' or data.packing=best_fit"
            found.append(Problem("data.index_path", self.index_path, rule, advice, ("data.packing",)))
        return found


def weight_problems(key: str, weights: dict[str, float]) -> list[Problem]:
    """Returns the problems of the weights of a mixture."""
    negative = {f"{key}.{name}": weight for name, weight in weights.items() if weight < 0}
    rule, advice = "must not be negative", "0 leaves the source out"
    found = [Problem(name, weight, rule, advice) for name, weight in negative.items()]
    if weights and sum(weights.values()) <= 0:
        advice = f"try {key}={{}} for all sources in proportion"
        found.append(Problem(key, None, "must have a positive sum", advice))
    return found
