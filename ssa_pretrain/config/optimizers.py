"""Settings of Muon and of muP: the parts of `optim` and `model` that treat hidden matrices unlike all other weights.

Sources: Muon, Jordan 2024 (https://kellerjordan.github.io/posts/muon) and Moonlight (arXiv 2502.16982); muP, Tensor Programs V (arXiv 2203.03466).
docs/optimizers.md has the formulas. Standard library only.
"""

from dataclasses import dataclass

from ssa_pretrain.config.choices import MuonScale
from ssa_pretrain.settings.problems import Problem, above_zero, at_least, between


@dataclass(kw_only=True, slots=True)
class MuonConfig:
    """Muon's own settings; used only with optim.name=muon, in either engine. Learning rate, weight decay and clipping are optim's."""

    momentum: float = 0.95  # decay rate of the running mean of the gradients
    nesterov: bool = True  # mix the newest gradient into the mean once more before it is orthogonalised
    ns_steps: int = 5  # Newton-Schulz iterations per orthogonalisation
    scale: MuonScale = MuonScale.match_rms_adamw
    lr_multiplier: float = 1.0  # learning rate of Muon's matrices, as a multiple of optim.lr

    def problems(self) -> list[Problem]:
        """Returns the problems within this section."""
        found = between("optim.muon", self, 1, 20, "ns_steps") + above_zero("optim.muon", self, "lr_multiplier")
        if not 0.0 <= self.momentum < 1.0:
            rule = "must be at least 0 and below 1"
            found.append(Problem("optim.muon.momentum", self.momentum, rule, "try 0.95"))
        return found


@dataclass(kw_only=True, slots=True)
class MupConfig:
    """muP: initial weights, learning rates and logits scaled so that the best learning rate does not depend on the width."""

    base_width: int = 0  # model.hidden_size at which muP changes nothing, where optim.lr was tuned; 0: no muP
    base_head_dim: int = 0  # scale attention by sqrt(base_head_dim) / head_dim; 0: by 1 / sqrt(head_dim)
    output_multiplier: float = 1.0  # further factor of the logits, the same at every width

    def problems(self) -> list[Problem]:
        """Returns the problems within this section."""
        found = at_least("model.mup", self, 0, "base_width", "base_head_dim")
        found += above_zero("model.mup", self, "output_multiplier")
        changed = [name for name in ("base_head_dim", "output_multiplier") if getattr(self, name) != _DEFAULTS[name]]
        if self.base_width == 0:
            rule, reads = "has no effect without muP, and model.mup.base_width=0", ("model.mup.base_width",)
            advice = "set model.mup.base_width to the width at which optim.lr was tuned"
            found += [Problem(f"model.mup.{name}", getattr(self, name), rule, advice, reads) for name in changed]
        return found


_DEFAULTS = {"base_head_dim": 0, "output_multiplier": 1.0}
