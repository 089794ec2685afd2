"""Rules of the data's stages, which are placed by the steps of the run. What the files decide is in files.py."""

from ssa_pretrain.config import Config, batches
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.settings.problems import Problem


def _stages_ascend(config: Config, _: Machine) -> list[Problem]:
    """The stages of the mixture begin one after another, within the run."""
    training = config.training
    steps, reads = training.num_steps(), ("training.steps", "training.total_tokens", "training.global_batch_tokens")
    found, before = [], 1
    for number, stage in enumerate(config.data.stages):
        if (stage.from_step > 0) == (stage.from_tokens > 0):
            continue  # the section itself reports it
        name = "from_step" if stage.from_step else "from_tokens"
        key, value = f"data.stages[{number}].{name}", getattr(stage, name)
        first = stage.steps_before(batches(training)) + 1
        if first <= before:
            rule = f"must begin after the stage before it, which begins with step {before}"
            found.append(Problem(key, value, rule, f"try from_step: {before + 1} or later", reads))
        elif first > steps:
            rule = f"begins with step {first}, but the run ends with step {steps}"
            found.append(Problem(key, value, rule, f"try from_step: {steps} or earlier, or remove the stage", reads))
        before = max(before, first)
    return found


DATA_RULES = (_stages_ascend,)
