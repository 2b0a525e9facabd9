"""What may stand as the ``transform`` of a datamodule: a function of a visit, or any TorchIO transform."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_type_hints

import numpy as np
import torch

from lssl.data.batch import Visit
from lssl.utils.errors import InputError

__all__ = ["TorchIOTransform", "is_spatial", "refuse_movement", "visit_transform"]

#: TorchIO transforms that move the head within its world space.
MOVE = {"Affine", "AffineElasticDeformation", "ElasticDeformation", "Flip"}
SIDE, DRAWS = 24, 8  # of the probe
APART = 0.75  # voxels; nearest neighbours are up to 0.5 off


def visit_transform(transform: Any) -> Callable[[Visit], Visit] | None:
    """Checks a transform; one of TorchIO's becomes a function of a visit.

    Args:
        transform: ``None``, a TorchIO transform, or a callable that takes a visit and returns one.

    Raises:
        InputError: if it can be no function of a visit (a class, a function of the standard library, one whose
            annotation returns something else), or if a TorchIO transform moves the head.
    """
    if transform is None:
        return None
    kind = transform if isinstance(transform, type) else type(transform)
    if any(base.__module__.partition(".")[0] == "torchio" for base in kind.__mro__):
        return TorchIOTransform(transform)
    name = getattr(transform, "__qualname__", kind.__qualname__)
    if isinstance(transform, type) or not callable(transform) or not _takes_a_visit(transform):
        raise InputError(
            f"transform is {name}, which is no function of a visit; give a function Visit → Visit, "
            f"an object with such a __call__, or a TorchIO transform."
        )
    return transform


def _takes_a_visit(function: Any) -> bool:
    """By its module, its arguments and its annotation, where there is one."""
    call = function if inspect.isroutine(function) else type(function).__call__
    if inspect.isbuiltin(call) or (call.__module__ or "").partition(".")[0] in sys.stdlib_module_names - {"__main__"}:
        return False
    try:
        inspect.signature(function).bind(None)
        returned = get_type_hints(call).get("return", Visit)
    except (TypeError, ValueError, NameError):
        return False
    return returned is Any or (isinstance(returned, type) and issubclass(returned, Visit))


class TorchIOTransform:
    """Applies a TorchIO transform to a visit: to its image, and in the same way to its foreground and labels.

    A transform that changes the grid (``Resample``, ``CropOrPad``, ``ToCanonical``) changes the affine with it, so that
    every voxel keeps its place in the world. One that moves the head in the world is refused: the corresponding points
    of two visits would no longer correspond. ``ViewSampler`` turns, scales, shifts and flips, and knows by how much.

    Args:
        transform: also compositions, such as ``torchio.Compose`` and ``torchio.OneOf``.
    """

    def __init__(self, transform: Any) -> None:
        if isinstance(transform, type):
            raise InputError(f"transform is the class {transform.__name__}; give an object of it.")
        self.transform = transform
        refuse_movement(transform, {"image": False, "foreground": True, "label": True})

    def __call__(self, visit: Visit) -> Visit:
        """The transformed visit; its image is float32."""
        import torchio

        affine = visit.affine.double().numpy()
        images: dict[str, Any] = {"image": torchio.ScalarImage(tensor=visit.image.float(), affine=affine)}
        maps = {"foreground": visit.foreground, "label": visit.label}
        for name, voxels in maps.items():
            if voxels is not None:
                images[name] = torchio.LabelMap(tensor=voxels[None].short(), affine=affine)
        done = self.transform(torchio.Subject(images))
        label = None if visit.label is None else done["label"].data[0].round().to(visit.label.dtype)
        return dataclasses.replace(
            visit,
            image=done["image"].data.float(),
            affine=torch.from_numpy(done["image"].affine.copy()).to(visit.affine.dtype),
            foreground=done["foreground"].data[0] > 0.5,
            label=label,
        )


def refuse_movement(transform: Any, images: Mapping[str, bool]) -> None:
    """Refuses a transform of TorchIO's subjects that moves the head in the world without moving its affine.

    Args:
        transform: a TorchIO transform, or a function of a subject.
        images: names of a subject's images → whether it is a label map. Transforms may look for them.
    """
    parts = list(_parts(transform))
    named = [type(part).__name__ for part in parts if type(part).__name__.removeprefix("Random") in MOVE]
    tried = [part for part in parts if _may_move(part)]
    name = next(iter(named), None) or next((_name(part) for part in tried if _moves(part, images)), None)
    if name is not None:
        raise InputError(
            f"The transform {name} moves the head without moving its affine, so that two visits would no longer "
            f"correspond; leave it to views (rotation, zoom, flip)."
        )


def is_spatial(transform: Any) -> bool:
    """Whether a transform, or one that it is composed of, may change the grid; a user's function may."""
    return any(_may_move(part) for part in _parts(transform))


