"""Rules of the optimizer: what Muon cannot be combined with, and its settings under another optimizer."""

from ssa_pretrain.config import AdamImpl, Config, EngineName, MuonConfig, OptimizerName
from ssa_pretrain.config.deepspeed import leaves
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.settings.problems import Problem

NAME = ("optim.name",)
# Keys of `deepspeed.extra.zero_optimization` with which DeepSpeed steps parameters by an optimizer of its own.
OTHER_OPTIMIZERS = ("offload_optimizer.ratio", "offload_optimizer.super_offload", "zenflow")


def _muon(config: Config, machine: Machine) -> list[Problem]:
    """Muon gathers no weights later, and DeepSpeed steps it only if it steps everything; without Muon its settings do nothing."""
    if config.optim.name is not OptimizerName.muon:
        chosen, defaults = config.optim.muon, MuonConfig()
        names = [n for n in MuonConfig.__dataclass_fields__ if getattr(chosen, n) != getattr(defaults, n)]
        rule, advice = "has no effect under optim.name=adamw", "add optim.name=muon"
        return [Problem(f"optim.muon.{n}", getattr(chosen, n), rule, advice, NAME) for n in names]
    if config.engine.name is EngineName.deepspeed:
        return _under_deepspeed(config) if "train" in machine.splits else []
    if config.engine.overlap_param_gather:
        rule = "is not supported under optim.name=muon, which sends whole matrices after the step"
        return [Problem("engine.overlap_param_gather", True, rule, "try engine.overlap_param_gather=false", NAME)]
    return []


def _under_deepspeed(config: Config) -> list[Problem]:
    """Settings of DeepSpeed by which another optimizer steps a part of the parameters."""
    found = []
    if config.deepspeed.adam is not AdamImpl.torch:
        rule = "is not supported under optim.name=muon, beside which torch's AdamW steps"
        found.append(Problem("deepspeed.adam", config.deepspeed.adam, rule, "try deepspeed.adam=torch", NAME))
    for path, value in leaves(config.deepspeed.extra):
        if path[0] == "zero_optimization" and ".".join(path[1:]).startswith(OTHER_OPTIMIZERS):
            rule = "is not supported under optim.name=muon: DeepSpeed would step weights with an AdamW of its own"
            found.append(Problem("deepspeed.extra." + ".".join(path), value, rule, "leave it out", NAME))
    return found


OPTIMIZER_RULES = (_muon,)
