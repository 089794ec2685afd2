"""Removes what looks like a secret from values that leave this machine, and the secrets of this process's environment."""

import os
import re
from collections.abc import Mapping
from typing import Any

from ssa_pretrain.settings.problems import HIDDEN, SECRET, hide_secrets, secrets_of

_OLD_WANDB_KEY = re.compile(r"\b[0-9a-f]{40}\b")


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
        return _OLD_WANDB_KEY.sub(HIDDEN, hide_secrets(value, secrets_of(os.environ)))
    return value
