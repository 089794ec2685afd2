"""ssa_pretrain/engine/muon.py: a step over fused parameters is torch's Muon over the separate matrices."""

import pytest
import torch

from ssa_pretrain.config import Config, MuonScale, OptimConfig
from ssa_pretrain.engine.megatron.skipping import SkipFlag
from ssa_pretrain.engine.muon import SplitMuon, orthogonalise, update_scale
from ssa_pretrain.huggingface.weights import Llama, to_hugging_face
from ssa_pretrain.model.matrices import HIDDEN, join, matrix_shapes, owners, rows_by_matrix, split, whole_shapes
from support.errors import relative, require_as_near

STEPS, LR, DECAY = 3, 0.05, 0.1


def small(*, gate: bool = True) -> Config:
    """Returns a model with two kv heads of three query heads each."""
    config = Config()
    model, config.attention.gate = config.model, gate
    model.hidden_size, model.ffn_hidden_size, model.head_dim = 20, 28, 4
    model.num_attention_heads, model.num_kv_heads = 6, 2
    return config


def parameters(config: Config) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = whole_shapes(config)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def build(config: Config, weights: dict, optim: OptimConfig, dtype: torch.dtype) -> SplitMuon:
    groups = [{"params": [weights[name]], "kind": name, "rows": rows_by_matrix(name, config)} for name in HIDDEN]
    optim.lr, optim.weight_decay = LR, DECAY
    return SplitMuon(groups, optim, dtype=dtype)


def separate(name: str, whole: torch.Tensor, config: Config) -> list[torch.Tensor]:
    """Returns a parameter's matrices by the export's map, which shares no code with matrices.py."""
    llama = Llama.of(config, 128)
    where = "self_attention" if name in HIDDEN[:2] else "mlp"
    return [m.clone() for m in to_hugging_face(f"decoder.layers.0.{where}.{name}", whole, llama).values()]


@pytest.mark.parametrize("scale", MuonScale)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("gate", [True, False])
def test_step_is_torchs_muon_on_separate_matrices(gate, nesterov, scale):
    config, optim = small(gate=gate), OptimConfig()
    optim.muon.nesterov, optim.muon.scale = nesterov, scale
    weights = parameters(config)
    alone = {name: [torch.nn.Parameter(m) for m in separate(name, w.detach(), config)] for name, w in weights.items()}
    assert [len(alone[name]) for name in HIDDEN] == [4 if gate else 3, 1, 2, 1]
    ours = build(config, weights, optim, torch.bfloat16)
    theirs = torch.optim.Muon(
        [p for many in alone.values() for p in many],
        lr=LR,
        weight_decay=DECAY,
        momentum=0.95,
        nesterov=nesterov,
        adjust_lr_fn=scale.value,
    )
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for name, weight in weights.items():
            weight.grad = torch.randn(weight.shape, generator=generator)
            for one, grad in zip(alone[name], separate(name, weight.grad, config), strict=True):
                one.grad = grad
        ours.step()
        theirs.step()
    for name, weight in weights.items():
        for found, wanted in zip(separate(name, weight.detach(), config), alone[name], strict=True):
            torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-6)


def test_fused_matrix_is_another_update():
    """The comparison above would notice a parameter that is taken for one matrix."""
    config = small()
    grad = torch.randn(whole_shapes(config)[HIDDEN[0]])
    parts = [
        orthogonalise(m, (3.4445, -4.775, 2.0315), 5, 1e-7) for m in split(grad, rows_by_matrix(HIDDEN[0], config))
    ]
    whole = orthogonalise(grad, (3.4445, -4.775, 2.0315), 5, 1e-7)
    assert relative(whole, join(parts, rows_by_matrix(HIDDEN[0], config))) > 0.1


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 16)])
def test_orthogonalisation_is_as_near_to_fp64_as_torchs(shape):
    """In bf16 as near as torch.optim.Muon's update, in fp32 to rounding; its singular values are near 1."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    settings = ((3.4445, -4.775, 2.0315), 5, 1e-7)
    exact = orthogonalise(matrix.double(), *settings)
    values = torch.linalg.svdvals(exact)
    assert values.min() > 0.6 and values.max() < 1.25
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = matrix.clone()
    muon = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False)
    muon.step()
    theirs = -weight.detach() / update_scale(shape, MuonScale.original)
    require_as_near(orthogonalise(matrix.bfloat16(), *settings), theirs, exact, factor=1.0, floor=1e-6)
    assert relative(orthogonalise(matrix, *settings), exact) < 1e-4


def test_skipped_step_changes_no_bit():
    config = small()
    weights = parameters(config)
    muon = build(config, weights, OptimConfig(), torch.float32)
    flag, plain = SkipFlag(muon, torch.device("cpu")), parameters(config)
    unflagged = build(config, plain, OptimConfig(), torch.float32)
    for step, skip in enumerate((True, False, True, False)):
        before = [w.detach().clone() for w in weights.values()]
        for name in weights:
            grad = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(step))
            weights[name].grad, plain[name].grad = grad.fill_(torch.nan) if skip else grad, grad.clone()
        flag.set(torch.tensor(skip))
        muon.step()
        if not skip:
            unflagged.step()
        assert all(torch.equal(a, b) for a, b in zip(before, weights.values(), strict=True)) == skip
        assert all(torch.isfinite(state["momentum_buffer"]).all() for state in muon.state.values())
    for one, other in zip(weights.values(), plain.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_split_is_undone_by_join_and_shapes_are_its_own():
    config, shapes = small(), []
    for name, (count, columns) in whole_shapes(config).items():
        whole, rows = torch.randn(count, columns), rows_by_matrix(name, config)
        parts = split(whole, rows)
        shapes += [tuple(part.shape) for part in parts]
        assert torch.equal(join(parts, rows), whole)
        for found, wanted in zip(parts, separate(name, whole, config), strict=True):
            assert torch.equal(found, wanted)
    assert shapes == matrix_shapes(config)


def test_owners_are_balanced():
    sizes, load = [7] * 24 + [100, 3, 3], [0] * 4
    for size, owner in zip(sizes, owners(sizes, 4), strict=True):
        load[owner] += size
    assert max(load) == 100  # the largest by itself
    assert sorted(load)[-2] - min(load) <= 7
    assert owners([3, 2], 4) == [0, 1]
