"""Small helpers that every room may use: errors, files, distributed sums, schedules."""

from __future__ import annotations

__all__: list[str] = []
