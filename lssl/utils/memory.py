"""Available memory: checked before a large allocation, and what an allocation that failed says."""

from __future__ import annotations

import re
import resource
import traceback
from pathlib import Path

import lssl
from lssl.utils.errors import InputError

__all__ = ["available_memory", "data_memory", "out_of_memory", "refuse_larger_than_memory"]

PACKAGE = Path(lssl.__file__).parent
RUNNERS = ("cli", "callbacks", "guards", "runs", "utils")  # rooms that call what allocates
UNITS = {"bytes": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40, "PiB": 2.0**50, "EiB": 2.0**60}
# The wording of torch (CPUs, GPUs), numpy and C++; tests/utils/test_memory.py fails when it changes.
FAILED = re.compile(r"can't allocate memory|out of memory|Unable to allocate|bad_alloc|std::length_error")
ASKED = re.compile(r"(?:[Tt]ried to allocate|Unable to allocate) ([\d.]+) (bytes|[KMGTPE]iB)")
ON_GPU = re.compile(r"GPU \d+ has a total capacity of [\d.]+ \w+ of which ([\d.]+) (\w+) is free")


def _number(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def available_memory() -> int | None:
    """Bytes that this process may still allocate; ``None`` if the system does not report it.

    The minimum of three: the machine's free memory (``MemAvailable``), the rest of the control group's limit (versions
    1 and 2), and the rest of the address-space limit.
    """
    left: list[int] = []
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        left.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, taken = (_number(f"/sys/fs/cgroup/{name}") for name in (most, used))
        if limit is not None and taken is not None:
            left.append(max(0, limit - taken))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        try:
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        except (OSError, ValueError):
            mapped = 0
        left.append(max(0, limit - mapped))
    return min(left) if left else None


def refuse_larger_than_memory(needed: int, what: str, instead: str, left: int | None = None) -> None:
    """Refuses an allocation that cannot succeed.

    Args:
        needed: bytes.
        what: what needs them, as the subject of a sentence.
        instead: what to do.
        left: bytes that are free, on another device; ``None`` asks :func:`available_memory`.
    """
    left = available_memory() if left is None else left
    if left is not None and needed > left:
        raise InputError(
            f"{what} needs {needed / 1e9:.3g} GB of memory, of which {left / 1e9:.3g} are left; {instead}."
        )


def data_memory() -> int | None:
    """Bytes of this process that ``RLIMIT_DATA`` counts; ``None`` where the system does not tell."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmData"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def out_of_memory(error: BaseException, left: int | None = None) -> InputError | None:
    """One sentence for an allocation of torch, numpy or Python that failed, also as a parser quotes it; else ``None``.

    Args:
        error: as raised.
        left: bytes that were free when the run began; ``None`` if unknown.
    """
    text = str(error)
    if isinstance(error, InputError) or not (isinstance(error, MemoryError) or FAILED.search(text)):
        return None
    asked = ASKED.search(text)
    more = f"{_gigabytes(*asked.groups()):.3g} GB more" if asked else "more"
    gpu = ON_GPU.search(text)
    if gpu:
        there = f", with {_gigabytes(*gpu.groups()):.3g} GB of the GPU's left"
    else:
        there = "" if left is None else f", and {left / 1e9:.3g} GB in all were free when it began"
    return InputError(
        f"The run is out of memory: it asked for {more}{_asker(error)}{there}. Choose a smaller "
        f"data.init_args.batch_size or views.size, or a smaller number in the options (samples, queue, size)."
    )


def _gigabytes(number: str, unit: str) -> float:
    return float(number) * UNITS.get(unit, 1.0) / 1e9


def _asker(error: BaseException) -> str:
    """The file of lssl that asked for it, if it is one that computes."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if PACKAGE in path.parents:
            name = path.relative_to(PACKAGE.parent)
            return "" if name.parts[1] in RUNNERS else f" ({name}, {frame.name})"
    return ""
