"""Trains a tiny model at four widths and five learning rates, with and without muP, and prints the losses: the table of docs/results/mup.md.

    python tests/benchmarks/mup_transfer.py data/quickstart [--widths 64 128 256 512] [--steps 150] [--optimizer muon] [overrides]

Under muP one learning rate is best at every width; without it the best rate falls as the model gets wider. The loss is the mean cross entropy of the
last fifth of the steps, on the same rows at every width. It takes minutes on one core. All runs share one process.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

from ssa_pretrain.cli import resolve_config
from ssa_pretrain.config import Config
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.parallel.state import Placement, joined
from ssa_pretrain.run import build_run
from ssa_pretrain.trainer import train_step

HEAD_DIM, LENGTH, ROWS, INIT_STD = 16, 64, 16, 0.1


def overrides_of(options: argparse.Namespace, width: int, rate: float, *, mup: bool) -> list[str]:
    """Returns the settings of one run."""
    heads = width // HEAD_DIM
    return [
        f"data.path={options.data}",
        "attention=full",
        "precision=fp32",
        f"optim={options.optimizer}",
        "model.num_layers=2",
        f"model.hidden_size={width}",
        f"model.ffn_hidden_size={3 * width}",
        f"model.num_attention_heads={heads}",
        f"model.num_kv_heads={max(1, heads // 2)}",
        f"model.head_dim={HEAD_DIM}",
        f"model.init_std={INIT_STD}",
        f"model.mup.base_width={min(options.widths) if mup else 0}",
        f"data.sequence_length={LENGTH}",
        f"training.micro_batch_size={ROWS}",
        f"training.global_batch_tokens={ROWS * LENGTH}",
        f"training.steps={options.steps}",
        f"optim.lr={rate}",
        "optim.warmup_fraction=0.1",
        *options.overrides,
    ]


def final_loss(config: Config, placement: Placement) -> float:
    """Trains; returns the mean cross entropy of the last fifth of the steps."""
    run, steps = build_run(config, placement), config.training.steps
    losses = []
    for step in range(steps):
        pending = train_step(run, step).pending
        assert pending is not None
        losses.append(pending.result().cross_entropy)
    return mean(losses[-steps // 5 :])


def main() -> None:
    """Prints one table per parametrisation, a line per width as soon as it is done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="a dataset of data_prep")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0055, 0.011, 0.022, 0.044, 0.088])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--only", choices=("mup", "without"), help="one of the two tables")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    options, options.overrides = parser.parse_known_args()
    torch.set_num_threads(1)
    machine = replace(Machine(world_size=1), has_files=False)
    parallel = resolve_config("train", overrides_of(options, 32, 1e-3, mup=False), machine).parallel
    with joined(parallel, seed=1) as placement:
        for mup in (True, False) if options.only is None else (options.only == "mup",):
            print(
                f"\n| width, {'muP' if mup else 'without muP'} |",
                *(f"lr {rate:.4g} |" for rate in options.rates),
                "best |",
            )
            print("|---" * (len(options.rates) + 2) + "|")
            for width in options.widths:
                losses = {}
                for rate in options.rates:
                    config = resolve_config("train", overrides_of(options, width, rate, mup=mup), machine)
                    losses[rate] = final_loss(config, placement)
                best = min(losses, key=lambda rate: losses[rate])
                print(f"| {width} |", *(f"{loss:.3f} |" for loss in losses.values()), f"{best:.4g} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
