"""Classes: maps arbitrary label values to contiguous classes, with names, frequencies and sides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lssl.data.source import DataSource
from lssl.segmentation.freesurfer import freesurfer_names
from lssl.utils.errors import InputError

__all__ = ["Classes", "LabelCounts", "count_labels", "ignored_values", "refuse_empty", "refuse_unknown"]

ONE_SIDED = 0.95  # a class with a larger share of its voxels in one half lies on that side


@dataclass
class LabelCounts:
    """Voxels of each label value, in both halves of the volumes.

    Attributes:
        left: value → voxels in the first half (of lower index, the patient's left).
        right: value → voxels in the second half.
        seen: row → values that its label map holds.
    """

    left: dict[int, int]
    right: dict[int, int]
    seen: dict[int, list[int]]

    def total(self, values: Iterable[int]) -> int:
        """Voxels of some values."""
        return sum(self.left.get(value, 0) + self.right.get(value, 0) for value in values)

    def left_share(self, value: int) -> float:
        """Share of a value's voxels in the left half."""
        return self.left.get(value, 0) / max(1, self.total([value]))

    def side(self, values: Iterable[int]) -> int:
        """-1 or 1 if nearly all voxels lie on the left or right, else 0."""
        values = list(values)
        left = sum(self.left.get(value, 0) for value in values)
        share = left / max(1, self.total(values))
        return -1 if share >= ONE_SIDED else 1 if share <= 1 - ONE_SIDED else 0


def count_labels(data: DataSource, rows: np.ndarray) -> LabelCounts:
    """Reads label maps and counts their values; the first damaged one raises its InputError."""
    counts = LabelCounts({}, {}, {})
    for row in rows:
        label = data.read_label(int(row))
        if label is None:
            continue
        counts.seen[int(row)] = np.unique(label).tolist()
        middle = label.shape[0] // 2
        for half, part in ((counts.left, label[:middle]), (counts.right, label[middle:])):
            for value, number in zip(*np.unique(part, return_counts=True), strict=True):
                half[int(value)] = half.get(int(value), 0) + int(number)
    return counts


@dataclass(frozen=True)
class Classes:
    """Class 0 is the background; class k is the k-th entry here.

    Attributes:
        names: of the classes but the background.
        values: label values of each class; other values are background if ``open``.
        open: whether other values are background (the classes were listed) or unknown (they were found in the data).
        ignored: values of unannotated voxels, which are excluded from losses and scores.
    """

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    open: bool
    ignored: tuple[int, ...] = ()

    @classmethod
    def choose(
        cls,
        class_map: Mapping[str, Sequence[int]] | None,
        ignore: Sequence[int] | None,
        counts: LabelCounts,
        names: Mapping[int, str],
    ) -> Classes:
        """The classes of the map, or else those found in the data; see :func:`ignored_values` for ``ignore``."""
        ignored = ignored_values(ignore, class_map, counts)
        return cls.found(counts, names, ignored) if class_map is None else cls.from_map(class_map, counts, ignored)

    @classmethod
    def from_map(
        cls, class_map: Mapping[str, Sequence[int]], counts: LabelCounts, ignored: Sequence[int] = ()
    ) -> Classes:
        """The configured classes; each class must occur in the training data, and each value in one class only."""
        values = [value for group in class_map.values() for value in group]
        twice = [value for value in values if values.count(value) > 1]
        if twice or min(values, default=1) < 1 or not values:
            what = f"label {twice[0]} stands twice" if twice else "labels of classes are whole numbers from 1 on"
            raise InputError(f"classes: {what}; write name: [label, …] with every label once.")
        for name, group in class_map.items():
            if not counts.total(group):
                raise InputError(
                    f"classes: '{name}' ({', '.join(map(str, group))}) is never seen in the labelled training visits, "
                    f"which hold {', '.join(map(str, sorted({*counts.left, *counts.right})))}; take it out, or label "
                    f"more visits."
                )
        if both := sorted({*values} & {*ignored}):
            raise InputError(f"ignore: label {both[0]} belongs to a class, too; take it out of ignore or of classes.")
        return cls(tuple(class_map), tuple(tuple(group) for group in class_map.values()), True, tuple(ignored))

    @classmethod
    def found(cls, counts: LabelCounts, names: Mapping[int, str], ignored: Sequence[int] = ()) -> Classes:
        """Every label value of the training data becomes a class, except 0 and ignored values."""
        values = sorted(value for value in {*counts.left, *counts.right} if value > 0 and value not in ignored)
        if not values:
            raise InputError(
                "The label maps of the labelled training visits are empty: they hold no value but 0; check "
                "data.init_args.labels."
            )
        known = {**freesurfer_names(values, counts.left_share), **names}
        return cls(
            tuple(known.get(value, str(value)) for value in values), tuple((v,) for v in values), False, tuple(ignored)
        )

    @property
    def number(self) -> int:
        """Number of classes, with the background."""
        return len(self.names) + 1

    def weights(self, counts: LabelCounts, exponent: float) -> Tensor:
        """``(K,)`` frequency to the power ``-exponent``, of mean 1."""
        foreground = [counts.total(group) for group in self.values]
        every = sum(counts.left.values()) + sum(counts.right.values()) - counts.total(self.ignored)
        voxels = torch.tensor([max(1, every - sum(foreground)), *foreground], dtype=torch.float64)
        weights = (voxels / every) ** -exponent
        return (weights / weights.mean()).float()

    def class_of_value(self) -> Tensor:
        """``(max + 2,)`` int64: class of label value v at ``v + 1``; -1 for -1 (no label) and for ignored values."""
        known = [*self.ignored, *(value for group in self.values for value in group)]
        table = torch.zeros(max(known) + 2, dtype=torch.long)
        table[0] = -1
        for value in self.ignored:
            table[value + 1] = -1
        for number, group in enumerate(self.values, 1):
            table[torch.tensor(group) + 1] = number
        return table

    def label_values(self) -> Tensor:
        """``(K,)`` int64 label value that each class is written as (its first); processes cannot exchange int16."""
        return torch.tensor([0, *(group[0] for group in self.values)])

    def mirrored_class(self, counts: LabelCounts | None, flips: bool) -> Tensor:
        """``(K,)`` mirrored class of each class: *left* and *right* of its name are swapped.

        Args:
            counts: voxels per side, to find one-sided classes whose names do not show it; ``None``: names decide.
            flips: whether views are mirrored; if so, a one-sided class needs a partner.
        """
        swapped, alone = list(range(self.number)), []
        side = [counts.side(values) if counts else 0 for values in self.values]
        for number, name in enumerate(self.names, 1):
            other = _mirrored(name)
            if other != name and other in self.names:
                swapped[number] = self.names.index(other) + 1
            elif other != name or side[number - 1]:
                alone.append(number)
        sides = {side[number - 1] for number in alone}
        named = [
            self.names[number - 1] for number in alone if _mirrored(self.names[number - 1]) != self.names[number - 1]
        ]
        if flips and (named or {-1, 1} <= sides):
            name = (named or [self.names[number - 1] for number in alone])[0]
            raise InputError(
                f"views.flip mirrors left and right, but class '{name}' lies on one side and has no partner; name "
                f"partners 'left …' and 'right …' in model.init_args.classes, merge them or set views.flip to 0."
            )
        return torch.tensor(swapped)


def ignored_values(
    chosen: Sequence[int] | None, class_map: Mapping[str, Sequence[int]] | None, counts: LabelCounts
) -> tuple[int, ...]:
    """Values of unannotated voxels: the chosen ones, or else 255 if it is no structure.

    255 is a structure if a class lists it, or if any of 251 to 254 also occurs (FreeSurfer's corpus callosum).
    """
    if chosen is not None:
        return tuple(dict.fromkeys(chosen))
    listed = {value for group in (class_map or {}).values() for value in group}
    seen = {*counts.left, *counts.right}
    return (255,) if 255 in seen and 255 not in listed and not seen & {251, 252, 253, 254} else ()


def refuse_unknown(classes: Classes, counts: LabelCounts, visits: Mapping[int, str]) -> None:
    """Refuses label values of held-out visits that no class has, if the classes were found in the data."""
    if classes.open:
        return
    known = {0, *classes.ignored, *(value for group in classes.values for value in group)}
    for row, values in counts.seen.items():
        if unknown := sorted(set(values) - known):
            raise InputError(
                f"The label map of {visits[row]} holds the class {unknown[0]}, never seen in the labelled training "
                f"visits; list the classes that count in model.init_args.classes, or label more visits."
            )


def refuse_empty(classes: Classes, held_out: LabelCounts) -> None:
    """Refuses validation visits without any class: no checkpoint could be selected by them."""
    if held_out.seen and not held_out.total(value for group in classes.values for value in group):
        raise InputError(
            "No labelled validation visit shows any of the classes, so that nothing could tell the best checkpoint; "
            "move a visit that shows one to the validation split, or give validation no labels."
        )


_SIDES = {"left": "right", "right": "left", "lh": "rh", "rh": "lh", "l": "r", "r": "l"}


def _mirrored(name: str) -> str:
    """``left hippocampus`` → ``right hippocampus``; capitals stay."""

    def swap(found: re.Match[str]) -> str:
        other = _SIDES[found[0].lower()]
        return other.upper() if found[0].isupper() else other.title() if found[0].istitle() else other

    return re.sub(r"(?i)(?<![a-z])(left|right|lh|rh|l|r)(?![a-z])", swap, name)
