"""Evaluation: figures of a representation, and whether they look healthy."""

from __future__ import annotations

__all__: list[str] = []
