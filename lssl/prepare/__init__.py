"""Preparation: from a BIDS folder to co-registered, cached visits (`lssl prepare`), and what a folder holds.

Nothing here imports torch.
"""

from __future__ import annotations

__all__: list[str] = []
