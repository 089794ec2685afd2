"""Page-locked host memory for the copies of a training state.

Most of the time that locking takes goes into the first touch of the pages. So the pages are huge where the system has such pages, several threads
touch them, and many tensors share a block. Two GiB took 0.14 s in this way on a host of an H200, and 1.33 s by plain pages touched by the driver. torch's
pinned allocator is not used: it rounds the size of each tensor up to a power of two.
"""

import mmap
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor
from torch.cuda._pin_memory_utils import pin_memory, unpin_memory

from ssa_pretrain.errors import CheckpointError

BLOCK = 2**28  # bytes that are locked at once
LARGE = 4  # tensors above BLOCK / LARGE have blocks of their own, so less than that of a shared block stays unused
ALIGNMENT = 256  # bytes
CHUNK, THREADS = 2**24, 8  # bytes that a thread touches at a time


class LockedMemory:
    """Blocks of page-locked memory that tensors are taken from; they are freed with this object, which must outlive its tensors."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._shared: mmap.mmap | None = None  # the block that small tensors share
        self._used = 0  # bytes of it

    def like(self, tensor: Tensor) -> Tensor:
        """Returns a contiguous host tensor of a tensor's shape and type, with any values, whose storage is its own part of a block.

        `torch.save` writes the whole storage of a tensor, and refuses two types in one storage.

        Raises:
            CheckpointError: the memory cannot be locked.
        """
        needed = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if not needed:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        if needed > BLOCK // LARGE:
            pages, offset = self._new_block(needed), 0
        else:
            if self._shared is None or self._used + needed > BLOCK:
                self._shared, self._used = self._new_block(BLOCK), 0
            pages, offset = self._shared, self._used
            self._used += needed
        return torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)

    def _new_block(self, size: int) -> mmap.mmap:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_DONTFORK)  # a forked process would get copies of locked pages at once
        with suppress(OSError):  # a system without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
        block = torch.frombuffer(pages, dtype=torch.uint8)
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(Tensor.zero_, block.split(CHUNK)))
        try:
            pin_memory(block.data_ptr(), size)
        except RuntimeError as error:
            raise CheckpointError(
                f"{size / 2**30:.1f} GiB of host memory cannot be page-locked for a copy of the training state ({error}); "
                "set checkpoint.asynchronous=false"
            ) from None
        weakref.finalize(block, unpin_memory, block.data_ptr()).atexit = False  # at exit CUDA may be gone before
        self._blocks.append(block)
        return pages
