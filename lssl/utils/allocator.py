"""The C library's allocator: keeps freed blocks, so that training steps on CPUs reuse their memory.

glibc returns every large freed block to the system (``mmap`` and ``munmap``). Each training step on the CPU allocates
its activations again, and the kernel then clears every page. :func:`keep_freed_memory` tells glibc to keep freed blocks
instead. Measured in one process on a training step of the default U-Net, before and after: 1846 → 1123 ms (**1.64
times** faster), with ``channels_last`` 1179 → 853 ms (**1.38 times**); bfloat16 gains nothing. The price: used memory
is not returned before the process ends.

Any ``MALLOC_…`` variable in the environment switches it off, as the user's own choice. ``MALLOC_TRIM_THRESHOLD_=131072
lssl fit …`` gives glibc's defaults.
"""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # numbers of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Makes glibc keep freed blocks; does nothing with a GPU, another C library, or any ``MALLOC_…`` variable set.

    Returns:
        Whether the allocator was changed.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    import torch

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is None or torch.cuda.is_available():
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
