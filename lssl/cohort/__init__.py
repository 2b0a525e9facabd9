"""Cohorts: which visits there are (BIDS, CSV), how their files are read, and which of them form pairs.

Used by preparation and by the datamodules alike. Nothing here imports torch, so that commands on data start at once.
"""

from __future__ import annotations

__all__ = ["STEP"]

#: Images that are stored or sent as int16 count in these steps: 0 is background, 1 (1000 steps) the brightest tissue.
STEP = 1e-3
