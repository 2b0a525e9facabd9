"""Cohorts: which visits there are (BIDS, CSV), how their files are read, and which of them form pairs.

Used by preparation and by the datamodules alike. Nothing here imports torch, so that commands on data start at once.
"""

from __future__ import annotations

__all__: list[str] = []
