"""Correspondence: which place of one visit is which place of another."""

from __future__ import annotations

__all__: list[str] = []
