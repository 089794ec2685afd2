"""The estimates as text: the rows that `python -m ssa_pretrain.plan` adds to its table, and its tables for --search, --scale and --measured."""

from collections.abc import Sequence

from ssa_pretrain.config import Auto, Recompute
from ssa_pretrain.config.hardware import PlanConfig
from ssa_pretrain.planning.calibration import Calibration, part_bytes, peak_bytes
from ssa_pretrain.planning.estimate import GIB, Estimate
from ssa_pretrain.planning.scaling import Point, efficiency
from ssa_pretrain.planning.search import Found, recomputations, settings_of, smaller, zero_stage
from ssa_pretrain.planning.work import TERMS
from ssa_pretrain.settings.quantities import duration

SHOWN_LAYOUTS, SHOWN_CHANGES = 10, 4
LEAST_SHOWN = 0.002  # of a step, for its parts


def estimate_rows(estimate: Estimate, vocab_size: int | None = None) -> list[tuple[str, str]]:
    """Returns the rows of the plan's table on a cluster, name and text.

    Args:
        estimate: the costs of the plan.
        vocab_size: the tokenizer's vocabulary, used if model.vocab_size=0.
    """
    return [
        ("hardware", _hardware(estimate)),
        *_memory(estimate, vocab_size),
        *_step(estimate),
        *_communication(estimate),
        *_run(estimate),
        *_basis(estimate),
    ]


def search_table(found: Found, config: PlanConfig, gpus: int) -> str:
    """Returns the fastest layouts as a table, and the settings to change for the first.

    Args:
        found: the result of a search.
        config: the configuration that it began with.
        gpus: their number.
    """
    ranked = found.ranked
    head = f"search: {found.num_tried:,} layouts of {gpus:,} GPUs that the rules accept, {len(ranked):,} of them fit\n"
    if not ranked:
        if found.smallest is None:
            return (
                head
                + "The batch does not divide among them: change training.global_batch_tokens or the number of GPUs.\n"
            )
        least = found.smallest
        need, has = least.needed_bytes / GIB, least.hardware.memory_gib
        words = " ".join(settings_of(least.config))
        return head + f"The smallest needs {need:.1f} of {has:g} GiB: more GPUs, or GPUs with more memory ({words}).\n"
    lines = [_layout_line()]
    lines += [_layout_line(number, layout) for number, layout in enumerate(ranked[:SHOWN_LAYOUTS], 1)]
    change = " ".join(word for word in settings_of(ranked[0].config) if word not in settings_of(config))
    return head + "\n".join(lines) + "\n" + f"for the first: {change or 'no change, it is the configuration'}\n"


def curve_table(title: str, points: Sequence[Point]) -> str:
    """Returns a scaling curve as a table.

    Args:
        title: of the curve.
        points: one per number of GPUs.
    """
    head = "gpus  layout (tp x pp x cp x dp)  rows  step, s  tokens/s   per GPU  speed per GPU     MFU  longest part       communication"
    head += "  goodput      days      USD"
    lines = [title, head]
    for point in points:
        found = point.estimate
        if found is None:
            lines.append(f"{point.gpus:>4}  no layout fits: the rules, the batch or the memory")
            continue
        plan, step = found.plan, found.step
        layout = f"{plan.tp} x {plan.pp} x {plan.cp} x {plan.dp}"
        rate, relative = found.tokens_per_second, efficiency(point, points) or 0.0
        lines.append(
            f"{point.gpus:>4}  {layout:<28}  {found.config.training.micro_batch_size:>4}  {step.total:>7.3f}  {rate / 1e6:>7.2f}M  "
            f"{rate / point.gpus:>8,.0f}  {relative:>13.1%}  {found.mfu:>6.1%}  {step.dominant:<17}  {step.communication / step.total:>13.1%}  "
            f"{found.goodput.share:>7.1%}  {found.run_seconds / 86400:>8.2f}  {found.cost:>7,.0f}"
        )
    return "\n".join([*lines, *_turning_point(points)]) + "\n"


