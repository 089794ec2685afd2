"""Settings as plain data: what a recipe stores and what a digest of settings is taken of."""

from dataclasses import asdict
from enum import Enum
from typing import Any
from urllib.parse import urlsplit, urlunsplit


def to_plain(section: Any) -> Any:
    """Returns settings as plain data for JSON, without users and passwords in URLs."""
    if hasattr(section, "__dataclass_fields__"):
        section = asdict(section)
    if isinstance(section, dict):
        return {str(key): to_plain(value) for key, value in section.items()}
    if isinstance(section, list | tuple):
        return [to_plain(value) for value in section]
    if isinstance(section, Enum):
        return section.value
    return without_credentials(section) if isinstance(section, str) else section


def without_credentials(text: str) -> str:
    """Returns a URL without user, password and query; other text unchanged."""
    if not text.lower().startswith(("http://", "https://")):
        return text
    parts = urlsplit(text)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def without_unset(settings: Any, name: str) -> Any:
    """Returns plain settings without a key wherever its value is null, as a version without this setting stored them."""
    if not isinstance(settings, dict):
        return settings
    return {key: without_unset(value, name) for key, value in settings.items() if key != name or value is not None}


def without_keys(settings: Any, names: tuple[str, ...]) -> Any:
    """Returns plain settings without some keys, at any depth of dictionaries."""
    if not isinstance(settings, dict):
        return settings
    return {key: without_keys(value, names) for key, value in settings.items() if key not in names}
