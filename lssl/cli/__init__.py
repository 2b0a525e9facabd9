"""The command line: besides the benchmark, the only room that may import all others."""

from __future__ import annotations

__all__: list[str] = []
