"""The DeepSpeed engine: ZeRO 0 to 3 over megatron-core's tensor and sequence parallelism.

Losses and results are step.py's. DeepSpeed does the backward, the reduction over data ranks, the optimizer step and its own checkpoints. Three
things that it does not do are done here. Under sequence parallelism a norm's gradient must be summed over tensor ranks, and that of the norms of
heads always; without the sum training drifts silently. Stage 0 in fp32 reports no gradient norm. Every group's settings are set at every step,
because loading restores the checkpoint's, which a branch may change, and gives every group those of group 0 from a ZeRO-3 universal checkpoint.

DeepSpeed's own engine is built on first use, so that weights are loaded into a plain model.
"""

import gc
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ssa_pretrain.checkpoint import sharded_weights
from ssa_pretrain.checkpoint.staging import HostCopies
from ssa_pretrain.checkpoint.weights import EMA, WEIGHTS, WeightsError, find_weights
from ssa_pretrain.config import Config, PrecisionName
from ssa_pretrain.config.deepspeed import ds_config
from ssa_pretrain.data.batches import Batch
from ssa_pretrain.engine.deepspeed import checkpoint
from ssa_pretrain.engine.deepspeed.mean import build_mean
from ssa_pretrain.engine.deepspeed.setup import (
    TensorParallelState,
    build_optimizer,
    exit_with_launcher,
    prepare_process,
)
from ssa_pretrain.engine.finite import first_not_finite, optimizer_tensors
from ssa_pretrain.engine.interface import EvaluationResult, PendingStep, Snapshot
from ssa_pretrain.engine.label_scores import label_scores
from ssa_pretrain.engine.replicas import ReplicaCheck
from ssa_pretrain.engine.step import Microbatches, Route
from ssa_pretrain.engine.step_sums import StepSums
from ssa_pretrain.model.attention import PackedTokens
from ssa_pretrain.model.llama import Llama
from ssa_pretrain.model.sharding import is_head_norm, partition_dim
from ssa_pretrain.model.spec import build_model
from ssa_pretrain.model.text_cache import TextCache
from ssa_pretrain.monitor.profiling import OPTIMIZER_RANGE
from ssa_pretrain.parallel.context import ContextParallel
from ssa_pretrain.parallel.state import Placement, limit_waiting
from ssa_pretrain.settings.problems import ConfigError, Problem


