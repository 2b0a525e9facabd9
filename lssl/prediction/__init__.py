"""Prediction: a class or a number of a subject, from one visit or from two visits and the years between them."""

from __future__ import annotations

__all__: list[str] = []
