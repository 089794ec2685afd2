"""What a released model of SSA's authors computes, in plain torch and loops: written from the mathematics, sharing nothing with the package.

Source: github zhenyi4/ssa at 5303419, read for what it computes: configs/ssa-1b-init/modeling_llama_nsa.py and hf_files/parallel.py. One row, no
padding, no cache. With a window_size in the configuration it is NSA: to the selected branch come attention over the means of the complete blocks and
over the last window_size keys, and row 3 h + i of the gates is head h's for branch i: compressed, selected, window. In sparse mode each token attends to the blocks that the code's search returns. It scores a block by the sum over the group's heads
of exp(logit - lse), with lse over the complete blocks up to and including the token's own, and gives the own block the largest score, 1 per head. It
then walks the blocks by chunks of block_size blocks with a sorted list of that length: of the list and of the new chunk, sorted, the better halves
remain. The first block_counts of the last list are chosen. Chunks are filled up with nothing, scored 0.
"""

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def logits(tensors: Tensors, config: dict, tokens: Tensor, mode: str) -> Tensor:
    """Returns the logits [T, V] of one row of tokens [T] in a mode, "full" or "sparse", in the tensors' dtype."""
    embedding = tensors["model.embed_tokens.weight"]
    x = embedding[tokens]
    for number in range(config["num_hidden_layers"]):
        layer = {
            name.partition(f"layers.{number}.")[2]: t for name, t in tensors.items() if f".layers.{number}." in name
        }
        x = x + _attention(_norm(x, layer["input_layernorm.weight"], config), layer, config, mode)
        h = _norm(x, layer["post_attention_layernorm.weight"], config)
        inner = torch.nn.functional.silu(h @ layer["mlp.gate_proj.weight"].T) * (h @ layer["mlp.up_proj.weight"].T)
        x = x + inner @ layer["mlp.down_proj.weight"].T
    return _norm(x, tensors["model.norm.weight"], config) @ embedding.T


def _norm(x: Tensor, weight: Tensor, config: dict) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * weight


def _attention(x: Tensor, layer: Tensors, config: dict, mode: str) -> Tensor:
    length, heads, dim = len(x), config["num_attention_heads"], config["head_dim"]
    q, k, v = (
        (x @ layer[f"self_attn.{letter}_proj.weight"].T).view(length, -1, dim).transpose(0, 1) for letter in "qkv"
    )
    q, k = (_rotate(t, config["rope_theta"]) for t in (q, k))
    group = heads // len(k)
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    outputs = []
    for head in range(heads):
        kv = head // group
        if mode == "sparse" and head % group == 0:
            visible = _visible(q[head : head + group], k[kv], config)
        scores = (q[head] @ k[kv].T * dim**-0.5).masked_fill(~visible, float("-inf"))
        outputs.append(scores.softmax(-1) @ v[kv])
    gates = (x @ layer["self_attn.g_proj.weight"].T).sigmoid().view(length, heads, 3)
    gated = torch.stack(outputs, 1) * gates[..., 1, None]
    if config.get("window_size"):
        others = [_other_branches(q[head], k[head // group], v[head // group], config) for head in range(heads)]
        gated += sum(
            torch.stack(branch, 1) * gates[..., i, None]
            for i, branch in zip((0, 2), zip(*others, strict=True), strict=True)
        )
    return gated.reshape(length, -1) @ layer["self_attn.o_proj.weight"].T


def _other_branches(q: Tensor, k: Tensor, v: Tensor, config: dict) -> tuple[Tensor, Tensor]:
    """Returns one head's compressed branch and window, both [T, D]."""
    size, scale = config["block_size"], q.shape[-1] ** -0.5
    compressed, window = torch.zeros_like(q), torch.zeros_like(q)
    for token in range(len(q)):
        if complete := (token + 1) // size:
            mean_k, mean_v = (x[: complete * size].view(complete, size, -1).mean(1) for x in (k, v))
            compressed[token] = (mean_k @ q[token] * scale).softmax(0) @ mean_v
        near = slice(max(0, token + 1 - config["window_size"]), token + 1)
        window[token] = (k[near] @ q[token] * scale).softmax(0) @ v[near]
    return compressed, window


def _rotate(x: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[1]).to(x), theta ** -(torch.arange(half).to(x) / half))
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _visible(q: Tensor, k: Tensor, config: dict) -> Tensor:
    """Returns bool [T, T]: the keys of the blocks chosen by the queries [group, T, D] of one kv head."""
    size, length = config["block_size"], len(k)
    means = torch.stack([block.mean(0) for block in k.split(size)])
    found = torch.zeros(length, length, dtype=torch.bool)
    for token in range(length):
        for block in chosen_blocks(q[:, token], means, token, size, config["block_counts"]):
            found[token, block * size : min((block + 1) * size, token + 1)] = True
    return found


def chosen_blocks(q: Tensor, means: Tensor, token: int, size: int, count: int) -> list[int]:
    """Returns the blocks that the search returns for one token: queries [group, D], block means [blocks, D]."""
    own, complete = token // size, (token + 1) // size
    scores = q @ means[: own + 1].T * q.shape[-1] ** -0.5
    lse = scores[:, :complete].logsumexp(-1, keepdim=True) if complete else torch.zeros(len(q), 1).to(q)
    importance = (scores - lse).exp().sum(0).tolist()
    importance[own] = float(len(q))
    running: list[tuple[float, int]] = []
    for start in range(0, own + 1, size):
        chunk = sorted(((importance[block], block) for block in range(start, min(start + size, own + 1))), reverse=True)
        chunk += [(0.0, -1)] * (size - len(chunk))
        running = sorted(running[: size // 2] + chunk[: size // 2], reverse=True) if start else chunk
    return [block for _, block in running[:count] if block >= 0]
