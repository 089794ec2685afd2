"""Length: perplexity and needles beyond the rows of training, with and without RoPE scaling."""

from ssa_pretrain.experiments.measures import by_evaluation, evaluated
from ssa_pretrain.experiments.recipe import AtMost, Claim, Evaluation, Measure, Panel, Recipe, Table, paired
from ssa_pretrain.experiments.results import RunResult
from ssa_pretrain.experiments.sizes import Size

PLAIN, SCALED = "", "_rope"
LEAST_NEEDLES = 0.05  # share of needles by which a method must be ahead


def recipe(size: Size) -> Recipe:
    """Returns the recipe. Rows are one document each, or few held-out documents would be longer than those of training."""
    evaluations = [
        _evaluation(size, n, scaled) for n in size.lengths for scaled in (PLAIN, SCALED)[: 1 + (n > size.length)]
    ]
    longest = size.lengths[-1]
    known = {e.name for e in evaluations}
    tables = []
    for kind, title in ((PLAIN, "Without RoPE scaling"), (SCALED, "With RoPE scaling")):
        names = [(n, f"length_{n}{kind}") for n in size.lengths if f"length_{n}{kind}" in known]
        for mode in ("full", "sparse"):
            losses: list[Measure] = [evaluated(name, mode, f"{n:,} tokens", "cross_entropy") for n, name in names]
            tables.append(Table(f"{title}: cross entropy, {mode} mode", losses))
        needles = [_needle(name, mode, f"{n:,}, {mode}") for n, name in names for mode in ("full", "sparse")]
        tables.append(Table(f"{title}: needles found", needles))
    plain = [(float(n), f"length_{n}") for n in size.lengths]
    return Recipe(
        name="length",
        title="Beyond the length of training",
        about=f"Models trained on rows of {size.length:,} tokens, evaluated on rows of up to {longest:,}, as they are and with Llama 3's RoPE scaling. A row "
        "counts as one document. Needles are numbers hidden in repeated sentences. The paper says that SSA extrapolates best to long contexts.",
        settings=size.methods(),
        evaluations=evaluations,
        tables=tables,
        panels=[
            Panel(
                f"No scaling, {mode}",
                "tokens per row",
                "cross entropy",
                by_evaluation(plain, mode, "cross_entropy"),
                log_x=True,
            )
            for mode in ("full", "sparse")
        ],
        claims=[
            Claim(
                f"long context: from {size.length:,} to {longest:,} tokens without RoPE scaling, ssa loses less than full attention and moba",
                [_loses_less(size, other, mode) for other, mode in (("full", "full"), ("moba", "sparse"))],
            ),
            Claim(
                f"long context: ssa finds more needles than full attention at {longest:,} tokens with RoPE scaling",
                [_finds_more(f"length_{longest}{SCALED}")],
            ),
        ],
    )


def _evaluation(size: Size, length: int, kind: str) -> Evaluation:
    scaling = ("model.rope_scaling.enabled=true", f"model.rope_scaling.factor={length / size.length:g}") if kind else ()
    needle = f"evaluation.tasks.needle={{kind:needle,haystack:noise,lengths:[{length}],samples:{size.samples}}}"
    rows = max(1, size.tokens // length)
    overrides = (f"data.sequence_length={length}", "data.isolate_documents=false", f"evaluation.rows={rows}")
    return Evaluation(f"length_{length}{kind}", (*overrides, *scaling, "evaluation.head_rows=0", needle), length=length)


def _needle(name: str, mode: str, head: str) -> Measure:
    return evaluated(name, mode, head, "tasks", "needle", "metrics", "accuracy", form=".3f")


def _loses_less(size: Size, other: str, mode: str) -> AtMost:
    """Returns the test that ssa's rise of cross entropy from the shortest to the longest rows is at most that of another method, in one mode."""

    def rise(run: RunResult) -> float | None:
        first, last = (run.evaluated(f"length_{n}", mode, "cross_entropy") for n in (size.lengths[0], size.lengths[-1]))
        return None if first is None or last is None else last - first

    return paired(f"rise of cross entropy, {mode} mode", rise, "ssa", other)


def _finds_more(name: str) -> AtMost:
    """Returns the test that full attention finds fewer needles than ssa; equal shares do not show it. A seed where neither finds one says nothing."""
    needles = _needle(name, "full", "")

    def difference(runs: dict[str, RunResult]) -> float | None:
        full, ssa = (needles.value(runs[name], 0) if name in runs else None for name in ("full", "ssa"))
        return None if full is None or ssa is None or full == ssa == 0 else full - ssa

    return AtMost("needles found, full mode, where any is found: full − ssa", difference, -LEAST_NEEDLES)
