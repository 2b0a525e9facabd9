"""Run folders: where a run lives, what it logged, and how that is shown."""

from __future__ import annotations

__all__: list[str] = []
