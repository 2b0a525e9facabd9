"""New and changed lesions from two visits: the task, its report and its files."""

from __future__ import annotations

__all__: list[str] = []
