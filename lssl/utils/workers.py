"""Worker processes: what they need of the system, checked before they start, and how they start."""

from __future__ import annotations

import multiprocessing
import os
import resource

import torch
import torch.multiprocessing

from lssl.utils.errors import InputError
from lssl.utils.files import check_temporary
from lssl.utils.stop import end_with_parent, leave_signals_to_parent

__all__ = ["check_workers", "start_worker"]

SHARED = "/dev/shm"  # nosec B108: where Linux keeps what processes share
AHEAD = 2  # batches that a worker reads ahead, torch's default
OWN, EACH = 128, 64  # open files of a process, and of every worker: each tensor that is under way holds one


def check_workers(workers: int, batch_bytes: int) -> None:
    """Makes room for open files, and refuses workers whose batches do not fit into shared memory.

    A worker that meets the limit of open files dies, and the run would wait for its batch for ever. So the soft limit
    is raised; where that is not allowed, tensors are shared through named files, which need not stay open. A worker
    that cannot make a folder in TMPDIR, where its batches are fetched by a socket, would be waited for as well.

    Args:
        workers: processes that read.
        batch_bytes: of one batch; 0 if unknown.

    Raises:
        InputError: if the batches under way do not fit into ``/dev/shm``, or no temporary file can be written.
    """
    if not workers:
        return
    check_temporary()
    needed = OWN + EACH * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < needed:
            torch.multiprocessing.set_sharing_strategy("file_system")
    under_way = workers * AHEAD * batch_bytes
    free = _free_shared_memory()
    if free is not None and under_way > free:
        raise InputError(
            f"{workers} workers hold up to {under_way / 1e6:,.0f} MB of batches in {SHARED}, of which "
            f"{free / 1e6:,.0f} MB are free; lower data.init_args.num_workers or batch_size, or give the container "
            f"more (docker run --shm-size)."
        )


def start_worker(_: int) -> None:
    """Gives a worker one torch thread, as more would compete with the other workers; it ends with its parent.

    Torch ends orphans, too, but only between two reads, and a read may hang. What a signal to both means, the parent
    decides.
    """
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        leave_signals_to_parent(parent.pid)
        end_with_parent(parent.pid)


def _free_shared_memory() -> int | None:
    """Bytes; ``None`` where the system has no such place."""
    try:
        found = os.statvfs(SHARED)
    except (OSError, AttributeError):
        return None
    return found.f_bavail * found.f_frsize
