"""The model against plain mathematics: a float64 Llama with SSA, written from the definition over one document at a time, on the engine's weights."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from ssa_kernels import qkv_rope
from ssa_pretrain.config import Config, Method, PrecisionName, Score
from ssa_pretrain.data.batches import Batch, collate
from ssa_pretrain.data.rows import Row
from support.small_datasets import cut, write_dataset

VOCAB, LENGTH = 90, 80
HEADS, GROUPS, DIM = 4, 2, 8


def small_config(*, gate: bool = True, tied: bool = True) -> Config:
    """Returns a two-layer model whose streams differ."""
    config = Config()
    model = config.model
    model.num_layers, model.hidden_size, model.ffn_hidden_size = 2, 32, 48
    model.num_attention_heads, model.num_kv_heads, model.head_dim = HEADS, GROUPS, DIM
    model.vocab_divisor, model.init_std, model.tie_embeddings = 32, 0.2, tied
    config.attention.top_k, config.attention.gate = 2, gate
    config.data.sequence_length = LENGTH
    config.precision.name = PrecisionName.fp32
    return config


def microbatch() -> Batch:
    """Returns two rows, the first of two documents."""
    generator = np.random.default_rng(3)
    rows = []
    for starts in ([0, 53], [0]):
        flags = np.zeros(LENGTH + 1, dtype=bool)
        flags[starts] = True
        rows.append(Row(generator.integers(0, VOCAB, LENGTH + 1), flags))
    return collate(rows, index=0)


def microbatches() -> list[Batch]:
    """Returns the same two rows as a microbatch each."""
    generator = np.random.default_rng(3)
    found = []
    for index, starts in enumerate(([0, 53], [0])):
        flags = np.zeros(LENGTH + 1, dtype=bool)
        flags[starts] = True
        found.append(collate([Row(generator.integers(0, VOCAB, LENGTH + 1), flags)], index=index))
    return found


@pytest.fixture(scope="module")
def placement():
    """One process."""
    from ssa_pretrain.parallel.state import start, stop

    yield start(Config().parallel, seed=1)
    stop()


class Oracle:
    """A Llama in float64 over one document; `weights` are megatron-core's by name."""

    def __init__(self, weights: dict[str, Tensor], config: Config) -> None:
        self.w = {name: tensor.detach().double() for name, tensor in weights.items()}
        self.config = config

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config.model.norm_eps).sqrt() * self.w[name]

    def rope(self, x: Tensor) -> Tensor:
        """Turn each pair (i, i + D/2) of each head as a complex number."""
        frequency = self.config.model.rope_theta ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
        turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.arange(len(x))[:, None] * frequency)
        pairs = torch.complex(x[..., : DIM // 2], x[..., DIM // 2 :]) * turn[:, None, :]
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    def chosen(self, q: Tensor, k: Tensor, t: int, group: int) -> list[int]:
        """Returns the keys that token t may see in the sparse stream of a key-value head."""
        size, top_k = self.config.attention.block_size, self.config.attention.top_k
        own = t // size
        blocks = [own]
        if own:
            means = torch.stack([k[b * size : (b + 1) * size, group].mean(0) for b in range(own)]).float().double()
            heads = range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS)
            importance = sum((means @ q[t, h] / math.sqrt(DIM)).softmax(0) for h in heads)
            order = sorted(range(own), key=lambda b: (float(importance[b]), b), reverse=True)
            blocks += order[: top_k - 1]
        return [j for b in sorted(blocks) for j in range(b * size, min((b + 1) * size, t + 1))]

    def streams(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the full stream, the sparse stream and the captured mass, token by token and head by head."""
        full, sparse, mass = torch.zeros_like(q), torch.zeros_like(q), torch.zeros(q.shape[:2], dtype=torch.float64)
        for t in range(len(q)):
            for h in range(HEADS):
                group = h * GROUPS // HEADS
                logits = k[: t + 1, group] @ q[t, h] / math.sqrt(DIM)
                full[t, h] = logits.softmax(0) @ v[: t + 1, group]
                keys = self.chosen(q, k, t, group)
                sparse[t, h] = logits[keys].softmax(0) @ v[keys, group]
                mass[t, h] = logits.softmax(0)[keys].sum()
        return full, sparse, mass

    def prepared(self, q: Tensor, k: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Returns queries and keys as RoPE finds them: keys convolved token by token, then both normed, if the model has the weights."""
        if (filters := self.w.get(name + "key_convolution.weight")) is not None:
            taps, plain = filters.shape[-1], k
            by_tap = filters.view(GROUPS, DIM, taps)
            sums = [
                sum(by_tap[..., taps - 1 - d] * plain[t - d] for d in range(min(taps, t + 1))) for t in range(len(k))
            ]
            k = torch.stack([key + c / (1 + (-c).exp()) for key, c in zip(plain, sums, strict=True)])
        if name + "q_layernorm.weight" in self.w:
            q, k = self.norm(q, name + "q_layernorm.weight"), self.norm(k, name + "k_layernorm.weight")
        return q, k

    def gated(self, full: Tensor, sparse: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> list[Tensor]:
        """Returns both streams' outputs of the layer."""
        if not gate.shape[-1]:
            return [full, sparse]
        opened = 1 / (1 + (-gate.reshape(len(full), HEADS, 1)).exp())
        return [full * opened, sparse * opened]

    def layer(self, x: Tensor, number: int, main: str) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (output, alignment, captured mass) of one layer, the last two by token."""
        name = f"decoder.layers.{number}."
        mixed = self.norm(x, name + "input_layernorm.weight") @ self.w[name + "self_attention.linear_qkv.weight"].T
        per_group = HEADS // GROUPS
        mixed = mixed.view(len(x), GROUPS, -1)
        parts = [per_group * DIM, DIM, DIM, mixed.shape[-1] - (per_group + 2) * DIM]
        q, k, v, gate = mixed.split(parts, dim=-1)
        q, k = self.prepared(q.reshape(len(x), HEADS, DIM), k, name + "self_attention.")
        q, k = self.rope(q), self.rope(k)
        full, sparse, mass = self.streams(q, k, v)
        full, sparse = self.gated(full, sparse, q, k, v, gate)
        gap = (full - sparse).abs()
        alignment = 2 * torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean(dim=(1, 2))
        out = {"full": full, "sparse": sparse}[main].flatten(1)
        x = x + out @ self.w[name + "self_attention.linear_proj.weight"].T
        up = self.norm(x, name + "pre_mlp_layernorm.weight") @ self.w[name + "mlp.linear_fc1.weight"].T
        a, b = up.chunk(2, dim=-1)
        x = x + (a / (1 + (-a).exp()) * b) @ self.w[name + "mlp.linear_fc2.weight"].T
        return x, alignment, mass.mean(1)

    def metrics(self, batch: Batch, main: str, drawn: Tensor | None = None) -> list[float]:
        """Returns cross entropy, then alignment and captured mass by layer, of a microbatch; the layers' over its tokens or those drawn."""
        ends = batch.cu_seqlens.tolist()
        counted = torch.ones(ends[-1], dtype=torch.float64) if drawn is None else drawn.double()
        layers = self.config.model.num_layers
        loss, alignment, mass = 0.0, [0.0] * layers, [0.0] * layers
        output = self.w.get("output_layer.weight", self.w["embedding.word_embeddings.weight"])
        for begin, end in itertools.pairwise(ends):
            x = self.w["embedding.word_embeddings.weight"][batch.tokens[0, begin:end]]
            for n in range(layers):
                x, a, m = self.layer(x, n, main)
                alignment[n] += float(a @ counted[begin:end])
                mass[n] += float(m @ counted[begin:end])
            logits = self.norm(x, "decoder.final_layernorm.weight") @ output.T
            picked = logits.log_softmax(-1)[torch.arange(end - begin), batch.labels[0, begin:end]]
            loss -= float((picked * batch.loss_mask[0, begin:end]).sum())
        tokens = float(counted.sum())
        return [loss / float(batch.loss_mask.sum()), *(a / tokens for a in alignment), *(m / tokens for m in mass)]


@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize(("gate", "tied"), [(True, True), (False, False)])
def test_model_equals_the_definition(placement, mode, gate, tied):
    from ssa_pretrain.engine import build_engine
    from ssa_pretrain.engine.megatron.checkpoint import unwrap

    config = small_config(gate=gate, tied=tied)
    engine = build_engine(config, placement, VOCAB)
    batch = microbatch()
    found = engine.evaluate([batch], mode=mode)
    weights = dict(unwrap(engine.chunks[0]).named_parameters())
    wanted = Oracle(weights, config).metrics(batch, mode)
    # fp32 has 24 mantissa bits and each value is a mean over hundreds of numbers; two layers of products stay within 1e-5.
    np.testing.assert_allclose(
        [found.cross_entropy, *found.alignment_by_layer, *found.captured_mass_by_layer], wanted, rtol=1e-5
    )
    assert min(wanted[1:3]) > 1e-3 and max(wanted[3:]) < 0.95, "the streams must differ, or the test proves nothing"


class NSAOracle(Oracle):
    """NSA instead: the compressed branch scores the blocks; that branch and the window join either stream, with a gate each."""

    def compressed(self, q: Tensor, k: Tensor, t: int, h: int) -> Tensor:
        """Returns a head's probabilities of the blocks that are complete at token t."""
        size, group = self.config.attention.block_size, h * GROUPS // HEADS
        means = [k[b * size : (b + 1) * size, group].mean(0) for b in range((t + 1) // size)]
        return (torch.stack(means) @ q[t, h] / math.sqrt(DIM)).softmax(0) if means else torch.zeros(0)

    def chosen(self, q: Tensor, k: Tensor, t: int, group: int) -> list[int]:
        size, top_k = self.config.attention.block_size, self.config.attention.top_k
        own = t // size
        heads = range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS)
        importance = sum(self.compressed(q, k, t, h)[:own] for h in heads)
        order = sorted(range(own), key=lambda b: (float(importance[b]), b), reverse=True)
        return [j for b in sorted([own, *order[: top_k - 1]]) for j in range(b * size, min((b + 1) * size, t + 1))]

    def gated(self, full: Tensor, sparse: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> list[Tensor]:
        size, window = self.config.attention.block_size, self.config.attention.window
        opened = 1 / (1 + (-gate.reshape(len(q), HEADS, 3)).exp())
        others = torch.zeros_like(q)
        for t, h in itertools.product(range(len(q)), range(HEADS)):
            group, keys = h * GROUPS // HEADS, slice(max(0, t - window + 1), t + 1)
            others[t, h] += opened[t, h, 2] * ((k[keys, group] @ q[t, h] / math.sqrt(DIM)).softmax(0) @ v[keys, group])
            if t + 1 >= size:
                means = torch.stack([v[b * size : (b + 1) * size, group].mean(0) for b in range((t + 1) // size)])
                others[t, h] += opened[t, h, 0] * (self.compressed(q, k, t, h) @ means)
        return [stream * opened[..., 1, None] + others for stream in (full, sparse)]


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_nsa_equals_the_definition(placement, mode):
    from ssa_pretrain.engine import build_engine
    from ssa_pretrain.engine.megatron.checkpoint import unwrap

    config = small_config()
    config.attention.method, config.attention.score, config.attention.window = Method.nsa, Score.compressed, 11
    engine = build_engine(config, placement, VOCAB)
    batch = microbatch()
    found = engine.evaluate([batch], mode=mode)
    weights = dict(unwrap(engine.chunks[0]).named_parameters())
    assert (
        weights["decoder.layers.0.self_attention.linear_qkv.weight"].shape[0] == (HEADS + 2 * GROUPS) * DIM + 3 * HEADS
    )
    wanted = NSAOracle(weights, config).metrics(batch, mode)
    ours = [found.cross_entropy, *found.alignment_by_layer, *found.captured_mass_by_layer]
    np.testing.assert_allclose(ours, wanted, rtol=1e-5)
    if mode == "sparse":  # what training computes
        stepped = engine.train_step([batch], step=0, learning_rate=0.0).result()
        assert stepped.cross_entropy == pytest.approx(wanted[0], rel=1e-6)
        assert not any(stepped.alignment_by_layer)


@pytest.mark.parametrize("tied", [True, False])
def test_only_a_tied_output_layer_begins_as_the_embedding(placement, tied):
    from ssa_pretrain.engine import build_engine
    from ssa_pretrain.engine.megatron.checkpoint import unwrap
    from ssa_pretrain.model.sharding import global_name

    weights = dict(unwrap(build_engine(small_config(tied=tied), placement, VOCAB).chunks[0]).named_parameters())
    names = [global_name(name, 0, tied=tied) for name in ("embedding.word_embeddings.weight", "output_layer.weight")]
    assert len(set(names)) == (1 if tied else 2)
    if not tied:
        embedding, output = (weights[name] for name in names)
        cosine = torch.nn.functional.cosine_similarity(embedding, output, dim=1)
        assert cosine.abs().mean() < 0.5, "rows of 32 independent numbers have a mean of 0.14"


def test_step_reports_what_an_evaluation_of_its_weights_does(placement):
    from ssa_pretrain.engine import build_engine

    config = small_config()
    config.attention.full_ratio = 1.0
    engine = build_engine(config, placement, VOCAB)
    judged = engine.evaluate([microbatch()], mode="full")
    stepped = engine.train_step([microbatch()], step=0, learning_rate=0.0).result()
    assert stepped.cross_entropy == pytest.approx(judged.cross_entropy, rel=1e-6)
    assert stepped.alignment_by_layer == pytest.approx(judged.alignment_by_layer, rel=1e-6)


@pytest.mark.parametrize("weight", [0.0, 500.0])
@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_gradient_is_that_of_cross_entropy_plus_weighted_alignment(placement, mode, weight):
    """Along the gradient itself the loss must rise by its norm. Each stream's alignment term stops the other's gradient, so both together have
    half the slope of their value.
    """
    from ssa_pretrain.engine import build_engine
    from ssa_pretrain.engine.megatron.checkpoint import unwrap

    config = small_config()
    config.attention.full_ratio = float(mode == "full")
    config.attention.alignment_weight = weight
    engine = build_engine(config, placement, VOCAB)
    batches = microbatches()
    found: list[Tensor] = []
    parameters = list(unwrap(engine.chunks[0]).parameters())
    step = engine.optimizer.step
    engine.optimizer.step = lambda: found.extend(p.main_grad.clone() for p in parameters) or step()
    engine.train_step(batches, step=0, learning_rate=0.0)
    norm = torch.sqrt(sum(g.double().pow(2).sum() for g in found))

    def loss_at(distance: float) -> float:
        with torch.no_grad():
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter += distance * gradient / norm
            judged = engine.evaluate(batches, mode=mode)
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter -= distance * gradient / norm
        return judged.cross_entropy + weight / 2 * float(np.mean(judged.alignment_by_layer))

    slope = (loss_at(2e-3) - loss_at(-2e-3)) / 4e-3
    assert slope == pytest.approx(float(norm), rel=0.01)


def test_alignment_weighs_in_that_gradient(placement):
    """If the term were missing or doubled, the test above would fail: at this weight it is a large part of the slope."""
    from ssa_pretrain.engine import build_engine

    norms = []
    for weight in (0.0, 500.0, 1000.0):
        config = small_config()
        config.attention.full_ratio, config.attention.alignment_weight = 1.0, weight
        engine = build_engine(config, placement, VOCAB)
        norms.append(engine.train_step(microbatches(), step=0, learning_rate=0.0).result().grad_norm)
    assert abs(norms[1] / norms[0] - 1) > 0.03 and abs(norms[2] / norms[1] - 1) > 0.03


def gradient_and_metrics(engine, batches: list[Batch], step: int = 0) -> tuple[list[Tensor], list[float], list[float]]:
    """Returns the gradients of a step, and its alignments and captured masses by layer; the weights stay."""
    from ssa_pretrain.engine.megatron.checkpoint import unwrap

    sums = engine.forward_backward(batches, step=step)
    result = engine.microbatches.step_result(sums, torch.zeros(())).result()
    gradients = [p.main_grad.clone() for p in unwrap(engine.chunks[0]).parameters()]
    return gradients, result.alignment_by_layer, result.captured_mass_by_layer


def short_documents(*, padding: int) -> list[Batch]:
    """Returns two rows as a microbatch each: one with documents that two blocks cover, one with padding at its end."""
    generator, found = np.random.default_rng(4), []
    for index, starts in enumerate(([0, 20, 45, 53], [0])):
        flags = np.zeros(LENGTH + 1, dtype=bool)
        flags[starts] = True
        row = Row(generator.integers(0, VOCAB, LENGTH + 1), flags, padding if index else 0)
        found.append(collate([row], index=index, padding_document=32))
    return found


@pytest.mark.parametrize("padding", [None, 0, 23])
@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_mean_gradient_over_draws_of_the_counterpart_is_that_of_all_queries(placement, monkeypatch, mode, padding):
    """With one pair of chunks per row every query is drawn equally often: the mean over the draws is exact, not statistical.

    One draw is empty in one row and has two pairs in the other: draws of different sizes must count by their queries.
    """
    from ssa_pretrain.engine import build_engine
    from ssa_pretrain.engine import step as engine_step
    from ssa_pretrain.schedule import MIN_PAIRS

    config = small_config()
    config.attention.full_ratio, config.attention.alignment_weight = float(mode == "full"), 500.0
    engine = build_engine(config, placement, VOCAB)
    batches = microbatches() if padding is None else short_documents(padding=padding)
    wanted, *metrics = gradient_and_metrics(engine, batches)
    config.attention.counterpart_share = 1 / MIN_PAIRS
    chunk, found = LENGTH // (2 * MIN_PAIRS), []

    def drawn(pairs: list[int]) -> list[tuple[int, int]]:
        return [(n * chunk, chunk) for n in sorted([*pairs, *(2 * MIN_PAIRS - 1 - pair for pair in pairs)])]

    for pair in range(MIN_PAIRS):
        # The first row's pairs in turn; the second row has two pairs in every other draw and none in between.
        second = [] if pair % 2 else [pair, pair + 1]
        spans = [drawn([pair]), drawn(second)]
        monkeypatch.setattr(
            engine_step, "counterpart_spans", lambda _, place, spans=spans, **__: spans[place.microbatch]
        )
        found.append((*gradient_and_metrics(engine, batches), spans))
    differs = False
    for number, gradient_wanted in enumerate(wanted):
        mean = torch.stack([gradients[number] for gradients, *_ in found]).mean(0)
        scale = float(gradient_wanted.abs().max())
        torch.testing.assert_close(mean, gradient_wanted, rtol=1e-5, atol=1e-5 * scale)
        differs |= bool((found[0][0][number] - gradient_wanted).abs().max() > 1e-3 * scale)
    assert differs
    real = [drawn_without_padding(batches, spans) for *_, spans in found]
    for index, values in enumerate(metrics, start=1):
        by_layer = zip(*(each[index] for each in found), strict=True)
        means = [sum(n * x for n, x in zip(real, layer, strict=True)) / sum(real) for layer in by_layer]
        assert means == pytest.approx(values), "weighted by the drawn queries"


def drawn_without_padding(batches: list[Batch], spans: list[list[tuple[int, int]]]) -> int:
    """Returns the number of drawn queries other than padding."""
    padding = [{t for first, n in batch.padding for t in range(first, first + n)} for batch in batches]
    return sum(
        t not in own
        for own, drawn in zip(padding, spans, strict=True)
        for first, n in drawn
        for t in range(first, first + n)
    )


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_step_measures_the_drawn_queries(placement, mode, share):
    """The definition counts every drawn query, also those that the chosen blocks cover and the layer leaves out."""
    from ssa_pretrain.engine import build_engine
    from ssa_pretrain.engine.megatron.checkpoint import unwrap
    from ssa_pretrain.schedule import Place, counterpart_spans

    config = small_config()
    config.attention.full_ratio, config.attention.counterpart_share = float(mode == "full"), share
    engine, batch = build_engine(config, placement, VOCAB), microbatch()
    place = Place(seed=config.seed, step=2, microbatch=0, num_microbatches=1)
    drawn = torch.zeros(2 * LENGTH, dtype=torch.bool)
    for first, length in counterpart_spans(config.attention, place, rows=2, row_length=LENGTH):
        drawn[first : first + length] = True
    weights = {name: p.clone() for name, p in unwrap(engine.chunks[0]).named_parameters()}
    found = engine.train_step([batch], step=2, learning_rate=0.0).result()
    oracle = Oracle(weights, config)
    wanted = oracle.metrics(batch, mode, drawn)
    np.testing.assert_allclose(
        [found.cross_entropy, *found.alignment_by_layer, *found.captured_mass_by_layer], wanted, rtol=1e-5
    )
    covered = drawn & (batch.positions < 32)
    assert covered.any() and drawn.sum() == share * 2 * LENGTH
    assert abs(oracle.metrics(batch, mode)[1] / wanted[1] - 1) > 0.01, "the sample differs from the whole"


def test_step_without_a_drawn_query_has_no_alignment(placement):
    """Nothing is drawn for some steps of one row. They have neither metrics nor a gradient of the alignment."""
    from ssa_pretrain.engine import build_engine

    config = small_config()
    config.attention.counterpart_share, config.attention.alignment_weight = 0.02, 500.0
    engine, batches = build_engine(config, placement, VOCAB), microbatches()[:1]
    found = [gradient_and_metrics(engine, batches, step) for step in range(30)]
    empty = [alignment == mass == [] for _, alignment, mass in found]
    assert 0 < sum(empty) < 30
    config.attention.counterpart_share = 0.0
    for step in range(30):
        if empty[step]:
            nothing, *_ = gradient_and_metrics(engine, batches, step)
            assert all(map(torch.equal, found[step][0], nothing))


@pytest.mark.parametrize("score", Score)
@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_leaving_out_covered_queries_changes_nothing(placement, monkeypatch, mode, score):
    """Queries whose document prefix fits into the chosen blocks have alignment 0 and captured mass 1."""
    from ssa_pretrain.engine import build_engine, counterpart
    from ssa_pretrain.engine import step as engine_step

    monkeypatch.setattr(counterpart, "CELL", 2)
    config = small_config()
    config.attention.score = score
    config.attention.full_ratio, config.attention.alignment_weight = float(mode == "full"), 500.0
    config.attention.counterpart_share = 0.5
    engine = build_engine(config, placement, VOCAB)
    batches, found, computed = short_documents(padding=23), [], []
    for share, reach in ((0.5, 0), (0.5, 32), (1.0, 0), (1.0, 32)):
        config.attention.counterpart_share = share
        monkeypatch.setattr(
            engine_step,
            "counterpart_queries",
            lambda attention, batch, drawn, reach=reach: counterpart.counterpart_queries(
                attention if reach else SimpleNamespace(top_k=0, block_size=16), batch, drawn
            ),
        )
        found.append(gradient_and_metrics(engine, batches, step=3))
        computed.append([(r.counterpart, r.spans) for r in engine.microbatches.begin_step(batches, 3)[1]])
    assert computed[2:] == [[(True, None)] * 2, [(False, None), (True, None)]], "at share 1 only whole microbatches"
    assert computed[0] != computed[1]
    for all_drawn, uncovered in (found[:2], found[2:]):
        for one, other in zip(all_drawn[1:], uncovered[1:], strict=True):
            assert one == pytest.approx(other, rel=1e-5)
        for one, other in zip(all_drawn[0], uncovered[0], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


def padded(tokens: np.ndarray) -> Row:
    """Returns one document as a row, followed by padding."""
    row, starts = np.full(LENGTH + 1, 7, dtype=np.int64), np.zeros(LENGTH + 1, dtype=bool)
    row[: len(tokens)] = tokens
    starts[[0, len(tokens)]] = True
    return Row(row, starts, LENGTH + 1 - len(tokens))


@pytest.mark.parametrize("rows_a_microbatch", [1, 2])
@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_padding_counts_nowhere(placement, mode, rows_a_microbatch):
    """Two documents, packed into one row or each a row of its own with padding: the same losses, masses and gradients."""
    from ssa_pretrain.engine import build_engine
    from ssa_pretrain.engine.megatron.checkpoint import unwrap

    generator = np.random.default_rng(5)
    documents = [generator.integers(0, VOCAB, n) for n in (61, LENGTH - 61)]
    starts = np.zeros(LENGTH + 1, dtype=bool)
    starts[[0, 61, LENGTH]] = True
    packed = [collate([Row(np.concatenate([*documents, [0]]), starts)], index=0)]
    groups = [documents] if rows_a_microbatch == 2 else [[document] for document in documents]
    alone = [collate(map(padded, group), index=i, padding_document=32) for i, group in enumerate(groups)]
    assert sum(batch.num_padding for batch in alone) == LENGTH

    config = small_config()
    config.attention.full_ratio, config.attention.alignment_weight = float(mode == "full"), 500.0
    engine = build_engine(config, placement, VOCAB)
    parameters = list(unwrap(engine.chunks[0]).parameters())
    step, gradients = engine.optimizer.step, []
    engine.optimizer.step = lambda: gradients.append([p.main_grad.clone() for p in parameters]) or step()
    judged = [engine.evaluate(batches, mode=mode) for batches in (packed, alone)]
    stepped = [engine.train_step(batches, step=0, learning_rate=0.0).result() for batches in (packed, alone)]
    assert [(r.num_labels, r.num_tokens) for r in judged] == [(LENGTH - 2, LENGTH)] * 2
    for wanted, found in (judged, stepped):
        assert found.cross_entropy == pytest.approx(wanted.cross_entropy, rel=1e-5)
        assert found.alignment_by_layer == pytest.approx(wanted.alignment_by_layer, rel=1e-5)
        assert found.captured_mass_by_layer == pytest.approx(wanted.captured_mass_by_layer, rel=1e-5)
        assert min(wanted.alignment_by_layer) > 1e-3 and max(wanted.captured_mass_by_layer) < 0.95
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("limit", [0.0, 0.01, 1e6])
def test_gradients_are_clipped_to_the_limit(placement, limit):
    """AdamW hardly sees the gradient's size, so look at what reaches it."""
    from ssa_pretrain.engine import build_engine

    config = small_config()
    config.optim.clip_grad = limit
    engine = build_engine(config, placement, VOCAB)
    reached = []
    step = engine.optimizer.step_with_ready_grads

    def look_and_step():
        grads = [p.grad for o in engine.optimizer.chained_optimizers for p in o.get_parameters() if p.grad is not None]
        reached.append(float(sum(g.double().pow(2).sum() for g in grads)) ** 0.5)
        return step()

    engine.optimizer.step_with_ready_grads = look_and_step
    norm = engine.train_step(microbatches(), step=0, learning_rate=0.0).result().grad_norm
    assert norm > 0.01 and reached == [pytest.approx(min(norm, limit) if limit else norm, rel=1e-4)]


@pytest.mark.parametrize("method", [Method.full, Method.moba])
def test_one_stream_methods_train_that_stream(placement, method):
    from ssa_pretrain.engine import build_engine

    config = small_config()
    config.attention.method = method
    engine = build_engine(config, placement, VOCAB)
    judged = engine.evaluate([microbatch()], mode="full" if method is Method.full else "sparse")
    stepped = engine.train_step([microbatch()], step=0, learning_rate=0.0).result()
    assert stepped.cross_entropy == pytest.approx(judged.cross_entropy, rel=1e-6)
    assert stepped.alignment_by_layer == [] and stepped.captured_mass_by_layer == []


def llama3_frequencies(factor: float) -> Tensor:
    """Returns the scaled frequencies of Llama 3 (its published rule: low 1, high 4, original context 8,192)."""
    plain = 500_000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    found = []
    for frequency in plain.tolist():
        length = 2 * math.pi / frequency
        if length < 8192 / 4:
            found.append(frequency)
        elif length > 8192:
            found.append(frequency / factor)
        else:
            smooth = (8192 / length - 1) / (4 - 1)
            found.append((1 - smooth) * frequency / factor + smooth * frequency)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("factor", [None, 4.0])
def test_rope_turns_by_position_with_llama3_scaling(placement, factor):
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    scaling = {} if factor is None else {"rope_scaling": True, "rope_scaling_factor": factor}
    table = RotaryEmbedding(64, 1.0, rotary_base=500_000, use_cpu_initialization=True, **scaling)(256)
    positions = torch.tensor([0, 1, 5, 0, 255])
    frequency = llama3_frequencies(factor or 1.0)
    x = torch.randn(5, 2, 64, dtype=torch.float64)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), positions[:, None] * frequency)[:, None, :]
    pairs = torch.complex(x[..., :32], x[..., 32:]) * turn
    wanted = torch.cat([pairs.real, pairs.imag], dim=-1)
    mixed = (
        torch.cat([x, torch.zeros(5, 2, 64)], dim=1).flatten(1).float()
    )  # two queries of one kv head, its key and value
    sizes = {"num_kv_heads": 1, "group_size": 2, "head_dim": 64, "num_gates": 0}
    turned, *_ = qkv_rope(mixed, table.flatten(1), positions, **sizes)
    torch.testing.assert_close(turned, wanted.float(), rtol=0.0, atol=1e-4)


def held_out_metrics(engine, config: Config, held_out, mode: str) -> list[float]:
    """Returns what the trainer finds on held-out rows: cross entropy, alignments, masses, labels, tokens."""
    from ssa_pretrain.evaluation.held_out import evaluate_mode

    plan, first = SimpleNamespace(dp=1, pp=1, vpp=1), SimpleNamespace(dp_rank=0, is_rank_0=False)
    found = evaluate_mode(
        SimpleNamespace(engine=engine, config=config, held_out=held_out, plan=plan, placement=first), mode
    )
    counts = [found.num_labels, found.num_tokens]
    return [found.cross_entropy, *found.alignment_by_layer, *found.captured_mass_by_layer, *counts]


@pytest.mark.parametrize("packing", ["megatron", "official_row"])
@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_held_out_metrics_do_not_depend_on_the_micro_batch_size(placement, tmp_path, mode, packing):
    """Seven rows, or eight with one in which a source ends: no size but one divides them."""
    from ssa_pretrain.data.rows import HeldOutRows
    from ssa_pretrain.engine import build_engine

    policy = {"packing": packing, "row_tokens": LENGTH}
    sizes = {"long": 7 * LENGTH + 30, "short": 50}
    held = {name: [d % VOCAB for d in cut(size, seed=size)] for name, size in sizes.items()}
    manifest = write_dataset(tmp_path, {}, held, vocab_size=VOCAB, policy=policy)
    config = small_config()
    engine = build_engine(config, placement, VOCAB)
    for rows in (0, 7):
        held_out = HeldOutRows(manifest, sequence_length=LENGTH, rows=rows)
        found = []
        for size in range(1, 6):
            config.training.micro_batch_size = size
            found.append(held_out_metrics(engine, config, held_out, mode))
        for other in found[1:]:
            assert other == pytest.approx(found[0], rel=1e-6, abs=0)
        if not rows:
            documents = sum(map(len, held.values()))
            assert found[0][-2] == sum(sizes.values()) - documents, "all labels, each once"


@pytest.mark.parametrize("length", [16, 32, 48])
def test_samples_are_no_longer_than_a_row(placement, tmp_path, monkeypatch, length):
    """Positions end with the row. Prompts of the data, and any others: of one token, of nearly a row, of a row and more."""
    from tokenizers import Tokenizer, models

    from ssa_pretrain.data.rows import HeldOutRows
    from ssa_pretrain.engine import build_engine
    from ssa_pretrain.evaluation import sampling

    words = {f"w{i}": i for i in range(VOCAB)}
    held = {"held": [d % (VOCAB - 1) + 1 for d in cut(20 * length, longest=3 * length)]}
    manifest = write_dataset(tmp_path, {}, held, vocab_size=VOCAB)
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
    config = small_config()
    config.attention.top_k, config.data.sequence_length = 1, length
    run = SimpleNamespace(
        config=config,
        engine=build_engine(config, placement, VOCAB),
        manifest=manifest,
        held_out=HeldOutRows(manifest, sequence_length=length, rows=0),
        placement=SimpleNamespace(is_rank_0=False, device=placement.device),
        plan=SimpleNamespace(cp=1, tp=1, vocab_size=VOCAB),
    )
    drawn = [len(prompt) for prompt in sampling.held_out_prompts(run)]
    assert drawn == [length // 2] * sampling.NUM_PROMPTS, "half a row for the prompt, half for its continuation"
    lengths = [1, length - 1, length, length + 7]
    for prompts in (None, [list(range(1, n + 1)) for n in lengths]):
        if prompts:
            monkeypatch.setattr(sampling, "held_out_prompts", lambda _, prompts=prompts: prompts)
        found = [
            [len(sample[part].split()) for part in ("prompt", "text")]
            for sample in sampling.sample(run, ("full", "sparse"))
        ]
        assert all(prompt > 0 and prompt + text <= length for prompt, text in found)
        assert any(text and prompt + text == length for prompt, text in found), "an EOS ends some of them, not all"
        assert len(found) == 2 * len(prompts or drawn)


def test_filling_of_packed_prompts_has_documents_no_longer_than_a_row():
    from ssa_pretrain.evaluation.packing import pack_texts

    batch = pack_texts([[1, 2, 3], [4]], 64, 16)
    assert batch.cu_seqlens.diff().tolist() == [3, 1, 16, 16, 16, 12]
    assert batch.positions.max() == 15
    assert pack_texts([[1] * 16], 16, 16).cu_seqlens.tolist() == [0, 16]
