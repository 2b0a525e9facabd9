"""Views: their geometry, intensities, points and masks."""

from __future__ import annotations

__all__: list[str] = []