def _turning_point(points: Sequence[Point]) -> list[str]:
    """Returns from which number of GPUs on more time is lost than computes, if the curve gets there."""
    for point in points:
        step = point.estimate and point.estimate.step
        if step and sum(step.work.values()) < step.total / 2:
            shares = {"communication": step.communication, "the pipeline's bubble": step.bubble}
            shares |= {"launching on the host": step.waiting_for_host, "waiting for drawn streams": step.imbalance}
            most = sorted(((seconds / step.total, name) for name, seconds in shares.items()), reverse=True)
            lost = ", ".join(f"{share:.0%} {name}" for share, name in most if share > 0.01)
            return [f"From {point.gpus:,} GPUs on less than half of a step computes: {lost}."]
    return []


def measured_table(fitted: Calibration) -> str:
    """Returns every measured run beside its estimate, and the factors."""
    lines = [
        "measured runs beside the model fitted to them (left out: by a fit without the run)",
        "      ms  planned   error  left out    GiB  planned   error  run",
    ]
    for index, run in enumerate(fitted.runs):
        time, without, memory = (
            errors[index] for errors in (fitted.time_errors, fitted.left_out_errors, fitted.memory_errors)
        )
        cells = [f"{'':>26}{'':>10}"]
        if run.seconds is not None and time is not None and without is not None:
            cells = [f"{run.seconds * 1e3:>8.1f} {run.seconds * (1 + time) * 1e3:>8.1f} {time:>+7.1%} {without:>+9.1%}"]
        if run.peak_bytes and memory is not None:
            cells.append(f"{run.peak_bytes / GIB:>6.1f} {peak_bytes(run) / GIB:>8.1f} {memory:>+7.1%}")
        else:
            cells.append(f"{'':>23}")
        lines.append(" ".join([*cells, f" {run.settings}"]))
        planned = part_bytes(run)
        for part, size in run.part_bytes.items():
            lines.append(
                f"{'':>37}{size / GIB:>6.2f} {planned[part] / GIB:>8.2f} {planned[part] / size - 1:>+7.1%}   {part}"
            )
    lines.append("factors: how many times longer than at the peak")
    lines += [f"{factor:>8.2f}  {term}" for term, factor in fitted.factors.items()]
    return "\n".join(lines) + "\n" + f"{_accuracy(fitted)}\n"


