"""Questions of a longitudinal study: volumes and embeddings over age, by subject and group."""

from __future__ import annotations

__all__: list[str] = []
