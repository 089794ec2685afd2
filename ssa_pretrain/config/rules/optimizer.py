"""Rules of the optimizer: what Muon cannot be combined with, and its settings under another optimizer."""

from ssa_pretrain.config import Config, EngineName, MuonConfig, OptimizerName
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.settings.problems import Problem

NAME = ("optim.name",)


def _muon(config: Config, machine: Machine) -> list[Problem]:
    """Muon runs on megatron-core, which gathers no weights later for it; without Muon its settings do nothing."""
    if config.optim.name is not OptimizerName.muon:
        chosen, defaults = config.optim.muon, MuonConfig()
        names = [n for n in MuonConfig.__dataclass_fields__ if getattr(chosen, n) != getattr(defaults, n)]
        rule, advice = "has no effect under optim.name=adamw", "add optim.name=muon"
        return [Problem(f"optim.muon.{n}", getattr(chosen, n), rule, advice, NAME) for n in names]
    found: list[Problem] = []
    if config.engine.name is EngineName.deepspeed and "train" in machine.splits:
        rule = "is not supported under engine=deepspeed: ZeRO flattens the matrices that Muon orthogonalises"
        found.append(Problem("optim.name", config.optim.name, rule, "try engine=megatron", ("engine.name",)))
    if config.engine.overlap_param_gather and config.engine.name is EngineName.megatron:
        rule = "is not supported under optim.name=muon, which sends whole matrices after the step"
        found.append(Problem("engine.overlap_param_gather", True, rule, "try engine.overlap_param_gather=false", NAME))
    return found


OPTIMIZER_RULES = (_muon,)
