"""Run folders: location, logs and figures of runs."""

from __future__ import annotations

__all__: list[str] = []
