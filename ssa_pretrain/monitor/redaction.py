"""Removes what looks like a secret from values that leave this machine."""

import re
from collections.abc import Mapping
from typing import Any

from ssa_pretrain.settings.problems import SECRET

HIDDEN = "<hidden>"

# Shapes of credentials: W&B, Hugging Face, GitHub, AWS, OpenAI-like keys, JSON web tokens, and passwords inside URLs.
_CREDENTIAL = re.compile(
    r"\b[0-9a-f]{40}\b|\bwandb_v1_\w{20,}|\bhf_\w{20,}|\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|\bAKIA[0-9A-Z]{16}\b"
    r"|\bsk-[\w-]{20,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


def redact(value: Any) -> Any:
    """Returns the value with secrets replaced: mapping entries by their key's name, strings by their shape.

    Args:
        value: mappings, lists and plain values, nested in any way.
    """
    if isinstance(value, Mapping):
        return {key: HIDDEN if SECRET.search(str(key)) and item else redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if isinstance(value, str):
        return _CREDENTIAL.sub(HIDDEN, value)
    return value
