"""Triton's interpreter without work that it repeats, which is most of the time of the kernels' tests. What kernels compute stays the same.

A launch patches `triton.language`, so that its builtins compute with NumPy, and restores it at its end. Each call of a jit function inside the
kernel does so again, which changes nothing: here such a call finds the language patched and leaves it. The table of NumPy's types is built for each
operation: here once per type. A reduction by ^, of which sorting has many, is computed element by element: here by NumPy, like the other reductions.
Each operation makes types and tensors, which check and wrap their shape: here once per shape. Each sum, difference and product of integers is computed
again in 64 bits for an assertion that is made with the option `debug` only: here with that option only.

Triton 3.6 takes the number of an array with one element in a way that NumPy 2.4 refuses: here it does so as 3.7 does.

Source: triton/runtime/interpreter.py of Triton 3.6 to 3.9, whose private functions these are. A version without one of them stays as it is.
"""

import functools
from collections.abc import Callable

import numpy as np


def make_faster() -> None:
    """Replaces the interpreter's functions; a second call does nothing."""
    from triton import language
    from triton.runtime import interpreter

    names = ("_patch_lang", "_get_np_dtype", "ReduceOps", "interpreter_semantic")
    if not all(hasattr(interpreter, name) for name in names):
        return
    if hasattr(interpreter._patch_lang, "__wrapped__"):
        return
    interpreter._patch_lang = _once_per_launch(interpreter._patch_lang)
    interpreter._get_np_dtype = _once_per_type(interpreter._get_np_dtype)
    interpreter.ReduceOps.apply_impl = _with_xor(interpreter.ReduceOps.apply_impl)
    language.block_type.__init__ = _type_once_per_shape(language.block_type.__init__)
    language.tensor.__init__ = _tensor_once_per_shape(language.tensor.__init__)
    semantic = type(interpreter.interpreter_semantic)
    if hasattr(semantic, "binary_op_sanitize_overflow_impl"):
        semantic.binary_op_sanitize_overflow_impl = _if_it_asserts(semantic.binary_op_sanitize_overflow_impl)


def _once_per_launch(patch: Callable) -> Callable:
    from triton import language

    untouched, modules = language.tensor.__dict__.get("__index__"), (language, language.core)

    @functools.cache
    def used(fn: Callable) -> list:
        return [module for module in modules if any(value is module for value in fn.__globals__.values())]

    @functools.wraps(patch)
    def once(fn: Callable):
        is_in_a_launch = language.tensor.__dict__.get("__index__") is not untouched
        if is_in_a_launch and not any(language.core.is_builtin(module.load) for module in used(fn)):
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


def _type_once_per_shape(initialise: Callable) -> Callable:
    from triton import language

    known: dict[tuple, tuple[dict, str]] = {}

    @functools.wraps(initialise)
    def once(self, element_ty, shape) -> None:
        key = None
        if type(shape) in (list, language.tuple):
            sizes = [size.value if type(size) is language.constexpr else size for size in shape]
            key = (*sizes, *map(type, sizes))  # 16.0 is refused
        if key not in known:
            initialise(self, element_ty, shape)
            if key is not None:
                rest = {name: value for name, value in vars(self).items() if name not in ("element_ty", "name")}
                known[key] = rest, self.name.removesuffix(f"{element_ty}>")
            return
        rest, name = known[key]
        vars(self).update(rest, element_ty=element_ty, name=f"{name}{element_ty}>")

    return once


def _tensor_once_per_shape(initialise: Callable) -> Callable:
    known: dict[tuple, dict] = {}

    @functools.wraps(initialise)
    def once(self, handle, kind) -> None:
        key = tuple(kind.shape) if kind.is_block() else ()
        if key not in known:
            initialise(self, handle, kind)
            known[key] = {name: value for name, value in vars(self).items() if name not in ("handle", "type", "dtype")}
            return
        vars(self).update(known[key], handle=handle, type=kind, dtype=kind.scalar)

    return once


def _if_it_asserts(check: Callable) -> Callable:
    @functools.wraps(check)
    def checked(self, *arguments) -> None:
        if self.builder.options.debug:
            check(self, *arguments)

    return checked
