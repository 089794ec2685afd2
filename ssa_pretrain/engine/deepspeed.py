"""The DeepSpeed engine: ZeRO 0 to 3 over megatron-core's tensor and sequence parallelism.

The model, its packing, its losses and what is reported of a step are the megatron engine's; DeepSpeed does the backward, the reduction over data
ranks, the optimizer step and its own checkpoints. Three things it does not do by itself are done here. Under sequence parallelism a norm's gradient
is a sum over tensor ranks (left out, training drifts in silence). Stage 0 in fp32 reports no gradient norm. Every stage's learning rate and weight
decay are set anew at each step, because loading a ZeRO-3 universal checkpoint gives all groups the first one's.

Losses are normalised as in megatron.py: DeepSpeed, too, divides a microbatch's loss by their number and averages over data ranks, and what
`attach_loss` adds is scaled by neither. DeepSpeed's own engine is made when it is first used, so that weights are loaded into a plain model.
"""

import gc
import io
from collections.abc import Sequence
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ssa_pretrain.config import Config, PrecisionName
from ssa_pretrain.config.deepspeed import ds_config
from ssa_pretrain.data.batches import Batch
from ssa_pretrain.engine import common_weights, deepspeed_checkpoint
from ssa_pretrain.engine.deepspeed_setup import (
    TensorParallelState,
    build_optimizer,
    die_with_launcher,
    prepare_process,
)
from ssa_pretrain.engine.interface import EvaluationResult, StepResult
from ssa_pretrain.engine.megatron import MegatronEngine, Route, _Run
from ssa_pretrain.engine.pending import PendingStep
from ssa_pretrain.model.gpt import Llama
from ssa_pretrain.model.llama import build_model
from ssa_pretrain.parallel.context import ContextParallel
from ssa_pretrain.parallel.state import Placement, limit_waiting
from ssa_pretrain.profiling import OPTIMIZER_RANGE
from ssa_pretrain.settings.problems import ConfigError, Problem
from ssa_pretrain.weights import WeightsError, find_weights


