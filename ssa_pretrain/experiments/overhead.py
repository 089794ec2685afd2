"""The numbers of a benchmark of methods (`python -m ssa_pretrain.bench cases=methods parts=1`): times, ratios, parts, and the claim on SSA's overhead."""

from pathlib import Path
from typing import Any

from ssa_pretrain.bench.parts import read_parts
from ssa_pretrain.bench.tables import Result, read
from ssa_pretrain.experiments.verdicts import Verdict

PAPER = 1.17  # time of an SSA step over MoBA's, by the paper
PREFIX = "share "


def bench_content(name: str, folder: Path) -> dict[str, Any]:
    """Returns a benchmark's rows by variant: ms, spread, ratios to moba and full, tokens/s, peak and parts; and the claim.

    Args:
        name: of the benchmark.
        folder: its results.
    """
    results = {variant: result for variant, result in read(folder).items() if ", main " not in variant}
    parts = read_parts(folder)
    moba, full = (_named(results, method) for method in ("moba", "full"))
    rows = []
    for variant, result in results.items():
        rows.append(
            {
                "variant": variant.removeprefix(PREFIX),
                "ms": result.ms,
                "spread": result.spread,
                "over_moba": result.ms / moba.ms if moba else None,
                "over_full": result.ms / full.ms if full else None,
                "tokens_per_second": result.tokens_per_second_per_gpu,
                "peak_gib": result.peak_gib,
                "parts": parts.get(variant, {}),
            }
        )
    any_result = next(iter(results.values()), None)
    about = (
        {"device": any_result.device, "versions": any_result.versions, "command": any_result.command}
        if any_result
        else {}
    )
    return {"name": name, "rows": rows, "claim": _claim(name, _named(results, "ssa r=1"), moba), **about}


def _named(results: dict[str, Result], method: str) -> Result | None:
    """Returns the result of a method, whatever the length in its name."""
    return next((r for name, r in results.items() if name.removeprefix(PREFIX).rpartition(" ")[0] == method), None)


def _claim(name: str, ssa: Result | None, moba: Result | None) -> dict[str, Any] | None:
    """Returns the claim that SSA takes at most 17% more than MoBA: judged with the spread of both times over their turns."""
    if ssa is None or moba is None:
        return None
    ratio = ssa.ms / moba.ms
    error = ratio * (ssa.spread + moba.spread)
    verdict = Verdict.cannot_be_told
    if ratio + error <= PAPER:
        verdict = Verdict.holds
    elif ratio - error > PAPER:
        verdict = Verdict.does_not
    mean = {"mean": ratio, "error": error, "count": 1}
    test = {
        "label": "time of ssa / time of moba; ± spread over the turns",
        "margin": PAPER,
        "values": [ratio],
        "mean": mean,
    }
    text = f"a step of ssa takes at most 17% more than moba's ({name})"
    return {"text": text, "verdict": verdict.value, "tests": [test | {"verdict": verdict.value}]}
