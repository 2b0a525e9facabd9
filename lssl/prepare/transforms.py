"""Averages of rigid and affine maps, and the half-way frame of several visits.

A map is a ``(4, 4)`` float64 matrix on points in mm (RAS+). Averages are taken in the Lie algebra: the midpoint of the
identity and ``T`` is ``exp(½ log T)``, which is rigid if ``T`` is, and which does not depend on where the origin lies.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.linalg import expm, logm

__all__ = [
    "between",
    "closure",
    "displacement",
    "exponential",
    "half_way",
    "logarithm",
    "motion",
    "right_turn",
    "right_turns",
    "rotation_degrees",
]

ITERATIONS = 200
TOLERANCE = 1e-10


def logarithm(matrix: np.ndarray) -> np.ndarray:
    """Real principal logarithm of a ``(4, 4)`` map."""
    return np.real(logm(matrix))


def exponential(tangent: np.ndarray) -> np.ndarray:
    """The map of a ``(4, 4)`` tangent; its last row is (0, 0, 0, 1) to the bit."""
    matrix = expm(tangent)
    matrix[3] = (0, 0, 0, 1)
    return matrix


def between(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """The middle of a map and the inverse of the map measured the other way round.

    ``F exp(½ log(F⁻¹ B⁻¹))``: exchanging the two gives the inverse.
    """
    return forward @ exponential(0.5 * logarithm(np.linalg.inv(forward) @ np.linalg.inv(backward)))


def half_way(number: int, measured: Mapping[tuple[int, int], np.ndarray]) -> list[np.ndarray]:
    """Maps from one half-way frame into the space of every visit, from pairwise registrations.

    With ``M_i`` from frame to visit ``i``, a registration measures ``T_ij = M_j M_i⁻¹`` (a point of visit ``i`` → the
    same point in visit ``j``). The ``M_i`` are the least-squares solution ``Σ ‖log(T_ij M_i M_j⁻¹)‖²``, found by moving
    each visit to the mean of what the others say of it; the frame is the one in which the ``M_i`` average to the
    identity, ``Σ log M_i = 0``. No visit is the reference, and all maps between visits, ``M_j M_i⁻¹``, agree with each
    other by construction.

    A visit that lies by right angles against the others has a wrong header, and no half of that is meant: its turn is
    set aside first, so the frame lies as most visits do, or as the first where there is no majority.

    Args:
        number: of visits.
        measured: ``(i, j)`` → ``T_ij``, one direction of each pair; the pairs connect all visits.

    Returns:
        ``number`` maps, frame → visit; the identity for a single visit.
    """
    turns = _right_angles(_along_tree(number, _both(measured)))
    upright = {(i, j): turns[j].T @ matrix @ turns[i] for (i, j), matrix in measured.items()}
    return [turn @ matrix for turn, matrix in zip(turns, _least_squares(number, upright), strict=True)]


def right_turns() -> list[np.ndarray]:
    """The 24 rotations by right angles, ``(4, 4)``, the identity first."""
    found = []
    for signs in itertools.product((1.0, -1.0), repeat=3):
        for order in itertools.permutations(range(3)):
            turn = np.eye(4)
            turn[:3, :3] = np.eye(3)[list(order)] * np.array(signs)[:, None]
            if np.linalg.det(turn) > 0:
                found.append(turn)
    return found


def right_turn(matrix: np.ndarray) -> np.ndarray:
    """The rotation by right angles ``(4, 4)`` that is nearest to a map's."""
    return max(right_turns(), key=lambda turn: float(np.trace(turn[:3, :3].T @ matrix[:3, :3])))


def _right_angles(maps: list[np.ndarray]) -> list[np.ndarray]:
    """``(4, 4)`` turn of each visit by right angles against most of them."""
    own = [right_turn(matrix) for matrix in maps]
    names = [turn.tobytes() for turn in own]
    most = own[names.index(max(names, key=names.count))]  # the first of the most frequent
    return [turn @ most.T for turn in own]


