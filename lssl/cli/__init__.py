"""The command line: the only room that knows all the others, the benchmark's aside."""

from __future__ import annotations

__all__: list[str] = []