def _hardware(estimate: Estimate) -> str:
    """Returns the cluster in a few words."""
    hardware, world = estimate.hardware, estimate.plan.world_size
    nodes = -(-world // hardware.gpus_per_node)
    where = f"{world:,} GPU{'s' * (world > 1)} in {nodes:,} node{'s' * (nodes > 1)} of {hardware.gpus_per_node}"
    peaks = f"{hardware.memory_gib:g} GiB, {hardware.bf16_tflops:,.0f} TFLOP/s in bf16, {hardware.hbm_tb_per_s:g} TB/s"
    links = f"NVLink {hardware.nvlink_gb_per_s:g} and network {hardware.network_gb_per_s:g} GB/s per GPU"
    return f"{hardware.name}: {where}; {peaks}; {links}"


def _memory(estimate: Estimate, vocab_size: int | None) -> list[tuple[str, str]]:
    """Returns the memory by part, and what to change if the run does not fit."""
    hardware, plan = estimate.hardware, estimate.plan
    spare = hardware.memory_gib * GIB - estimate.needed_bytes
    verdict = "it fits" if estimate.fits else "it does not fit"
    if 0 <= spare < estimate.activations.output_layer:
        verdict = "it fits, but tightly: in bad cases the allocator's splits take as much as another copy of the logits"
    needs = f"with the allocator and CUDA {estimate.needed_bytes / GIB:.1f} of {hardware.memory_gib:g} GiB: {verdict}"
    error = f"± {estimate.fitted.memory_error:.1%}"
    rows = [
        (
            "memory",
            f"{_size(estimate.peak_bytes)} {error} at the peak on the fullest rank ({plan.parameters_per_rank:,} parameters); {needs}",
        )
    ]
    rows += [("", f"{_size(size):>10}  {part}") for part, size in estimate.memory_parts.items() if size]
    spaces = estimate.activations.workspaces
    if spaces.segment_sums:
        parts = f"segment sums {_size(spaces.segment_sums)}, inverted index {_size(spaces.index)}, selection {_size(spaces.selection)}"
        rows.append(("", f"the kernels' workspaces ({parts}) lie where the output layer's tensors do at the peak"))
        if estimate.activations.layer > estimate.activations.output_layer:
            rows[-1] = ("", f"the backward of one layer includes the kernels' workspaces: {parts}")
    kinds = recomputations(estimate, vocab_size)
    if len(kinds) > 1:
        peaks = " / ".join(f"{other.peak_bytes / GIB:.1f}" for other in kinds.values())
        times = " / ".join(f"{other.time_without_waiting:.3g}" for other in kinds.values())
        rows.append(("", f"with engine.recompute={' / '.join(kinds)}: {peaks} GiB and {times} s per step"))
    if estimate.fits:
        return rows
    changes = smaller(estimate, vocab_size)[:SHOWN_CHANGES]
    if not changes:
        return [*rows, ("to fit", "no one or two changes suffice; try --search, more GPUs, or GPUs with more memory")]
    for index, (words, found) in enumerate(changes):
        text = f"{words}: {found.needed_bytes / GIB:.1f} GiB, {found.step.total:.3g} s per step"
        rows.append(("to fit" if index == 0 else "", f"{'or ' * (index > 0)}{text}"))
    return rows


def _step(estimate: Estimate) -> list[tuple[str, str]]:
    """Returns the time of a step by part."""
    step, plan, mean = estimate.step, estimate.plan, estimate.config.document_tokens
    microbatches = f"{plan.num_microbatches} microbatch{'es' * (plan.num_microbatches > 1)} per rank"
    documents = "one document per row" if isinstance(mean, Auto) or mean == 0 else f"documents of {mean:,} tokens"
    rows = [("step time", f"{step.total:.3f} s ± {_time_error(estimate):.0%}, of {microbatches}, {documents}")]
    parts = {name: seconds for name, seconds in step.work.items() if seconds}
    parts |= {"launching on the host": step.waiting_for_host, "pipeline bubble": step.bubble}
    parts |= {"waiting for drawn streams": step.imbalance}
    parts |= {f"communication of {name}": seconds for name, seconds in step.groups.items()}
    for name, seconds in sorted(parts.items(), key=lambda part: -part[1]):
        if seconds > LEAST_SHOWN * step.total:
            what = f" ({TERMS[name]})" if name in ("memory traffic", "sampled full stream") else ""
            rows.append(("", f"{seconds:>8.3f} s {seconds / step.total:>6.1%}  {name}{what}"))
    return rows


def _communication(estimate: Estimate) -> list[tuple[str, str]]:
    """Returns what each group sends in a step."""
    rows = []
    for traffic in estimate.traffic:
        group = traffic.group
        speed = traffic.bandwidth(estimate.hardware, estimate.fitted.factors[traffic.term]) / 1e9
        place = "NVLink" if group.num_nodes == 1 else f"{group.num_nodes} nodes"
        seconds = estimate.communication_seconds(traffic)
        beside = ", beside computation" if traffic.hidden else ""
        text = f"{group.name} {group.size} ({place}): {_size(traffic.bytes)} per rank and step in {traffic.calls:,.0f} calls"
        rows.append(("sends" if not rows else "", f"{text} at {speed:.0f} GB/s, {seconds * 1e3:.1f} ms{beside}"))
    return rows


def _run(estimate: Estimate) -> list[tuple[str, str]]:
    """Returns speed, duration, price and goodput."""
    plan, found, hardware = estimate.plan, estimate.goodput, estimate.hardware
    rate = estimate.tokens_per_second
    speed = f"{rate:,.0f} tokens/s, {rate / plan.world_size:,.0f} per GPU, {estimate.mfu:.1%} MFU"
    days = estimate.run_seconds / 86400
    price = f"${estimate.cost:,.0f} at ${hardware.price_per_gpu_hour:g} per GPU-hour"
    saves = f"a checkpoint every {found.interval:,} steps" if found.interval else "a checkpoint at the end"
    stall = f"stalls training {found.cost.stall_seconds:.2g} s and takes {found.cost.write_seconds:.2g} s"
    failures = (
        f"a failure every {found.hours:,.1f} h costs {hardware.restart_minutes:g} min and the work since the last save"
    )
    rows = [
        ("speed", speed),
        ("time", f"{days:,.2f} days ({duration(estimate.run_seconds)}), {estimate.gpu_hours:,.0f} GPU-hours, {price}"),
    ]
    if estimate.evaluation_seconds > 0.001 * estimate.run_seconds:
        rows.append(("", f"{estimate.evaluation_seconds / estimate.run_seconds:.1%} of it evaluates held-out rows"))
    return [*rows, ("goodput", f"{found.share:.2%} of the time: {saves} {stall}; {failures}")]


def _basis(estimate: Estimate) -> list[tuple[str, str]]:
    """Returns what the estimates rest on."""
    rows = [("estimated", f"{_accuracy(estimate.fitted)}; --measured lists them")]
    if not estimate.is_measured:
        rows.append(
            (
                "",
                "none of this kind was measured: other models, methods and GPUs, and more GPUs, are extrapolated (docs/planning.md)",
            )
        )
    return rows


def _accuracy(fitted: Calibration) -> str:
    """Returns the errors of the cost model in one sentence."""
    times = [abs(error) for error in fitted.time_errors if error is not None]
    without = [abs(error) for error in fitted.left_out_errors if error is not None]
    typical = (sum(error * error for error in times) / len(times)) ** 0.5
    return (
        f"by a model fitted to {len(fitted.runs)} measured runs: times within {max(times):.1%} (typically {typical:.1%}; "
        f"within {max(without):.1%} if the run is left out), memory within {fitted.memory_error:.1%}"
    )


def _time_error(estimate: Estimate) -> float:
    """Returns the largest error of the times measured with the same engine."""
    engine = estimate.config.engine.name
    pairs = zip(estimate.fitted.time_errors, estimate.fitted.runs, strict=True)
    return max(abs(error) for error, run in pairs if error is not None and run.config.engine.name is engine)


def _layout_line(number: int = 0, layout: Estimate | None = None) -> str:
    """Returns a line of the table of layouts, or its head."""
    if layout is None:
        return "   #   tp  pp vpp  cp   dp  rows  recompute  ZeRO  memory, GiB  step, s  tokens/s per GPU    MFU  bubble  communication"
    plan, config, step = layout.plan, layout.config, layout.step
    recompute = "none" if config.engine.recompute is Recompute.none else str(config.engine.recompute)
    return (
        f"{number:>4} {plan.tp:>4} {plan.pp:>3} {plan.vpp:>3} {plan.cp:>3} {plan.dp:>4} {config.training.micro_batch_size:>5}  {recompute:<9} "
        f"{zero_stage(config):>5} {layout.needed_bytes / GIB:>12.1f} {step.total:>8.3f} {layout.tokens_per_second / plan.world_size:>17,.0f} "
        f"{layout.mfu:>6.1%} {step.bubble / step.total:>7.1%} {step.communication / step.total:>14.1%}"
    )


def _size(size: float) -> str:
    """Returns a size in GiB, or in MiB if it is small."""
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"