class DeepSpeedEngine:
    """The Llama of one rank under DeepSpeed."""

    def __init__(self, config: Config, placement: Placement, vocab_size: int) -> None:
        exit_with_launcher()
        prepare_process(placement)
        self.config, self.placement, self.vocab_size = config, placement, vocab_size
        self.stage = config.deepspeed.zero_stage
        self.microbatches = Microbatches(config, placement, ContextParallel(placement.groups.cp))  # cp is 1 here
        interval, is_sharded = config.training.replica_check_interval, self.stage == 3
        self.replicas = ReplicaCheck(interval, placement, sharded=is_sharded)
        self.ds_config = ds_config(config, placement.dp)
        self.copies = HostCopies(placement.device)
        _require_accepted(self.ds_config)
        self._ds = self._mean = None
        self.model = self._build_model()

    def train_step(self, batches: Sequence[Batch], *, step: int, learning_rate: float) -> PendingStep:
        """See `Engine.train_step`."""
        ds = self.ds
        if len(batches) != ds.gradient_accumulation_steps():
            self._accumulate(len(batches))
        batches, routes, sums = self.microbatches.begin_step(batches, step)
        decay = self.config.optim.weight_decay
        for group, own in zip(ds.basic_optimizer.param_groups, self._settings, strict=True):
            group.update(own, lr=learning_rate * own["lr_mult"], weight_decay=decay * own["wd_mult"])
        differing = self.replicas.compare(self._named_weights(), step)
        ds.train()
        grad_norm = None
        for batch, route in zip(batches, routes, strict=True):
            loss = self._loss(sums, batch, route)
            if ds.is_gradient_accumulation_boundary():  # this backward pass reduces the gradients
                self.microbatches.own_time.end(self.placement.device)
            ds.backward(loss)
            if self._must_compute_norm and ds.is_gradient_accumulation_boundary():
                grad_norm = self._grad_norm()
            skip = grad_norm is not None and not bool(grad_norm.isfinite())
            with torch.profiler.record_function(OPTIMIZER_RANGE), self._without_gradients() if skip else nullcontext():
                ds.step()  # before a step's last microbatch it only counts
        if grad_norm is None:  # after a step that it skipped, DeepSpeed may still report the norm of the step before
            grad_norm = ds.get_global_grad_norm() if ds.was_step_applied() else torch.inf
        if self._mean is not None:
            self._mean.update(step + 1, torch.as_tensor(grad_norm))
        return self.microbatches.step_result(sums, torch.as_tensor(grad_norm), differing)

    @torch.no_grad()
    def evaluate(
        self, batches: Sequence[Batch], *, mode: str, observe: Callable[..., None] | None = None
    ) -> EvaluationResult:
        """See `Evaluator.evaluate`."""
        self.ds.eval()
        batches = self.microbatches.localise(batches)
        sums, idle = self.microbatches.begin_evaluation(batches), self._idle_batches(len(batches))
        for batch in batches:
            self._loss(sums, batch, Route(mode, counterpart=True, observe=observe))
        for batch in idle:
            self._loss(StepSums(sums.counts), batch, Route(mode, counterpart=True))
        return self.microbatches.evaluation_result(sums)

    @torch.no_grad()
    def score_labels(self, batch: Batch, *, mode: str) -> Tensor:
        """See `Evaluator.score_labels`."""
        (batch,) = self.microbatches.localise([batch])
        logits = self._logits(batch, self.microbatches.pack(batch, Route(mode)))
        return label_scores(logits, batch.labels[0], self.vocab_size)

    @torch.no_grad()
    def last_logits(self, batch: Batch, *, mode: str, texts: TextCache | None = None) -> Tensor:
        """See `Evaluator.last_logits`."""
        (batch,) = self.microbatches.localise([batch])
        logits = self._logits(batch, self.microbatches.pack(batch, Route(mode, keep=texts)))
        return logits[batch.cu_seqlens[1:].long() - 1].float()

    @torch.no_grad()
    def next_logits(self, batch: Batch, *, mode: str, texts: TextCache) -> Tensor:
        """See `Evaluator.next_logits`."""
        batch = batch.to(self.placement.device)
        return self._logits(batch, self.microbatches.pack_newest(batch, mode, texts))[: len(texts)].float()

    def require_equal_replicas(self, step: int) -> None:
        """See `Engine.require_equal_replicas`."""
        self.replicas.require_equal_to_save(self._named_weights(), step)

    def first_not_finite(self) -> str | None:
        """See `Engine.first_not_finite`."""
        weights = [(name, getattr(p, "ds_tensor", p)) for name, p in self.model.named_parameters()]
        return first_not_finite([*weights, *optimizer_tensors([self.ds.basic_optimizer])])

    def save(self, folder: Path) -> None:
        """See `Engine.save`."""
        checkpoint.save(folder, self.ds, self.config, self.placement)
        if self._mean is not None:
            self._mean.save(folder, [self.ds.module], self.placement)

    def snapshot(self, *, weights: bool) -> Snapshot:
        """See `Engine.snapshot`."""
        ds, copies = self.ds, self.copies
        with copies.taking():
            write_state = checkpoint.copy_state(ds, copies, self.config, self.placement)
            parts = (copies, [ds.module], self.config, self.placement, self._gathering)
            copied = {WEIGHTS: sharded_weights.copy_weights(*parts)} if weights else {}
            if self._mean is not None:
                copied[EMA] = self._mean.copy(copies, [ds.module], self.placement)

        def write(folder: Path, group: dist.ProcessGroup) -> None:
            copies.wait()
            write_state(folder, group)
            for name, tensors in copied.items():
                sharded_weights.write_copies(folder / name, tensors, self.placement, group)

        return Snapshot(write, copies.device_seconds)

    def load(self, folder: Path) -> None:
        """See `Engine.load`."""
        self._reset()
        checkpoint.load(folder, self.ds, self.config, self.placement)
        if self._mean is not None:
            self._mean.load(folder, [self.ds.module], self.placement)

    def load_weights(self, folder: Path) -> None:
        """See `Evaluator.load_weights`."""
        found = find_weights(folder)
        if found is None:
            raise WeightsError(f"{folder} holds no common weights; save it again with checkpoint.weights=true")
        self._reset()
        sharded_weights.load_weights(found, [self.model], self.config, self.placement, new_scorer=True)

    def save_weights(self, folder: Path) -> None:
        """See `Engine.save_weights`."""
        sharded_weights.save_weights(folder, [self.ds.module], self.config, self.placement, self._gathering)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """See `Engine.ema_weights`."""
        models = [self.ds.module]
        assert self._mean is not None
        with self._mean.in_model(models):
            yield

    @property
    def ds(self):
        """DeepSpeed's engine around the model, built on first use."""
        if self._ds is None:
            import deepspeed

            optimizer = build_optimizer(self.model, self.config, self.placement)
            groups = optimizer.param_groups
            self._settings = [{key: value for key, value in g.items() if key != "params"} for g in groups]
            with redirect_stdout(io.StringIO()):  # some of its optimizers print memory reports at any log level
                self._ds, *_ = deepspeed.initialize(
                    model=self.model,
                    optimizer=optimizer,
                    config=self.ds_config,
                    mpu=TensorParallelState(self.placement),
                    dist_init_required=False,
                )
            limit_waiting(self.config.parallel)
            if self.stage == 0:
                # Its bf16 optimizer takes a step of zero gradients when it is built, and Adam would count that step.
                self._ds.basic_optimizer.state.clear()
            self._mean = build_mean(self.config, self._ds, self.placement)
        return self._ds

    def _named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Returns this rank's weights with their canonical names."""
        return sharded_weights.named_weights([self.ds.module], self.config, tied_copies=True)

    @property
    def _gathering(self) -> sharded_weights.Gathered:
        """The context in which a parameter is whole on each data rank."""
        return self._gathered if self.stage == 3 else sharded_weights.already_gathered

    @property
    def _must_compute_norm(self) -> bool:
        """Whether DeepSpeed reports no gradient norm."""
        return self.stage == 0 and self.config.precision.name is PrecisionName.fp32

    def _build_model(self) -> Llama:
        model = build_model(self.config, self.vocab_size, self.placement.groups).to(self.placement.device)
        checkpoint.without_extra_state(model)
        if self.config.parallel.tp > 1:
            for name, parameter in model.named_parameters():
                if getattr(parameter, "sequence_parallel", False) or is_head_norm(name):
                    parameter.register_hook(self._sum_over_tensor_ranks)
        return model

    def _reset(self) -> None:
        """Drops a DeepSpeed engine that has been used: DeepSpeed loads only into a new one."""
        if self._ds is not None:
            self._ds.destroy()
            self._ds = self._mean = None
            del self.model
            gc.collect()
            self.model = self._build_model()

    def _accumulate(self, count: int) -> None:
        """Makes the next steps ones of `count` microbatches, between two steps. DeepSpeed finds a step's end by dividing all microbatches so far."""
        if not self.config.training.batch_steps:
            raise ValueError(f"got {count} microbatches; a step has {self.ds.gradient_accumulation_steps()}")
        self.ds.set_train_batch_size(count * self.config.training.micro_batch_size * self.placement.dp)
        self.ds.micro_steps = 0
        if hasattr(self.ds.optimizer, "gradient_accumulation_steps"):
            self.ds.optimizer.gradient_accumulation_steps = count

    def _sum_over_tensor_ranks(self, grad: Tensor) -> Tensor:
        """Returns the whole gradient of a norm, which saw a slice of the tokens, or of the heads, on each tensor rank."""
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=self.placement.groups.tp)
        return total

    def _logits(self, batch: Batch, packed: PackedTokens) -> Tensor:
        """Returns the logits [T, padded V] of a microbatch on the device."""
        self.ds.eval()
        positions = batch.positions.unsqueeze(0)
        return self.ds(batch.tokens, positions, None, packed_seq_params=packed, runtime_gather_output=True)[0]

    def _loss(self, sums: StepSums, batch: Batch, route: Route) -> Tensor:
        """Runs a microbatch forward; returns its part of the step's loss and adds its results to `sums`."""
        packed = self.microbatches.pack(batch, route)
        sums.packed.append(packed)
        positions = batch.positions.unsqueeze(0)
        losses = self.ds(batch.tokens, positions, None, labels=batch.labels, packed_seq_params=packed)
        return sums.loss(losses, batch, route.main)

    def _grad_norm(self) -> Tensor:
        """Returns the global norm of the reduced gradients at stage 0; each parameter of the whole model counts once."""
        tp_rank_0 = self.placement.tp_rank == 0
        counted = [p for n, p in self.model.named_parameters() if tp_rank_0 or partition_dim(n) is not None]
        grads = [p.grad for p in counted if p.grad is not None]
        total = torch.stack([g.float().norm() for g in grads]).square().sum()
        dist.all_reduce(total, group=self.placement.groups.tp)
        return total.sqrt()

    @contextmanager
    def _without_gradients(self) -> Iterator[None]:
        """Takes the gradients from the optimizer when it steps: AdamW changes nothing then. DeepSpeed's clipping before needs them."""
        hook = self.ds.basic_optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.zero_grad())
        try:
            yield
        finally:
            hook.remove()

    def _idle_batches(self, count: int) -> list[Batch]:
        """Returns empty microbatches for a rank that has fewer than another: under ZeRO-3 every forward gathers weights from all ranks."""
        if self.stage < 3:
            return []
        most = torch.tensor(count, device=self.placement.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.placement.groups.dp)
        tokens = self.config.training.micro_batch_size * self.config.data.sequence_length
        zeros = torch.zeros(1, tokens, dtype=torch.int64, device=self.placement.device)
        starts = torch.arange(0, tokens + 1, self.config.data.sequence_length, dtype=torch.int32, device=zeros.device)
        positions = torch.arange(tokens, device=zeros.device) % self.config.data.sequence_length
        empty = Batch(0, zeros, zeros, zeros.float(), positions, starts)
        return [replace(empty, index=i) for i in range(count, int(most))]

    @staticmethod
    def _gathered(parameter: torch.nn.Parameter) -> AbstractContextManager:
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter])


def _require_accepted(settings: dict) -> None:
    """Validates DeepSpeed's configuration before a model is built, so that an unknown key is reported in one sentence.

    Raises:
        ConfigError: DeepSpeed does not accept the configuration.
    """
    from deepspeed.runtime.zero.config import get_zero_config

    try:
        get_zero_config(settings)
    except ValueError as error:  # pydantic's ValidationError lists every problem
        problems = [
            Problem(
                ".".join(["deepspeed.extra.zero_optimization", *map(str, wrong["loc"])]),
                wrong["input"],
                f"is not accepted by DeepSpeed ({wrong['msg']})",
                "leave it out",
            )
            for wrong in error.errors()
        ]
        raise ConfigError(problems) from None