class DeepSpeedEngine(MegatronEngine):
    """The Llama of one rank under DeepSpeed."""

    def __init__(self, config: Config, placement: Placement, vocab_size: int) -> None:
        die_with_launcher()
        prepare_process(placement)
        self.config, self.placement, self.vocab_size = config, placement, vocab_size
        self.stage = config.deepspeed.zero_stage
        self.context = ContextParallel(placement.groups.cp)  # of one rank: context parallelism is refused
        self.ds_config = ds_config(config, placement.dp)
        _check(self.ds_config)
        self._ds = None
        self.model = self._build_model()

    def train_step(self, batches: Sequence[Batch], *, step: int, learning_rate: float) -> PendingStep:
        """See `Engine.train_step`."""
        ds = self.ds
        batches = self._local(batches)
        count, (labels, _, dilution) = len(batches), self._count(batches)
        if count != ds.gradient_accumulation_steps():
            raise ValueError(f"{count} microbatches were given, and the batch makes {ds.gradient_accumulation_steps()}")
        routes = self._routes(batches, step, dilution)
        for group, decay in zip(ds.basic_optimizer.param_groups, (self.config.optim.weight_decay, 0.0), strict=True):
            group["lr"], group["weight_decay"] = learning_rate, decay
        ds.train()
        run, grad_norm = _Run(count * self.placement.dp / labels, dilution), None
        for batch, route in zip(batches, routes, strict=True):
            ds.backward(self._loss(run, batch, route))
            if self._norm_is_ours and ds.is_gradient_accumulation_boundary():
                grad_norm = self._grad_norm()
            with torch.profiler.record_function(OPTIMIZER_RANGE):  # before a step's last microbatch it only counts
                ds.step()
        norm = torch.as_tensor(ds.get_global_grad_norm() if grad_norm is None else grad_norm)
        figures = torch.cat([self._reduce(run), torch.stack([labels, norm.to(labels)])])

        def interpret(values: list[float]) -> StepResult:
            sums = self._sums(values)
            return StepResult(
                cross_entropy=sums.loss / values[-2],
                alignment_by_layer=sums.alignment,
                captured_mass_by_layer=sums.mass,
                grad_norm=values[-1],
                full_share=sums.full_share,
            )

        return PendingStep(figures, interpret)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], *, mode: str) -> EvaluationResult:
        """See `Engine.evaluate`."""
        self.ds.eval()
        batches = self._local(batches)
        labels, tokens, dilution = self._count(batches)
        run, idle = _Run(1.0, dilution), self._idle_batches(len(batches))
        route = Route(mode, counterpart=True)
        for batch in batches:
            self._loss(run, batch, route)
        for batch in idle:
            self._loss(_Run(1.0), batch, route)
        sums = self._sums(self._reduce(run).tolist())
        cross_entropy = sums.loss / max(1.0, float(labels))
        return EvaluationResult(cross_entropy, sums.alignment, sums.mass, int(labels), int(tokens))

    @torch.no_grad()
    def last_logits(self, batch: Batch, *, mode: str) -> Tensor:
        """See `Engine.last_logits`."""
        self.ds.eval()
        (batch,) = self._local([batch])
        packed = self._packed(batch, Route(mode))
        positions = batch.positions.unsqueeze(0)
        logits = self.ds(batch.tokens, positions, None, packed_seq_params=packed, runtime_gather_output=True)
        return logits[0, batch.cu_seqlens[1:].long() - 1].float()

    def save(self, folder: Path) -> None:
        """See `Engine.save`."""
        deepspeed_checkpoint.save(folder, self.ds, self.config, self.placement)

    def load(self, folder: Path) -> None:
        """See `Engine.load`."""
        self._start_afresh()
        deepspeed_checkpoint.load(folder, self.ds, self.config, self.placement)

    def load_weights(self, folder: Path) -> None:
        """See `Engine.load_weights`."""
        found = find_weights(folder)
        if found is None:
            raise WeightsError(f"{folder} holds no common weights; save it again with checkpoint.weights=true")
        self._start_afresh()
        common_weights.load_weights(found, [self.model], self.config, self.placement)

    def save_weights(self, folder: Path) -> None:
        """See `Engine.save_weights`."""
        ds = self.ds
        model = ds.module
        gathered = self._gathered if self.stage == 3 else common_weights.whole
        common_weights.save_weights(folder, [model], self.config, self.placement, gathered)

    @property
    def ds(self):
        """DeepSpeed's engine around the model, made on first use."""
        if self._ds is None:
            import deepspeed

            optimizer = build_optimizer(self.model, self.config, self.placement)
            with redirect_stdout(
                io.StringIO()
            ):  # some of its optimizers print reports on memory whatever the log level
                self._ds, *_ = deepspeed.initialize(
                    model=self.model,
                    optimizer=optimizer,
                    config=self.ds_config,
                    mpu=TensorParallelState(self.placement),
                    dist_init_required=False,
                )
            limit_waiting(self.config.parallel)
            if self.stage == 0:
                # Its bf16 optimizer takes a step of zero gradients as it starts, and Adam would count it.
                self._ds.basic_optimizer.state.clear()
        return self._ds

    @property
    def _norm_is_ours(self) -> bool:
        return self.stage == 0 and self.config.precision.name is PrecisionName.fp32

    def _build_model(self) -> Llama:
        model = build_model(self.config, self.vocab_size, self.placement.groups).to(self.placement.device)
        deepspeed_checkpoint.without_extra_state(model)
        if self.config.parallel.sequence_parallel:
            for parameter in model.parameters():
                if getattr(parameter, "sequence_parallel", False):
                    parameter.register_hook(self._sum_over_tensor_ranks)
        return model

    def _start_afresh(self) -> None:
        """Drop a DeepSpeed engine that has been used: it loads into a new one only."""
        if self._ds is not None:
            self._ds.destroy()
            self._ds = None
            del self.model
            gc.collect()
            self.model = self._build_model()

    def _sum_over_tensor_ranks(self, grad: Tensor) -> Tensor:
        """Return the whole gradient of a norm that saw a slice of the tokens on each tensor rank."""
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=self.placement.groups.tp)
        return total

    def _loss(self, run: _Run, batch: Batch, route: Route) -> Tensor:
        """Run a microbatch forward and return its part of the step's loss; what it finds goes into `run`."""
        packed = self._packed(batch, route)
        run.packed.append(packed)
        positions = batch.positions.unsqueeze(0)
        losses = self.ds(batch.tokens, positions, None, labels=batch.labels, packed_seq_params=packed)
        return run.loss(losses, batch.loss_mask)[0]

    def _grad_norm(self) -> Tensor:
        """Return the global norm of the reduced gradients at stage 0, each parameter of the whole model counted once."""
        first = self.placement.tp_rank == 0
        counted = [p for p in self.model.parameters() if first or getattr(p, "tensor_model_parallel", False)]
        owned = [p.grad for p in counted if p.grad is not None]
        total = torch.stack([g.float().norm() for g in owned]).square().sum()
        dist.all_reduce(total, group=self.placement.groups.tp)
        return total.sqrt()

    def _idle_batches(self, count: int) -> list[Batch]:
        """Return what a rank with fewer microbatches than another runs beside its own: under ZeRO-3 every forward gathers weights from all."""
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


def _check(settings: dict) -> None:
    """Have DeepSpeed read its configuration before a model is built, so that a word it does not know is one sentence.

    Raises:
        ConfigError: it does not accept the configuration.
    """
    from deepspeed.runtime.zero.config import get_zero_config

    try:
        get_zero_config(settings)
    except ValueError as error:  # pydantic's, which lists what it found
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
