"""Correspondence: matching points between visits."""

from __future__ import annotations

__all__: list[str] = []
