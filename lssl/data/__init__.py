"""Data: visit tables, reading of files, pairs of visits, and batches.

Tables, NIfTI, pairs and the store import no torch, so that commands on data start at once.
"""

from __future__ import annotations

__all__ = ["STEP"]

#: Images that are stored or sent as int16 count in these steps: 0 is background, 1 (1000 steps) the brightest tissue.
STEP = 1e-3
