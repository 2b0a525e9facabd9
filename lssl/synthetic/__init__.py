"""Synthetic heads and brains that age by known deformations."""

from __future__ import annotations

__all__: list[str] = []
