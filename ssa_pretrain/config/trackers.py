"""The settings of what a run prints and of its trackers: W&B, TensorBoard, trackio. Several may be on at once."""

import re
from dataclasses import dataclass, field

from ssa_pretrain.config.choices import Timestamps, WandbMode
from ssa_pretrain.settings.problems import Problem, at_least

PROJECT = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases. The API key comes from WANDB_API_KEY or `wandb login`, never from the configuration."""

    mode: WandbMode = WandbMode.off
    project: str = "ssa_pretrain"  # W&B project
    entity: str = ""  # W&B user or team; empty: the account's default
    group: str = ""  # W&B group of the run; empty: none
    tags: list[str] = field(default_factory=list)  # W&B tags of the run


@dataclass(kw_only=True, slots=True)
class TensorboardConfig:
    """TensorBoard's event files, in output_dir/tensorboard."""

    enabled: bool = False  # write them; needs the package tensorboard


@dataclass(kw_only=True, slots=True)
class TrackioConfig:
    """trackio, which keeps runs in TRACKIO_DIR, or sends them to TRACKIO_SPACE_ID or TRACKIO_SERVER_URL if the environment has one of them."""

    enabled: bool = False  # write to it; needs the package trackio
    project: str = "ssa_pretrain"  # trackio's project
    group: str = ""  # trackio's group of the run; empty: none


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What a run prints and where its metrics go."""

    interval: int = 10  # steps between console lines; metrics.jsonl records every step
    timestamps: Timestamps = Timestamps.off  # time stamp before every console line
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: TensorboardConfig = field(default_factory=TensorboardConfig)
    trackio: TrackioConfig = field(default_factory=TrackioConfig)

    def problems(self) -> list[Problem]:
        """Returns the problems within this section."""
        found = at_least("logging", self, 1, "interval")
        if self.wandb.mode is not WandbMode.off and not self.wandb.project:
            found.append(Problem("logging.wandb.project", "", "must name a project", "try ssa_pretrain"))
        if self.trackio.enabled and not PROJECT.fullmatch(self.trackio.project):
            rule, advice = "must be letters, digits, hyphens and underscores", "try ssa_pretrain"
            found.append(Problem("logging.trackio.project", self.trackio.project, rule, advice))
        return found
