"""WithinMemory: a run that needs more memory than there is ends with a sentence, not with a kill."""

from __future__ import annotations

import resource
from types import TracebackType
from typing import Any

import lightning as L
import torch

from lssl.utils.memory import available_memory, data_memory, out_of_memory

__all__ = ["WithinMemory"]


class WithinMemory(L.Callback):
    """Until the first step is done, allocations beyond the free memory fail.

    Linux grants memory that it does not have, and later kills the process that uses it, without a word. With a limit
    on the process' data (``RLIMIT_DATA``) the allocation itself fails, and whatever option asked for too much, the run
    ends with a sentence and leaves no folder. After the first step the need of a run is known and the limit is lifted,
    as other programs may have returned memory by then. It is also a context manager, around all that a run builds.

    There is no limit with a GPU, whose driver reserves address space that it does not use, and where the system does
    not tell its memory.
    """

    def __init__(self) -> None:
        self.free: int | None = None
        self._before: tuple[int, int] | None = None

    def __enter__(self) -> WithinMemory:
        """Sets the limit."""
        self.free, used = available_memory(), data_memory()
        if self.free is not None and used is not None and not torch.cuda.is_available():
            soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
            wanted = used + self.free
            if all(limit == resource.RLIM_INFINITY or wanted < limit for limit in (soft, hard)):
                self._before = soft, hard
                resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lifts it; says what was asked for, if memory has run out."""
        self.lift()
        if error is not None and (mistake := out_of_memory(error, self.free)):
            raise mistake from error

    def lift(self) -> None:
        """Gives the process the limit that it had."""
        if self._before is not None:
            resource.setrlimit(resource.RLIMIT_DATA, self._before)
            self._before = None

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Lifts it after the first step."""
        self.lift()
