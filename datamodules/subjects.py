"""SubjectsDataModule: pairs from a TorchIO ``SubjectsDataset``."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch.utilities import rank_zero_info
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from torch.utils.data import Dataset

from lssl.data.batch import Visit
from lssl.data.datamodule import PairDataModule
from lssl.data.header import valid_affine
from lssl.data.nifti import (
    Grid,
    automatic_foreground,
    checked_image,
    checked_label,
    checked_mask,
    read_grid,
    scale,
)
from lssl.data.pairs import count
from lssl.data.times import Measures, add_times, read_measures
from lssl.data.transform import is_spatial, refuse_movement
from lssl.data.usable import check_files, leave_out, without_visits
from lssl.utils.errors import InputError

from .nifti import refuse_moving_subjects

__all__ = ["SubjectsDataModule"]

THREADS = min(8, os.cpu_count() or 1)
MANY = 20  # visits whose reading is announced
SCALARS = (str, int, float, np.number, datetime.date)


class SubjectsDataModule(PairDataModule):
    """Pairs of visits from a TorchIO ``SubjectsDataset``: each ``torchio.Subject`` of it is one visit.

    A Subject holds the images of a visit, and what is known of it as attributes: whose visit it is, its session, and
    optionally ``age`` (years), ``days`` or ``date``, ``site`` and ``split``, which mean what they mean in a table.
    All visits of a person must lie on one grid in one space.

    The dataset's own transform is applied to every visit, in validation and prediction, too. It may change the grid,
    as ``torchio.Resample`` does. One that moves the head without its affine (``RandomAffine``) is refused: turning,
    scaling and flipping is the work of the views. Its random draws follow from the pair, not from the worker. After
    it, voxels are reoriented to the closest canonical axes and scaled per visit, as those of NIfTI files are.

    Args:
        dataset: a ``torchio.SubjectsDataset``. In a config, the class path of a function that makes one and says so
            (``def cohort() -> torchio.SubjectsDataset``), or of a subclass.
        image: name of the ``ScalarImage`` that is read; of several (``[t1, flair]``), each gives its channels.
        label: name of the ``LabelMap`` with the structures; visits without it have no label.
        mask: name of the ``LabelMap`` with the head or brain; visits without it get an automatic foreground.
        subject: attribute that names the person.
        session: attribute that names the visit.
        age: attribute with the age in years.
        common_frame: whether all persons are aligned to one template.
        exclude: persons (``sub-01``) and visits (``sub-01 ses-02``) that are left out.
        **options: those of :class:`PairDataModule`.
    """

    def __init__(
        self,
        dataset: Dataset,
        image: str | list[str] = "t1",
        label: str | None = None,
        mask: str | None = None,
        subject: str = "subject_id",
        session: str = "session",
        age: str = "age",
        common_frame: bool = False,
        exclude: Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not _is(dataset, "SubjectsDataset"):
            raise InputError(f"dataset is {type(dataset).__qualname__}; give a torchio.SubjectsDataset.")
        self.dataset: Any = dataset
        self.images = [image] if isinstance(image, str) else list(image)
        if not self.images or len(set(self.images)) < len(self.images):
            raise InputError(f"image is {image}; name at least one, and every one once.")
        self.label, self.mask = label, mask
        self.attributes = {"subject": subject, "session": session, "age": age}
        self.common_frame, self.exclude = common_frame, tuple(exclude)
        maps = dict.fromkeys((name for name in (label, mask) if name), True)
        self._transform = getattr(dataset, "_transform", None)
        if self._transform is not None:
            refuse_movement(self._transform, {**dict.fromkeys(self.images, False), **maps})

    def visit_table(self) -> pd.DataFrame:
        """One row per Subject that has the images, with its place in the dataset as ``index``."""
        subjects = list(self.dataset.dry_iter())
        found = [{str(key) for key in one} for one in subjects]
        lacking = [[name for name in self.images if name not in keys] for keys in found]
        if missing := next((names for names in lacking if names), None):
            if all(lacking):
                self._refuse_unknown("image", missing[0], subjects)
            self.excluded.append(f"{count(sum(map(bool, lacking)), 'visit')} without {missing[0]}")
        for option, name in (("label", self.label), ("mask", self.mask)):
            needed = name and not (self.predicting and option == "label")
            if needed and not any(name in keys for keys in found):
                self._refuse_unknown(option, str(name), subjects)
        kept = [place for place, names in enumerate(lacking) if not names]
        cells = pd.DataFrame([self._cells(subjects[place], place) for place in kept], dtype=object)
        if (age := self.attributes["age"]) != "age" and not any(age in keys for keys in found):
            raise InputError(f"No subject of the dataset has the attribute {age!r}, as age asks.")
        wanted = dict.fromkeys(("subject", "session", "site", "split", *self.target_sources))
        table = cells[[name for name in wanted if name in cells]].assign(index=kept)
        if "split" in table:
            table["split"] = table["split"].str.lower()
        measures = Measures.empty(len(table))
        read_measures(measures, cells.drop(columns=table.columns, errors="ignore"), "the dataset")
        table, notes = add_times(table, measures)
        self.notes += notes
        table, phrases = without_visits(table, self.exclude)
        self.excluded += phrases
        return self._without_damaged(table)

    def _without_damaged(self, table: pd.DataFrame) -> pd.DataFrame:
        """Reads every NIfTI file once, as NiftiDataModule does: SimpleITK reads a file that was cut off as zeros."""
        subjects = self.dataset.dry_iter()
        label = None if self.predicting else self.label
        for kind, name in [*(("image", name) for name in self.images), ("mask", self.mask), ("label", label)]:
            if name is None:
                continue
            table["image"] = [_file(subjects[place].get(name)) for place in table["index"]]
            problems = check_files({path for path in table["image"] if path}, kind, rank_zero_info)
            if problems and kind != "image":
                raise InputError(problems[min(problems)])
            table, phrases = leave_out(table, problems)
            self.excluded += phrases
        return table.drop(columns="image")

    def _refuse_unknown(self, option: str, name: str, subjects: list[Any]) -> None:
        kinds = {key: type(one[key]).__name__ for one in subjects for key in one if _is(one[key], "Image")}
        there = ", ".join(f"{key} ({kind})" for key, kind in sorted(kinds.items())) or "none"
        raise InputError(
            f"No subject of the dataset has the image {name!r}, as {option} asks; its images are: {there}."
        )

    def _cells(self, subject: Any, place: int) -> dict[str, str]:
        """Its attributes as the cells of a table."""
        plain = {str(key): _number(value) for key, value in subject.items()}
        values = {key: value for key, value in plain.items() if isinstance(value, SCALARS)}
        for column in ("subject", "session"):
            name = self.attributes[column]
            if not str(values.get(name, "")).strip():
                there = ", ".join(sorted(values)) or "none"
                raise InputError(
                    f"Item {place} of the dataset has no attribute {name!r}, which {column} names; its attributes are: "
                    f"{there}."
                )
        named = {column: values.pop(name) for column, name in self.attributes.items() if name in values}
        return {name: str(value).strip() for name, value in (values | named).items()}

    def inspect(self, table: pd.DataFrame) -> None:
        """Learns the grid of every visit: from headers, or by reading it where the transform may change it."""
        self._index = table["index"].to_numpy(np.int64)
        subjects = [self.dataset.dry_iter()[place] for place in self._index]
        changed = self._transform is not None and is_spatial(self._transform)
        if changed:
            if len(subjects) >= MANY:
                rank_zero_info(f"{len(subjects)} visits are read once: the dataset's transform may change their grids.")
            with _draws_from(self.seed):
                grids = [self._grid(self._item(place), place) for place in self._index.tolist()]
        else:
            with ThreadPoolExecutor(THREADS) as pool:
                grids = list(pool.map(self._grid, subjects, self._index.tolist()))
        self._shapes = np.stack([grid.shape for grid in grids])
        self._voxel_sizes = np.stack([np.linalg.norm(grid.affine[:3, :3], axis=0) for grid in grids])
        if not self.predicting:  # prediction takes each visit alone
            refuse_moving_subjects(table, grids)
        for option, name in (("label", self.label), ("mask", self.mask)):
            if missing := sum(name not in subject for subject in subjects) if name else 0:
                instead = "; their foreground is found automatically" if option == "mask" else ""
                self.notes.append(f"{count(missing, 'visit')} without a {option}{instead}")
        self._labelled = np.array([bool(self.label) and self.label in subject for subject in subjects])
        if not changed:
            first = self.images[0]
            files = [_file(subject[first]) for subject in subjects]
            table["image"] = [
                path if path and read_grid(path).same(grid) else "" for path, grid in zip(files, grids, strict=True)
            ]

    def _item(self, place: int) -> Any:
        """The dataset's item, transformed."""
        try:
            return self.dataset[place]
        except Exception as error:  # TorchIO's readers raise anything, and so may a transform
            reason = " ".join(str(error).split())
            raise InputError(
                f"Item {place} of the dataset cannot be read ({type(error).__name__}: {reason}); dataset[{place}] in "
                f"Python shows where."
            ) from error

    def _grid(self, subject: Any, place: int) -> Grid:
        """The grid of a visit's images, which must be one, in closest canonical axes."""
        first: Grid | None = None
        for name in self._names(subject):
            kind = "ScalarImage" if name in self.images else "LabelMap"
            if not _is(subject[name], kind):
                raise InputError(
                    f"{name} of item {place} is a {type(subject[name]).__name__}; it must be a torchio.{kind}."
                )
            try:
                (channels, *shape), affine = subject[name].shape, np.asarray(subject[name].affine, np.float64)
            except Exception as error:  # TorchIO's readers raise anything
                reason = " ".join(str(error).split()) or type(error).__name__
                raise InputError(f"{name} of item {place} cannot be read ({reason}); leave it out.") from error
            if kind == "LabelMap" and channels != 1:
                raise InputError(f"{name} of item {place} has {channels} channels; a map has one, of whole numbers.")
            if not valid_affine(affine):
                raise InputError(f"{name} of item {place} has no valid affine, so its voxels have no place in space.")
            turn = io_orientation(affine)
            canonical = np.empty(3, dtype=np.int64)
            canonical[turn[:, 0].astype(int)] = shape
            grid = Grid(canonical, affine @ inv_ornt_aff(turn, shape))
            first = first or grid
            if not grid.same(first):
                raise InputError(
                    f"{name} of item {place} does not lie on the grid of {self.images[0]} ({_text(grid.shape)} and "
                    f"{_text(first.shape)} voxels); resample it, as torchio.Resample({self.images[0]!r}) does."
                )
        assert first is not None
        return first

    def _names(self, subject: Any) -> list[str]:
        """The images and maps that are read of a Subject."""
        label = None if self.predicting else self.label
        return [*self.images, *(name for name in (label, self.mask) if name and name in subject)]

    def channels(self) -> list[str]:
        """The names of the images; numbered if one has several channels."""
        self.setup()
        subject = self._item(int(self._index[0]))
        numbers = {name: len(subject[name].data) for name in self.images}
        return [
            name if number == 1 else f"{name} {place}" for name, number in numbers.items() for place in range(number)
        ]

    def shapes(self) -> np.ndarray:
        """``(visits, 3)`` voxels per axis."""
        return self._shapes

    def voxel_sizes(self) -> np.ndarray:
        """``(visits, 3)`` mm."""
        return self._voxel_sizes

    def has_label(self) -> np.ndarray:
        """``(visits,)`` bool, whether the Subject has the label map."""
        return self._labelled & (not self.predicting)

    def read_label(self, row: int) -> np.ndarray | None:
        """The label map after the dataset's transform."""
        label = self.read_visits((row,), None, None)[0].label
        return None if label is None else label.numpy()

    def read_visits(
        self, rows: Sequence[int], size: tuple[int, int, int] | None, seed: int | None
    ) -> tuple[Visit, ...]:
        """The draws of the dataset's transform follow from the pair's seed, or else from the visit."""
        with _draws_from(rows[0] if seed is None else seed):
            return super().read_visits(rows, size, seed)

    def read(self, row: int) -> Visit:
        """Reads, transforms, turns and scales the whole visit in a row of the table."""
        place = int(self._index[row])
        subject = self._item(place)
        grid = self._grid(subject, place)
        if not np.array_equal(grid.shape, self._shapes[row]):
            raise InputError(
                f"Item {place} of the dataset has {_text(grid.shape)} voxels now and had {_text(self._shapes[row])}; "
                f"its transform must not draw the grid."
            )
        read = {name: _voxels(subject[name]) for name in self._names(subject)}
        channels = [
            checked_image(np.asarray(channel, np.float32), f"{name} of item {place}")
            for name in self.images
            for channel in read[name]
        ]
        if self.mask in read:
            foreground = checked_mask(read[self.mask][0], f"{self.mask} of item {place}")
        else:
            foreground = automatic_foreground(channels[0])
        label = None
        if self.label in read:
            voxels = np.asarray(read[self.label][0], np.float32)
            label = torch.from_numpy(checked_label(voxels, f"{self.label} of item {place}"))
        return Visit(
            image=torch.from_numpy(np.stack([scale(channel, foreground) for channel in channels])),
            affine=torch.from_numpy(grid.affine),
            foreground=torch.from_numpy(foreground),
            label=label,
        )


def _voxels(image: Any) -> np.ndarray:
    """``(C, D, H, W)`` in closest canonical axes."""
    turn = io_orientation(image.affine)
    return np.stack([apply_orientation(channel, turn) for channel in image.data.numpy()])


def _is(image: Any, kind: str) -> bool:
    """Whether an object is of a class of TorchIO, which need not be installed to ask."""
    return any(base.__name__ == kind for base in type(image).__mro__)


def _number(value: Any) -> Any:
    """A tensor or array of one number as that number."""
    return value.item() if isinstance(value, torch.Tensor | np.ndarray) and math.prod(value.shape) == 1 else value


def _file(image: Any) -> str:
    """The NIfTI file of an image; empty if there is none."""
    path = getattr(image, "path", None)
    return str(path) if str(path).endswith((".nii", ".nii.gz")) else ""


def _text(shape: Sequence[int] | np.ndarray) -> str:
    return "×".join(map(str, shape))


@contextmanager
def _draws_from(seed: int) -> Iterator[None]:
    """Seeds torch's global generator, from which TorchIO draws, and puts it back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
