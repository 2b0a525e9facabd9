"""Comparison of strategies: pretrain → fine-tune → test for every cell of a plan, then one table and one figure."""

from __future__ import annotations

__all__: list[str] = []
