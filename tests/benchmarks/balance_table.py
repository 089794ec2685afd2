"""Simulates how evenly the drawn streams load the data ranks, and prints the table of docs/counterpart.md.

    python tests/benchmarks/balance_table.py [overrides, such as attention.counterpart_share=0.125]

By default ssa_1b_8k at share 1/4: 384 rows per step on 1 to 384 data ranks, and 8 rows per rank on 512.
"""

import sys

from ssa_pretrain.cli import resolve_config
from ssa_pretrain.config import Config
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.planning.balance import Balance, Batch, balance
from ssa_pretrain.planning.flops import row_flops

ROWS = 384
STEPS = 64


def simulated(config: Config, dp: int, num_rows: int, rows: int) -> Balance | None:
    """Returns the balance of `num_rows` rows per step in microbatches of `rows`; None if they do not divide."""
    if num_rows % (dp * rows):
        return None
    length = config.data.sequence_length
    batch = Batch(dp=dp, num_microbatches=num_rows // (dp * rows), rows=rows, row_length=length)
    row = row_flops(config.model, config.attention, [length])
    return balance(config.attention, batch, row, seed=config.seed, steps=STEPS)


def main() -> None:
    """Prints the table in Markdown."""
    overrides = ["experiment=ssa_1b_8k", "attention.counterpart_share=0.25", *sys.argv[1:]]
    config = resolve_config("plan", overrides, Machine(world_size=1, has_files=False))
    print(
        "| data ranks | rows per step | rows per microbatch | microbatches per rank | slowest / mean | same stream | changes |"
    )
    print("|---|---|---|---|---|---|---|")
    shapes = [(dp, ROWS) for dp in (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 384)] + [(512, 8 * 512)]
    for dp, num_rows in shapes:
        for rows in (1, 2):
            if found := simulated(config, dp, num_rows, rows):
                shares = f"{found.slowest:.4f} | {found.same_stream:.0%} | {found.changes:.2g}"
                print(f"| {dp} | {num_rows:,} | {rows} | {num_rows // (dp * rows)} | {shares} |")


if __name__ == "__main__":
    main()
