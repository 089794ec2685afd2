"""The stages of a run's mixture in rows, and the plan's lines on them: tokens and epochs of each part, by stage.

Under `data.packing=best_fit` the counts are exact once the index exists, which the first run builds (data/packed_index.py).
Before that, rows are taken to be full, and the lines begin with "about".
"""

from collections.abc import Mapping, Sequence

from ssa_pretrain.config import Config, RowPacking, batches
from ssa_pretrain.data.manifest import Manifest
from ssa_pretrain.data.mixture import Mixture, Reading, Stage
from ssa_pretrain.data.packed_index import PackedIndex, open_index
from ssa_pretrain.settings.quantities import compact

MAX_PARTS = 4  # listed per line


def rows_before(config: Config, step: int) -> int:
    """Returns the rows that the first `step` optimizer steps of a run read."""
    return batches(config.training).tokens_before(step) // config.data.sequence_length


def mixture_stages(config: Config) -> list[Stage]:
    """Returns the stages of a run's mixture, the first of which begins with the run."""
    sizes = batches(config.training)
    later = [(stage.steps_before(sizes), stage.weights) for stage in config.data.stages]
    return [Stage(0, config.data.weights), *(Stage(rows_before(config, step), weights) for step, weights in later)]


def stage_line(config: Config, step: int) -> str:
    """Returns the line for a stage of the mixture that begins after `step` steps; empty if none does."""
    sizes = batches(config.training)
    for number, stage in enumerate(config.data.stages, start=2):
        if stage.steps_before(sizes) == step:
            weights = ", ".join(f"{name} {weight:g}" for name, weight in stage.weights.items())
            return (
                f"stage {number} of the mixture begins with step {step + 1}: {weights or 'the weights of the dataset'}"
            )
    return ""


def epoch_lines(config: Config, steps: int, manifest: Manifest | None) -> list[tuple[str, str]]:
    """Returns the plan's lines on the data: epochs in all, then by stage and part, and what the first epoch leaves out.

    Args:
        config: the run.
        steps: its optimizer steps.
        manifest: the dataset's; None if it is not prepared yet.
    """
    if manifest is None or not manifest.splits["train"]:
        return []
    index, rows = _index(config, manifest), rows_before(config, steps)
    packed, about = _rows_per_epoch(config, manifest, index)
    try:
        mixture = Mixture(manifest, mixture_stages(config), config.data.sequence_length, packed=packed)
    except ValueError as error:
        return [("epochs", f"unknown: {error}")]
    found = mixture.readings(rows)
    total = sum(part.rows_per_epoch for part in mixture.parts)
    line = f"{about}{rows / total:.3g} over {total:,} row{'s' * (total != 1)}"
    if len(found) > 1:
        found.sort(key=lambda reading: -reading.epochs)
        shown = [f"{reading.part.name} {reading.epochs:.3g}" for reading in found[:MAX_PARTS]]
        line += f": {', '.join(shown)}"
        if len(found) > MAX_PARTS:
            line += f" … {found[-1].part.name} {found[-1].epochs:.3g}, the lowest of {len(found)}"
    lines = [("epochs", line), *_tail(found), *_stages(config, steps, mixture)]
    if index is not None:
        lines.append(("packing", index.sentence()))
    elif config.data.packing is RowPacking.best_fit:
        lines.append(("packing", "best fit: the first run builds the index; rows are taken to be full until then"))
    return lines


def _tail(found: Sequence[Reading]) -> list[tuple[str, str]]:
    """Returns the line on the tokens that the first epoch leaves out."""
    tail = sum(reading.part.tail for reading in found if reading.rows)
    each = ", summed over the parts" if len(found) > 1 else ""
    return [("", f"the first epoch leaves out the last {tail:,} tokens{each}; the second reads them")] if tail else []


def _stages(config: Config, steps: int, mixture: Mixture) -> list[tuple[str, str]]:
    """Returns a line per stage with tokens, share and epochs of each part, none if the mixture never changes."""
    sizes = batches(config.training)
    first = [0, *(stage.steps_before(sizes) for stage in config.data.stages)]
    lines = []
    for number, (begin, end) in enumerate(zip(first, [*first[1:], steps], strict=True), start=1):
        begin, end = min(begin, steps), min(end, steps)
        if len(first) == 1 or begin >= end:
            continue
        readings = mixture.readings(rows_before(config, end), rows_before(config, begin))
        readings = sorted((reading for reading in readings if reading.rows), key=lambda reading: -reading.rows)
        all_rows = sum(reading.rows for reading in readings)
        parts = [
            f"{r.part.name} {compact(r.rows * config.data.sequence_length)} tokens ({r.rows / all_rows:.1%}, epochs {r.epochs:.3g})"
            for r in readings[:MAX_PARTS]
        ]
        more = f" … and {len(readings) - MAX_PARTS} more" if len(readings) > MAX_PARTS else ""
        name = "stages" if not lines else ""
        lines.append((name, f"{number}: steps {begin + 1:,} to {end:,}: {', '.join(parts)}{more}"))
    return lines


def _index(config: Config, manifest: Manifest) -> PackedIndex | None:
    if config.data.packing is RowPacking.flow:
        return None
    return open_index(manifest, config.data.sequence_length, config.data.index_path)


def _rows_per_epoch(
    config: Config, manifest: Manifest, index: PackedIndex | None
) -> tuple[Mapping[str, int] | None, str]:
    """Returns the rows of each part under best fit, None for rows that flow, and "about " if there is no index yet."""
    if config.data.packing is RowPacking.flow:
        return None, ""
    if index is not None:
        return index.rows_per_epoch, ""
    tokens: dict[str, int] = {}
    for shard in manifest.splits["train"]:
        tokens[shard.part] = tokens.get(shard.part, 0) + shard.tokens
    return {name: -(-count // config.data.sequence_length) for name, count in tokens.items()}, "about "
