"""Hydra's composition without work that it repeats, which is a third of the time that a command line takes. What is composed stays the same.

Hydra copies everything that it knows, every stored dataclass included, before it looks for options and before it composes. It does so only to give the
copy other sources, so here the copy is shallow. And for each file it makes a configuration of all choices, which only an interpolation in a defaults
list reads: here it is made for that.

Source: hydra/_internal/config_repository.py and defaults_list.py of Hydra 1.3, whose private functions these are.
"""

import copy
import functools
from collections.abc import Callable


def make_faster() -> None:
    """Replaces Hydra's functions; a second call does nothing."""
    from hydra._internal import config_repository, defaults_list

    if not hasattr(defaults_list, "_create_interpolation_map") or not hasattr(
        config_repository, "CachingConfigRepository"
    ):
        return  # another Hydra: slower, and the same
    if hasattr(defaults_list._create_interpolation_map, "__wrapped__"):
        return
    config_repository.CachingConfigRepository.__init__ = _with_a_shallow_copy
    defaults_list._create_interpolation_map = _if_it_is_read(defaults_list._create_interpolation_map)


def _with_a_shallow_copy(self, delegate) -> None:
    self.delegate = copy.copy(delegate)  # initialize_sources gives it another list
    self.cache = {}


def _if_it_is_read(create: Callable) -> Callable:
    @functools.wraps(create)
    def created(overrides, defaults_list, self_added):
        is_read = any("${" in str(vars(default)) for default in defaults_list)
        return create(overrides, defaults_list, self_added) if is_read else None

    return created
