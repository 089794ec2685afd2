"""Rules of what changes over a run: the pieces of the learning rate fill it, its batches split evenly, and the mean of the weights has a place."""

from itertools import pairwise

from ssa_pretrain.config import Config, EngineName, batches, piece_bounds
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.config.schedule import schedule_problems
from ssa_pretrain.settings.problems import Problem, join, nearest_multiples

LENGTH = ("training.steps", "training.total_tokens", "training.global_batch_tokens", "training.batch_steps")


def _pieces(config: Config, _: Machine) -> list[Problem]:
    """The pieces fill the run: they neither overlap nor leave steps without a rate."""
    pieces, steps = config.optim.pieces, config.training.num_steps()
    if not pieces or schedule_problems(config.optim):
        return []
    bounds = piece_bounds(pieces, steps, batches(config.training))
    for i, (first, last) in enumerate(pairwise(bounds)):
        if last < first or last > steps:
            rule = f"does not fit: the pieces are longer than the run's {steps} steps"
            return [Problem(f"optim.pieces[{i}]", None, rule, "shorten the pieces or lengthen the run", LENGTH)]
    if bounds[-1] != steps:
        rule = f"end at step {bounds[-1]} of {steps}"
        advice = "leave out the length of one piece, which then takes the rest"
        return [Problem("optim.pieces", None, rule, advice, LENGTH)]
    return []


def _batch_steps(config: Config, machine: Machine) -> list[Problem]:
    """Each batch splits evenly into rows, microbatches and data-parallel ranks, and begins within the run."""
    parallel, training = config.parallel, config.training
    unit = training.micro_batch_size * config.data.sequence_length
    if "train" not in machine.splits or not training.batch_steps or unit < 1:
        return []
    degrees = parallel.tp * parallel.pp * parallel.cp
    dp = max(1, (parallel.world_size or machine.world_size or 1) // max(1, degrees))
    rounds = parallel.pp if parallel.vpp > 1 else 1
    reads = ("parallel", "world_size", "training.micro_batch_size", "data.sequence_length", *LENGTH)
    found, steps = [], training.num_steps()
    for i, (first, tokens) in enumerate(batches(training).phases[1:]):
        key = f"training.batch_steps[{i}]"
        if tokens % (unit * dp * rounds):
            rule = f"must be a multiple of sequence_length * micro_batch_size * dp{' * pp' * (rounds > 1)} = {unit * dp * rounds}"
            advice = f"try {join(nearest_multiples(tokens, unit * dp * rounds))}"
            found.append(Problem(f"{key}.global_batch_tokens", tokens, rule, advice, reads))
        elif first >= steps:
            rule = f"begins at step {first + 1}, after the last step, {steps}"
            found.append(Problem(key, None, rule, "leave it out or lengthen the run", reads))
    return found


def _mean_of_weights(config: Config, machine: Machine) -> list[Problem]:
    """The running mean of the weights lies beside fp32 main weights, which ZeRO-3 keeps in pieces that no other part of DeepSpeed can address."""
    optim, deepspeed = config.optim, config.deepspeed
    is_deepspeed = config.engine.name is EngineName.deepspeed and "train" in machine.splits
    if optim.ema_decay and is_deepspeed and deepspeed.zero_stage == 3:
        rule = "needs whole partitions of fp32 weights, which deepspeed.zero_stage=3 does not have"
        advice, reads = "try deepspeed.zero_stage=2", ("deepspeed.zero_stage",)
        return [Problem("optim.ema_decay", optim.ema_decay, rule, advice, reads)]
    if config.evaluation.ema and not optim.ema_decay:
        rule = "needs a running mean of the weights, but optim.ema_decay=0 keeps none"
        return [Problem("evaluation.ema", True, rule, "try optim.ema_decay=0.999", ("optim.ema_decay",))]
    return []


SCHEDULE_RULES = (_pieces, _batch_steps, _mean_of_weights)
