"""Segmentation: classes and label values, weights out of checkpoints, whole volumes, scores, pictures and files."""

from __future__ import annotations

__all__: list[str] = []
