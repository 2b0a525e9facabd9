"""What several processes, or accumulated steps, make of batch size, negatives and learning rate; in words."""

from __future__ import annotations

import math

__all__ = ["scaling"]


def scaling(pairs: int, processes: int, accumulated: int, rate: float) -> str:
    """States the global batch, and that the learning rate is not scaled with it; empty for one process and no sum.

    Args:
        pairs: per process and step.
        processes: that train together.
        accumulated: steps per update (``accumulate_grad_batches``).
        rate: the full learning rate.
    """
    if processes * accumulated == 1:
        return ""
    step, update = pairs * processes, pairs * processes * accumulated
    each = f"{pairs} pair{'s'[: pairs > 1]}"
    text = f"{processes} processes × {each} = {step} pairs a step" if processes > 1 else f"{each} a step"
    if accumulated > 1:
        text += (
            f"; {accumulated} steps make an update of {update} pairs, but in-batch negatives and statistics are those "
            f"of the {step} pairs of a step"
        )
    times = processes * accumulated
    linear, root = times * rate, math.sqrt(times) * rate
    return (
        f"{text}. The learning rate stays {rate:g}, whatever the batch. If it suits {each}, then {linear:.2g} "
        f"(linear, for SGD) or {root:.2g} (square root, for Adam) are customary for {update}."
    )
