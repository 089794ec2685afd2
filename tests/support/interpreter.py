"""Triton's interpreter without work that it repeats: a kernel's call of another jit function patches Triton's whole language again.

A launch patches `triton.language`, so that its builtins compute with NumPy, and restores it at its end. Each call of a jit function inside the
kernel does so again (3.6 and 3.7), which changes nothing and takes a third of the time of these tests. Here such a call finds the language
patched and leaves it. A launch itself is not changed.

Source: triton/runtime/interpreter.py, `GridExecutor.__call__` and `InterpretedFunction.__call__`.
"""

from collections.abc import Callable


def patch_once_per_launch() -> None:
    """Makes the interpreter patch the language once per launch. A version of Triton without its function is left as it is."""
    from triton import language
    from triton.runtime import interpreter

    original: Callable | None = getattr(interpreter, "_patch_lang", None)
    if original is None or getattr(original, "once", False):
        return
    untouched, modules = language.tensor.__dict__.get("__index__"), (language, language.core)

    def patch(fn: Callable):
        in_a_launch = language.tensor.__dict__.get("__index__") is not untouched
        used = [module for module in modules if any(value is module for value in fn.__globals__.values())]
        if in_a_launch and not any(language.core.is_builtin(module.load) for module in used):
            return None  # an inner call does not restore what it has patched
        return original(fn)

    patch.once = True
    interpreter._patch_lang = patch
