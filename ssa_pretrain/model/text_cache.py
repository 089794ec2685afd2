"""Keys, values and block means of texts that a model continues token by token, of one rank's layers and kv heads.

The first forward over the texts keeps each layer's keys and values (`keep`). After that a step needs only each text's newest token: its key and value are
appended, and its query attends to what is kept (`attend`), by `ssa_kernels.decode_attention`. So a token costs no longer a forward over the whole text.

The cache is paged. A text has the pages that its longest continuation needs from the start, one after another, so nothing is moved or freed, and
texts of any lengths lie side by side without padding. All layers share lengths and pages; each layer's memory is allocated at its first `keep`.
Every layer may do its part of a step twice, as interleaved stages do: it writes the same again. What else a layer needs is kept beside: the last plain
keys before a convolution of keys, the index keys of a trained scorer of blocks.

A text is one document. The engine says which tokens are new (engine/interface.py `Evaluator`); methods with a choice of their own are in attention.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ssa_kernels import (
    DocumentLayout,
    KeyValueCache,
    append_to_cache,
    build_layout,
    decode_attention,
    query_spans,
)

KERNELS_MOST_BLOCKS = 128  # per query, in the decoding kernels; beyond it their reference is asked for


@dataclass(frozen=True, slots=True)
class Choice:
    """What a step attends to: a stream, "full" or "sparse", and for the latter the blocks per query and their score; `impl` as operators take it."""

    mode: str
    top_k: int
    score: str
    impl: str | None

    @property
    def decoding_impl(self) -> str | None:
        """Which implementation runs a step: the reference where no kernel serves it."""
        has_kernel = self.score not in ("compressed", "official_compat") and self.top_k <= KERNELS_MOST_BLOCKS
        return self.impl if has_kernel or self.mode == "full" else "reference"


class TextCache:
    """The cache of some texts.

    Args:
        lengths: tokens of each text.
        room: the most tokens that each will have.
        block_size: keys per block, and per page.
        device: where the model is.
    """

    def __init__(self, lengths: Sequence[int], room: Sequence[int], *, block_size: int, device: torch.device) -> None:
        pages = [-(-most // block_size) for most in room]
        table = [list(range(end - count, end)) for end, count in zip(accumulate(pages), pages, strict=True)]
        self.lengths, self.block_size, self.num_pages = list(lengths), block_size, sum(pages)
        rows = [row + [0] * (max(pages) - len(row)) for row in table]
        self.page_table = torch.tensor(rows, dtype=torch.int32).to(device)
        self.seq_lens = torch.tensor(self.lengths, dtype=torch.int32).to(device)
        self.num_new = torch.zeros_like(self.seq_lens)
        self._layers: dict[int, KeyValueCache] = {}
        self._plain: dict[
            int, Tensor
        ] = {}  # [texts, W, G, D] by layer: the last W keys before the convolution, at position mod W
        self._index: dict[int, Tensor] = {}  # [pages * K, G, D] by layer: index keys of a trained scorer
        self._pages = table
        self._newest: tuple[list[int], DocumentLayout] | None = None

    def __len__(self) -> int:
        """Returns the number of texts."""
        return len(self.lengths)

    def advance(self, grows: Sequence[bool]) -> None:
        """Counts one more token of the texts that have one, before the step that computes it."""
        self.lengths = [length + int(more) for length, more in zip(self.lengths, grows, strict=True)]
        self.num_new = torch.tensor(grows, dtype=torch.int32).to(self.seq_lens.device)
        self.seq_lens = self.seq_lens + self.num_new

    def keep(self, layer_number: int, k_SGD: Tensor, v_SGD: Tensor, impl: str | None) -> None:
        """Keeps a layer's keys and values of the texts, which are the first documents of a microbatch of S tokens.

        Args:
            layer_number: from 1.
            k_SGD: keys after RoPE, of all the microbatch's tokens.
            v_SGD: values.
            impl: as operators take it.
        """
        if layer_number not in self._layers:
            shape = (self.num_pages, self.block_size, *k_SGD.shape[1:])
            k, v = k_SGD.new_zeros(shape), v_SGD.new_zeros(shape)  # `append` hands out whole pages
            means = k_SGD.new_empty(self.num_pages, *k_SGD.shape[1:])
            self._layers[layer_number] = KeyValueCache(k, v, means, self.seq_lens, self.page_table)
        held = self._layers[layer_number]
        for i, (k, v) in enumerate(zip(self._by_text(k_SGD), self._by_text(v_SGD), strict=True)):
            one = replace(held, seq_lens=self.seq_lens[i : i + 1], page_table=self.page_table[i : i + 1])
            append_to_cache(one, k.unsqueeze(0), v.unsqueeze(0), impl=impl)

    def _by_text(self, x_S: Tensor) -> tuple[Tensor, ...]:
        """Returns each text's part of a microbatch's tensor."""
        return x_S[: sum(self.lengths)].split(self.lengths)

    def append(self, layer_number: int, k_BGD: Tensor, v_BGD: Tensor, impl: str | None) -> tuple[Tensor, Tensor]:
        """Returns a layer's keys and values [S, G, D] of all pages, to which the texts' newest are appended first."""
        held = replace(self._layers[layer_number], seq_lens=self.seq_lens, max_length=max(self.lengths))
        append_to_cache(held, k_BGD.unsqueeze(1), v_BGD.unsqueeze(1), num_new=self.num_new, impl=impl)
        return held.k.flatten(0, 1), held.v.flatten(0, 1)

    def newest_queries(self) -> DocumentLayout:
        """Returns the layout of one query per text, its newest token, over the keys of `append`: each text is a document that begins with a page."""
        if self._newest is None or self._newest[0] != self.lengths:
            begins = [self.block_size * row[0] for row in self._pages]
            ends = torch.tensor([*begins, self.num_pages * self.block_size], dtype=torch.int32).to(self.seq_lens.device)
            whole = build_layout(ends, num_tokens=self.num_pages * self.block_size, block_size=self.block_size)
            spans = [(begin + length - 1, 1) for begin, length in zip(begins, self.lengths, strict=True)]
            self._newest = (list(self.lengths), query_spans(whole, spans))
        return self._newest[1]

    def attend(self, layer_number: int, q_BHD: Tensor, k_BGD: Tensor, v_BGD: Tensor, choice: Choice) -> Tensor:
        """Returns the attention of each text's newest token, [B, H, D]; 0 for texts that got none. Its key and value are appended first."""
        held = replace(self._layers[layer_number], seq_lens=self.seq_lens, max_length=max(self.lengths))
        impl = choice.decoding_impl
        append_to_cache(held, k_BGD.unsqueeze(1), v_BGD.unsqueeze(1), num_new=self.num_new, impl=choice.impl)
        common: dict[str, Any] = {"top_k": choice.top_k, "score": choice.score} if choice.mode == "sparse" else {}
        out, _ = decode_attention(q_BHD.unsqueeze(1), held, mode=choice.mode, num_new=self.num_new, impl=impl, **common)
        return out.squeeze(1)

    def keep_index_keys(self, layer_number: int, ik_SGD: Tensor) -> None:
        """Keeps the index keys that a trained scorer gives the texts' tokens; arguments as in `keep`."""
        held = ik_SGD.new_zeros(self.num_pages * self.block_size, *ik_SGD.shape[1:])
        for ik, pages in zip(self._by_text(ik_SGD), self._pages, strict=True):
            first = pages[0] * self.block_size
            held[first : first + len(ik)] = ik
        self._index[layer_number] = held

    def append_index_keys(self, layer_number: int, ik_BGD: Tensor) -> Tensor:
        """Returns a layer's index keys [S, G, D] of all pages, in the places of `append`, after those of the texts' newest tokens were added."""
        held = self._index[layer_number]
        held[self.page_table[:, 0] * self.block_size + self.seq_lens - 1] = ik_BGD.detach()
        return held

    def keep_plain_keys(self, layer_number: int, k_SGD: Tensor, taps: int) -> None:
        """Keeps the last `taps` keys of each text as they are before the convolution of keys; arguments as in `keep`."""
        held = k_SGD.new_zeros(len(self), taps, *k_SGD.shape[1:])
        for i, k in enumerate(self._by_text(k_SGD)):
            first = max(0, len(k) - taps)
            held[i, torch.arange(first, len(k)) % taps] = k[first:]
        self._plain[layer_number] = held

    def plain_keys(self, layer_number: int, k_BGD: Tensor, positions_B: Tensor) -> Tensor:
        """Returns each text's last W keys before the convolution, [B, W, G, D], the newest last, after keeping the newest at its position."""
        held = self._plain[layer_number]
        taps, text = held.shape[1], torch.arange(len(held), device=held.device)
        held[text, positions_B % taps] = k_BGD.detach()
        slots = (positions_B[:, None] - torch.arange(taps - 1, -1, -1, device=held.device)) % taps
        return held[text[:, None], slots]
