"""What ends a training command, as one sentence: the parser's refusal, a full disk, a process that is gone."""

from __future__ import annotations

import errno
import inspect
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch import callbacks
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import distributed
from torch.multiprocessing import ProcessExitedException

from lssl.cli.messages import explain
from lssl.cli.settings import of_a_library, other_weights, trainer_refusal
from lssl.utils.errors import InputError, input_error
from lssl.utils.files import check_temporary, writing_failed
from lssl.utils.memory import out_of_memory
from lssl.utils.stop import NoBatch, Stopped, end_soon, obey_signals

__all__ = ["explained", "stop_launched"]

GONE = (
    "Another process of this run has ended or cannot be reached (if it said why, that is above), so this one stops, "
    "too. Go on with --ckpt_path last."
)


@contextmanager
def explained(classes: Sequence[type]) -> Iterator[None]:
    """Turns failures that are not the program's into one sentence.

    Args:
        classes: those that a parser's refusal may suggest, with those of their modules.
    """
    try:
        yield
    except ArgumentError as error:
        rooms = {sys.modules[cls.__module__] for cls in classes} | {callbacks}
        beside = {getattr(room, name) for room in rooms for name in getattr(room, "__all__", ())}
        known = sorted(filter(inspect.isclass, {*beside, *classes}), key=lambda cls: cls.__name__)
        raise explain(error, known) from None
    except OSError as error:  # of logs and pictures; checkpoints say it themselves
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
        if full and (mistake := writing_failed(Path(error.filename or "The run folder"), error)):
            raise mistake from error
        raise
    except MisconfigurationException as error:
        raise input_error(error) or trainer_refusal(error) from error
    except ValueError as error:
        if mistake := input_error(error) or other_weights(error) or of_a_library(error):
            raise mistake from (None if mistake is error else error)
        raise
    except (MemoryError, RuntimeError) as error:
        if mistake := out_of_memory(error) or other_weights(error):
            raise mistake from error
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise InputError(GONE) from error
        raise
    except ProcessExitedException as error:
        if error.exit_code > 0:  # it has said why; or it was asked to stop, and this is the signal's status
            raise SystemExit(error.exit_code) from None
        raise InputError(GONE) from error


@contextmanager
def stop_launched(trainer: Any) -> Iterator[None]:
    """Cares for the processes that this one launches (``ddp_spawn``, ``ddp_fork``, ``ddp_notebook``).

    Torch hands on what ends one of them as a file in TMPDIR, which may be full. So each says it itself, in one
    sentence, and ends with status 2. If a signal stops this process, they are asked to save and end, too.

    Args:
        trainer: of the run.

    Raises:
        InputError: if they could not be launched, as no folder for temporary files can be written.
    """
    launcher = trainer.strategy.launcher
    launches = isinstance(launcher, _MultiProcessingLauncher)
    if launches:
        check_temporary()
        launcher._wrapping_function = partial(_launched, type(launcher)._wrapping_function, launcher)
    try:
        yield
    except Stopped:
        if launches:
            launcher.kill(signal.SIGTERM)  # a second Ctrl-C would end them at once
        raise


def _launched(function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Runs in a launched process; Lightning calls no ``on_exception`` there."""
    obey_signals()  # until the run listens
    try:
        with explained([]):
            function(*args, **kwargs)
    except NoBatch:
        status = 128 + signal.SIGTERM
        end_soon(status)
        raise SystemExit(status) from None
    except Exception as error:
        mistake = input_error(error)
        if mistake is None:
            raise
        print(f"lssl: error: {mistake}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
