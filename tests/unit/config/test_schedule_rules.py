"""Rules of what changes over a run: pieces of the learning rate, steps of the batch, branches and the running mean, one sentence each."""

from pathlib import Path

import pytest

from ssa_pretrain.cli import resolve_config
from ssa_pretrain.config import Config
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.config.rules import files
from ssa_pretrain.planning.plan import make_plan
from ssa_pretrain.planning.table import describe
from ssa_pretrain.settings.problems import ConfigError

CPU = Machine(world_size=1, has_gpu=False, has_transformer_engine=False, has_files=False)
BASE = ("experiment=quickstart", "model.vocab_size=4096")  # 250 steps of 4,096 tokens, 512 per row


def resolved(*overrides: str) -> Config:
    return resolve_config("train", (*BASE, *overrides), CPU)


def found(*overrides: str) -> list[str]:
    """Returns the problems of a command as lines."""
    try:
        resolved(*overrides)
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("optim.pieces=[{steps:10},{},{}]",),
            "optim.pieces[2] has no length, and optim.pieces[1] has none either; give one of steps, tokens and fraction",
        ),
        (
            ("optim.pieces=[{steps:10,fraction:0.1},{}]",),
            "optim.pieces[0] has several lengths; give one of steps, tokens and fraction",
        ),
        (
            ("optim.pieces=[{steps:10},{steps:230,to:0}]",),
            "optim.pieces end at step 240 of 250; leave out the length of one piece, which then takes the rest",
        ),
        (
            ("optim.pieces=[{steps:200},{},{fraction:0.5,to:0}]",),
            "optim.pieces[1] does not fit: the pieces are longer than the run's 250 steps; shorten the pieces or lengthen the run",
        ),
        (("optim.pieces=[{to:0}]",), "optim.pieces must rise above 0 somewhere; give a piece with to=1.0"),
        (("optim.pieces=[{to:-1},{steps:9}]",), "optim.pieces[0].to=-1.0 must be at least 0; try 0"),
        (("optim.pieces=3",), "optim.pieces=3 must be a list; try []"),
        (
            ("optim.pieces=[{to:1}]", "optim.schedule=wsd"),
            "optim.schedule=wsd and optim.pieces both say how the learning rate goes down; leave out one",
        ),
        (("optim.decay_fraction=0.1",), "optim.decay_fraction=0.1 has no effect under optim.schedule=cosine; try 0.2"),
        (
            ("optim.decay_shape=sqrt", "optim.pieces=[{}]"),
            "optim.decay_shape=sqrt has no effect beside optim.pieces, which are the whole schedule; try linear",
        ),
        (
            ("optim.schedule=wsd", "optim.warmup_fraction=0.5", "optim.decay_fraction=0.6"),
            "optim.decay_fraction=0.6 and optim.warmup_fraction=0.5 are together more than the whole run; try 0.5",
        ),
        (("optim.ema_decay=1",), "optim.ema_decay=1.0 must be at least 0 and below 1; try 0.999"),
        (
            ("evaluation.ema=true",),
            "evaluation.ema=true needs a running mean of the weights, but optim.ema_decay=0 keeps none; try optim.ema_decay=0.999",
        ),
        (
            ("optim.ema_decay=0.9", "engine=deepspeed", "deepspeed.zero_stage=3"),
            "optim.ema_decay=0.9 needs whole partitions of fp32 weights, which deepspeed.zero_stage=3 does not have; try deepspeed.zero_stage=2",
        ),
        (
            ("training.batch_steps=[{global_batch_tokens:8192}]",),
            "training.batch_steps[0] must have either a step or tokens; give the first step with this batch, such as step: 101",
        ),
        (
            ("training.batch_steps=[{step:9}]",),
            "training.batch_steps[0].global_batch_tokens=0 must be at least 1; try 1",
        ),
        (
            ("training.batch_steps=[{step:9,global_batch_tokens:8192},{step:9,global_batch_tokens:16384}]",),
            "training.batch_steps[1] begins at step 9, which must come after step 9, where the batch before it begins; try step: 10",
        ),
        (
            ("training.batch_steps=[{step:9,global_batch_tokens:9000}]",),
            "training.batch_steps[0].global_batch_tokens=9000 must be a multiple of sequence_length * micro_batch_size * dp = 2048; try 8192 or 10240",
        ),
        (
            ("training.batch_steps=[{tokens:9e9,global_batch_tokens:8192}]",),
            "training.batch_steps[0] begins at step 2197267, after the last step, 250; leave it out or lengthen the run",
        ),
        (
            ("checkpoint.init_from=a", "checkpoint.branch_from=b"),
            "checkpoint.branch_from=b and checkpoint.init_from=a both say where the run starts; leave out one: init_from starts at step 0 with "
            "weights only, branch_from continues",
        ),
    ],
)
def test_each_mistake_is_one_sentence(overrides: tuple[str, ...], message: str) -> None:
    assert found(*overrides) == [message]


def test_branch_is_an_existing_checkpoint_of_another_run(tmp_path: Path) -> None:
    def problems(named: str) -> list[str]:
        config = resolved(f"output_dir={tmp_path}/run", f"checkpoint.branch_from={named}")
        return [str(problem) for problem in files._branch(config, CPU)]

    (tmp_path / "other" / "checkpoints" / "step_00000100").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    assert problems(f"{tmp_path}/other@100") == problems(f"{tmp_path}/other") == []
    assert problems("nowhere") == [
        "checkpoint.branch_from=nowhere does not exist; give an earlier run's folder, RUN@STEP or a checkpoint"
    ]
    (line,) = problems(f"{tmp_path}/other@7")
    assert line.endswith("does not exist; it has step 100")
    (line,) = problems(f"{tmp_path}/run")
    assert line.endswith(
        "lies in this run's own output_dir={}; give the branch an output_dir of its own".format(tmp_path / "run")
    )


def test_plan_prints_pieces_and_batches_and_counts_the_mean() -> None:
    changing = (
        "optim.pieces=[{steps:20},{shape:constant},{fraction:0.2,to:0,shape:sqrt}]",
        "training.batch_steps=[{step:101,global_batch_tokens:8192},{tokens:1e6,global_batch_tokens:16384}]",
    )
    config = resolved(*changing, "optim.ema_decay=0.999")
    plan, plain = make_plan(config, 1), make_plan(resolved(), 1)
    text = describe(config, plan)
    assert (
        "the largest batch; 4,096 tokens from step 1, 8,192 tokens from step 101, 16,384 tokens from step 174" in text
    )
    assert "250 steps; 2,269,184 tokens" in text
    assert "rate       steps 1 to 20 (81.9k tokens): from 0 to 0.003, linear" in text
    assert "           steps 201 to 250 (819k tokens): from 0.003 to 0, sqrt" in text
    assert plan.total_tokens == 100 * 4096 + 73 * 8192 + 77 * 16384 == 2_269_184
    assert [plan.microbatches_at(step) for step in (0, 99, 100, 172, 173, 249)] == [2, 2, 4, 4, 8, 8]
    assert plan.rows_before(101) * 512 == plan.tokens_before(101) == 100 * 4096 + 8192
    assert plan.optimizer_bytes - plain.optimizer_bytes == 4 * plan.parameters_per_rank
    assert plan.checkpoint_bytes - plain.checkpoint_bytes == 4 * plan.parameters
    assert plain.tokens_before(250) == plain.total_tokens == 250 * 4096
