"""Texts for small corpora, and manifests with other content."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssa_pretrain.data.repair import content_checksum

# Texts that tokenizers tend to break on.
NASTY = [
    "",
    " ",
    "a\r\nb\n\n\n  c",
    "\x00\x01\x7f",
    "🙂👩‍👩‍👧 漢字 ไทย",
    "a" * 5000,
    "x <|end_of_text|> y",
    "  leading",
    "1234567",
]

WORDS = [
    "the",
    "sparse",
    "stream",
    "reads",
    "blocks",
    "of",
    "keys",
    "while",
    "the",
    "full",
    "stream",
    "reads",
    "every",
    "key",
    "it",
    "may",
    "see",
    "in",
    "a",
    "document",
]


def sentences(count: int, seed: int, *, words: int = 200, prefix: str = "") -> list[str]:
    """Returns `count` different texts of 20 to `words` words, each behind the prefix and its number."""
    draw = random.Random(seed)
    return [f"{prefix}{number}: " + " ".join(draw.choices(WORDS, k=draw.randint(20, words))) for number in range(count)]


def edit_manifest(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a manifest as a tool with a fault would: its checksum is right again."""
    content = json.loads((root / "manifest.json").read_text())
    change(content)
    (root / "manifest.json").write_text(json.dumps(content | {"checksum": content_checksum(content)}))
