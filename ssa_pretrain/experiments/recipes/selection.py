"""Selection: exact top-k against the rule of the official code, in training and at inference."""

from ssa_pretrain.experiments.measures import FULL, GAP, MASS, SPARSE, evaluated, layer_mean, over_training
from ssa_pretrain.experiments.recipe import AtMost, Claim, Comparison, Evaluation, Measure, Panel, Recipe, Table, below
from ssa_pretrain.experiments.results import RunResult
from ssa_pretrain.experiments.sizes import Size

EXACT, OFFICIAL = "select_exact", "select_official"
MARGIN = 0.01  # nats


def recipe(size: Size) -> Recipe:
    """Returns the recipe. Both models are evaluated under both rules."""
    settings = [size.method("ssa"), size.ssa("official", "attention.score=official_compat")]
    evaluations = [
        Evaluation(
            name, (f"attention.score={score}", f"evaluation.head_rows={size.observed_rows}"), ("ssa", "ssa_official")
        )
        for name, score in ((EXACT, "softmax_sum"), (OFFICIAL, "official_compat"))
    ]
    measures = [
        *(
            evaluated(name, "sparse", f"sparse mode, {rule}", "cross_entropy")
            for name, rule in ((EXACT, "exact"), (OFFICIAL, "official"))
        ),
        *(
            layer_mean(name, "full", f"captured mass, {rule}", "captured_mass_by_layer")
            for name, rule in ((EXACT, "exact"), (OFFICIAL, "official"))
        ),
    ]
    official_mass = layer_mean(OFFICIAL, "full", "captured mass, official rule", "captured_mass_by_layer")
    exact_mass = layer_mean(EXACT, "full", "captured mass, exact rule", "captured_mass_by_layer")
    return Recipe(
        name="selection",
        title="Exact top-k against the official rule",
        about="The official code's top-k keeps half of its running list, so it returns 14.25 of 16 blocks on average, of which 9.6 are in the true top 16. `ssa` "
        "trains with the exact top-k, `ssa_official` with `attention.score=official_compat`; both are evaluated under both rules.",
        settings=settings,
        evaluations=evaluations,
        tables=[
            Table("At the end of training, each under its own rule", [FULL, SPARSE, GAP, MASS]),
            Table("Both models under both rules", measures),
        ],
        comparisons=[Comparison("ssa", "ssa_official", [FULL, SPARSE, MASS])],
        panels=[
            Panel("Sparse inference", "tokens", "cross entropy, nats", over_training("cross_entropy", "sparse")),
            Panel("Captured mass", "tokens", "share, full mode", over_training("captured_mass", "full")),
        ],
        claims=[
            Claim("training with the exact rule captures more mass", [below(MASS, "ssa_official", "ssa")]),
            Claim(
                "training with the exact rule is not worse in sparse mode",
                [below(SPARSE, "ssa", "ssa_official", MARGIN)],
            ),
            Claim(
                "the same model captures more mass under the exact rule",
                [_same(official_mass, exact_mass, setting.name) for setting in settings],
            ),
        ],
    )


def _same(low: Measure, high: Measure, setting: str) -> AtMost:
    """Returns the test that a measure of a setting's run is at most another one of the same run."""

    def value(runs: dict[str, RunResult]) -> float | None:
        if setting not in runs:
            return None
        a, b = low.value(runs[setting], 0), high.value(runs[setting], 0)
        return None if a is None or b is None else a - b

    return AtMost(f"{setting}: {low.name} − {high.name}", value)
