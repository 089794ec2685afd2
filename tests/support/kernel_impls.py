"""The implementations of the kernels' operators that can run here: the references, and Triton if its interpreter is on."""

IMPLS = ["reference"]
try:
    import triton
except ImportError:
    pass
else:
    if triton.knobs.runtime.interpret:
        IMPLS.append("triton")
