"""Evaluation: metrics of a representation, and warnings about collapse and shortcuts."""

from __future__ import annotations

__all__: list[str] = []
