"""What draws synthetic heads and brains, and how they age."""

from __future__ import annotations

__all__: list[str] = []
