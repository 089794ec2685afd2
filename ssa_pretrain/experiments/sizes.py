"""The sizes of an experiment: the model, its data and its length, with the budgets, lengths and benchmarks that fit it.

`75m` is the size of the results in docs/results/: 78M parameters, 50M tokens, rows of 8k. `tiny` runs on a CPU in seconds: it shows that a recipe works,
and its numbers mean nothing. Everything that a run of a size has in common is in `base`; a recipe's settings come after it and the user's last.
"""

from dataclasses import dataclass

from ssa_pretrain.experiments.recipe import Bench, Setting

METHODS = ("full", "moba", "nsa", "indexer", "ssa")  # that are compared, in the order of tables
ONE_BILLION_GIB = (
    42.0 + 2 * 26.0
)  # of the 1B benchmark: full, moba and ssa share their weights, nsa and indexer have their own


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A size.

    Attributes:
        name: on the command line.
        base: overrides of every run.
        length: tokens per row in training.
        block_size: keys per block.
        budgets: keys that a query reads in training, as blocks x block size; the middle one is the usual one.
        evaluated_budgets: keys that a query reads in evaluation.
        lengths: tokens per row in evaluation, from that of training on.
        tokens: held-out tokens of an evaluation.
        samples: needles per length and depth.
        observed_rows: rows whose attention is measured by layer and head.
        benches: of the overhead.
        warmup_steps: of the indexer, with full attention.
        default_data: data.path unless the user gives one.
    """

    name: str
    base: tuple[str, ...]
    length: int
    block_size: int
    budgets: tuple[int, ...]
    evaluated_budgets: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: int
    samples: int
    observed_rows: int
    benches: tuple[Bench, ...]
    warmup_steps: int
    default_data: str

    @property
    def budget(self) -> int:
        """Keys that a query reads in training unless a recipe varies them."""
        return self.budgets[0]

    @property
    def top_k(self) -> int:
        """Blocks per query in training unless a recipe varies them."""
        return self.budget // self.block_size

    def method(self, name: str) -> Setting:
        """Returns the setting of a method with its usual values."""
        return Setting(name, (f"attention={name}", *self._blocks(name)))

    def methods(self) -> list[Setting]:
        """Returns the setting of every method."""
        return [self.method(name) for name in METHODS]

    def ssa(self, label: str, *overrides: str) -> Setting:
        """Returns a setting of ssa that differs in some overrides."""
        return Setting(f"ssa_{label}", (*self.method("ssa").overrides, *overrides))

    def _blocks(self, name: str) -> tuple[str, ...]:
        """Returns the overrides that make methods comparable: equal blocks, and a warm-up of the trained scorer that fits the length of the runs."""
        warmup = (f"attention.indexer.warmup_steps={self.warmup_steps}",) if name == "indexer" else ()
        return (f"attention.block_size={self.block_size}", f"attention.top_k={self.top_k}", *warmup)


SIZES = {
    "75m": Size(
        name="75m",
        base=(
            "experiment=ssa_75m_evidence",
            "evaluation.entropy_rows=1",
            "checkpoint.interval=96",
            "checkpoint.weights=false",
            "logging.interval=48",
        ),
        length=8192,
        block_size=16,
        budgets=(256, 512, 1024),
        evaluated_budgets=(64, 128, 256, 512, 1024, 2048, 4096),
        lengths=(8192, 16384, 32768),
        tokens=262_144,
        samples=2,
        observed_rows=2,
        benches=(
            Bench(
                "75m_8k",
                ("cases=methods", "model=llama_75m", "length=8192", "rows=2", "rounds=4", "runs=3", "parts=1"),
                1.0,
            ),
            Bench(
                "1b_8k",
                ("cases=methods", "model=llama_1b", "length=8192", "rows=2", "rounds=2", "runs=1", "parts=1"),
                2.0,
                ONE_BILLION_GIB,
            ),
        ),
        warmup_steps=64,
        default_data="data/debian_8k",
    ),
    "tiny": Size(
        name="tiny",
        base=(
            "experiment=quickstart",
            "model=tiny",
            "model.num_layers=2",
            "model.init_std=0.1",  # so that the modes differ after few steps
            "data.sequence_length=128",
            "training.steps=6",
            "training.global_batch_tokens=256",
            "training.micro_batch_size=1",
            "evaluation.interval=3",
            "evaluation.rows=2",
            "evaluation.at_start=false",
            "evaluation.entropy_rows=1",
            "checkpoint.interval=3",
            "checkpoint.keep=1",
        ),
        length=128,
        block_size=16,
        budgets=(32, 64),
        evaluated_budgets=(16, 32, 64, 128),
        lengths=(128, 256),
        tokens=256,
        samples=1,
        observed_rows=1,
        benches=(
            Bench(
                "tiny",
                (
                    "cases=methods",
                    "model=tiny",
                    "length=128",
                    "rows=1",
                    "rounds=1",
                    "runs=1",
                    "parts=1",
                    "precision=fp32",
                ),
            ),
        ),
        warmup_steps=2,
        default_data="data/quickstart",
    ),
}
