"""Available memory, checked before a large allocation."""

from __future__ import annotations

import resource
from pathlib import Path

from lssl.utils.errors import InputError

__all__ = ["available_memory", "refuse_larger_than_memory"]


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