def _may_move(part: Any) -> bool:
    return _is(part, "SpatialTransform") or not (
        _torchios_own(part) or _is(part, "IntensityTransform") or _is(part, "LabelTransform")
    )


def _moves(part: Any, images: Mapping[str, bool]) -> bool:
    """Whether a map of voxel numbers, at known places, comes back at other places."""
    import torchio

    turn = np.array([[0.8, -0.6, 0, 3], [0.6, 0.8, 0, -7], [0, 0, 1, 11], [0, 0, 0, 1]]) @ np.diag([1.5, 1, 2, 1])
    numbers = torch.arange(1, SIDE**3 + 1, dtype=torch.int32).reshape(1, SIDE, SIDE, SIDE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(DRAWS):
            probe: dict[str, Any] = {"lssl_numbers": torchio.LabelMap(tensor=numbers, affine=turn)}
            for name, is_label in images.items():
                voxels = numbers > SIDE**3 // 2 if is_label else torch.rand(1, SIDE, SIDE, SIDE)
                kind = torchio.LabelMap if is_label else torchio.ScalarImage
                probe[name] = kind(tensor=voxels.float(), affine=turn)
            try:
                done = _always(part)(torchio.Subject(probe))["lssl_numbers"]
            except Exception as error:
                if _torchios_own(part):
                    return False  # as a Crop that is larger than the probe; those that move are known by name
                reason = " ".join(str(error).split()) or type(error).__name__
                raise InputError(
                    f"The transform {_name(part)} cannot be tried on a head of {SIDE}×{SIDE}×{SIDE} voxels ({reason}), "
                    f"so whether it moves the head is unknown; make it work there, or leave it out."
                ) from error
            here = np.argwhere(done.data[0].numpy() > 0)
            number = done.data[0].numpy()[tuple(here.T)].round().astype(int) - 1
            there = np.stack(np.unravel_index(number, (SIDE,) * 3), 1)
            back = np.linalg.inv(turn) @ done.affine
            apart = np.abs(here @ back[:3, :3].T + back[:3, 3] - there)
            if len(here) and apart.max() > APART:
                return True
    return False


def _torchios_own(part: Any) -> bool:
    return type(part).__module__.partition(".")[0] == "torchio"


def _always(part: Any) -> Any:
    """The same transform, applied with certainty."""
    if not hasattr(part, "probability"):
        return part
    certain = copy.copy(part)
    certain.probability = 1.0
    return certain


def _name(transform: Any) -> str:
    return str(getattr(transform, "__qualname__", type(transform).__name__))


def _parts(transform: Any) -> Iterator[Any]:
    """A transform and those that it is composed of."""
    yield transform
    for part in (*getattr(transform, "transforms", ()), *getattr(transform, "transforms_dict", ())):
        yield from _parts(part)


def _is(transform: Any, name: str) -> bool:
    return any(base.__name__ == name for base in type(transform).__mro__)
