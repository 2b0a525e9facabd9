"""Networks: the backbone and its named features, heads, teacher and queue."""

from __future__ import annotations

__all__: list[str] = []
