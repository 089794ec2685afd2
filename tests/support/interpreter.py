"""Triton's interpreter without work that it repeats, which is half of the time of the kernels' tests. What kernels compute stays the same.

A launch patches `triton.language`, so that its builtins compute with NumPy, and restores it at its end. Each call of a jit function inside the
kernel does so again, which changes nothing: here such a call finds the language patched and leaves it. The table of NumPy's types is built for each
operation: here once per type. A reduction by ^, of which sorting has many, is computed element by element: here by NumPy, like the other reductions.

Triton 3.6 takes the number of an array with one element in a way that NumPy 2.4 refuses: here it does so as 3.7 does.

Source: triton/runtime/interpreter.py of Triton 3.6 to 3.9, whose private functions these are. A version without one of them stays as it is.
"""

import functools
from collections.abc import Callable

import numpy as np


def make_faster() -> None:
    """Replaces the interpreter's functions; a second call does nothing."""
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "_get_np_dtype", "ReduceOps")):
        return
    if hasattr(interpreter._patch_lang, "__wrapped__"):
        return
    interpreter._patch_lang = _once_per_launch(interpreter._patch_lang)
    interpreter._get_np_dtype = _once_per_type(interpreter._get_np_dtype)
    interpreter.ReduceOps.apply_impl = _with_xor(interpreter.ReduceOps.apply_impl)


def _once_per_launch(patch: Callable) -> Callable:
    from triton import language

    untouched, modules = language.tensor.__dict__.get("__index__"), (language, language.core)

    @functools.wraps(patch)
    def once(fn: Callable):
        is_in_a_launch = language.tensor.__dict__.get("__index__") is not untouched
        used = [module for module in modules if any(value is module for value in fn.__globals__.values())]
        if is_in_a_launch and not any(language.core.is_builtin(module.load) for module in used):
            return None  # a call inside a kernel restores nothing
        scope = patch(fn)
        language.tensor.__index__ = lambda self: int(self.handle.data.squeeze())
        return scope

    return once


def _once_per_type(numpy_type: Callable) -> Callable:
    from triton import language

    cached = functools.cache(numpy_type)

    def of(dtype):
        element = dtype.scalar
        return numpy_type(element) if isinstance(element, language.pointer_type) else cached(element)

    return of


def _with_xor(apply: Callable) -> Callable:
    from triton import language

    @functools.wraps(apply)
    def reduce(self, tensors):
        if self.combine_fn != language.standard._xor_combine:
            return apply(self, tensors)
        (one,) = tensors
        found = np.bitwise_xor.reduce(one.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(found, one.dtype)

    return reduce
