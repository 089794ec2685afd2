"""Decoding: attention of a few new tokens per sequence over a cache of keys, values and block means."""

from .api import decode_attention, select_cached_blocks
from .cache import KeyValueCache, append_to_cache, build_cache, update_block_means
from .roofline import decode_bytes

__all__ = [
    "KeyValueCache",
    "append_to_cache",
    "build_cache",
    "decode_attention",
    "decode_bytes",
    "select_cached_blocks",
    "update_block_means",
]