def _both(measured: Mapping[tuple[int, int], np.ndarray]) -> dict[tuple[int, int], np.ndarray]:
    """Both directions of each pair."""
    return {**measured, **{(j, i): np.linalg.inv(matrix) for (i, j), matrix in measured.items()}}


def _least_squares(number: int, measured: Mapping[tuple[int, int], np.ndarray]) -> list[np.ndarray]:
    """The maps that :func:`half_way` describes, of visits that lie alike."""
    both = _both(measured)
    maps = _along_tree(number, both)
    for _ in range(ITERATIONS if number > 2 else 0):
        change = 0.0
        for j in range(number):
            said = [matrix @ maps[i] @ np.linalg.inv(maps[j]) for (i, to), matrix in both.items() if to == j]
            step = np.mean([logarithm(matrix) for matrix in said], 0)
            maps[j] = exponential(step) @ maps[j]
            change = max(change, float(np.abs(step).max()))
        if change < TOLERANCE:
            break
    return _centred(maps)


def _along_tree(number: int, both: Mapping[tuple[int, int], np.ndarray]) -> list[np.ndarray]:
    """A first guess: visit 0 is the frame, the others follow from it one measurement at a time."""
    maps: dict[int, np.ndarray] = {0: np.eye(4)}
    while len(maps) < number:
        i, j = next((i, j) for i, j in sorted(both) if i in maps and j not in maps)
        maps[j] = both[i, j] @ maps[i]
    return [maps[i] for i in range(number)]


def _centred(maps: list[np.ndarray]) -> list[np.ndarray]:
    """The same maps from the frame in which they average to the identity."""
    for _ in range(ITERATIONS):
        mean = np.mean([logarithm(matrix) for matrix in maps], 0)
        if np.abs(mean).max() < TOLERANCE:
            break
        maps = [matrix @ exponential(-mean) for matrix in maps]
    return maps


def closure(measured: Mapping[tuple[int, int], np.ndarray], points: np.ndarray) -> float:
    """Largest mean displacement in mm of points ``(N, 3)`` that go once round any triangle of registrations."""
    both = _both(measured)
    rounds = [
        both[k, i] @ both[j, k] @ both[i, j]
        for (i, j) in measured
        for k in {a for a, _ in both}
        if k > j and (j, k) in both and (k, i) in both
    ]
    return max((displacement(matrix, np.eye(4), points) for matrix in rounds), default=0.0)


def displacement(one: np.ndarray, other: np.ndarray, points: np.ndarray) -> float:
    """Mean distance in mm between two maps of points ``(N, 3)``."""
    difference = (one - other)[:3]
    return float(np.linalg.norm(points @ difference[:, :3].T + difference[:, 3], axis=1).mean())


def rotation_degrees(matrix: np.ndarray) -> float:
    """Angle of the rotation nearest to the linear part."""
    left, _, right = np.linalg.svd(matrix[:3, :3])
    return float(np.degrees(np.arccos(np.clip((np.trace(left @ right) - 1) / 2, -1, 1))))


def motion(maps: Sequence[np.ndarray], visit: int, points: np.ndarray) -> dict[str, float]:
    """How a head moved in the scanner between a visit and the one that differs most from it.

    Args:
        maps: half-way frame → each visit, mm.
        visit: which one.
        points: ``(N, 3)`` mm, of the head at this visit.

    Returns:
        ``rotation_deg``, the largest rotation from this visit to another, and ``moved_mm``, the largest mean distance,
        both 0 for a single visit; ``volume_factor``, the volume at this visit over that in the frame, 1 for rigid maps.
    """
    inverse = np.linalg.inv(maps[visit])
    others = [other @ inverse for number, other in enumerate(maps) if number != visit]
    return {
        "rotation_deg": max(map(rotation_degrees, others), default=0.0),
        "moved_mm": max((displacement(other, np.eye(4), points) for other in others), default=0.0),
        "volume_factor": float(abs(np.linalg.det(maps[visit][:3, :3]))),
    }
