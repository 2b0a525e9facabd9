"""The scanner for label maps: one visit's images of a subject, each with contrast, bias and noise of its own.

With ``A`` the visit's affine, ``R`` its misregistration and ``X`` as in `label_map_subject`,

    image(i) = | blur( mean(X(R A i)) ) · exp(bias(i)) + noise |        (Rician)

``mean`` is the brightness of the labels, on the voxels of the map and interpolated between them, as partial volume is;
it carries the subject's texture, which moves with the tissue. Labels are those of the nearest voxel of the map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lssl.data.batch import Visit
from lssl.synthetic.draws import uniform
from lssl.synthetic.label_map_anatomy import classes, sample_labels
from lssl.synthetic.label_map_subject import MapSubject, canonical
from lssl.synthetic.phantom_image import acquire, normalise
from lssl.synthetic.phantom_subject import generator

__all__ = ["CONTRASTS", "TISSUES", "scan"]

#: T1-weighted brightness of tissues and their FreeSurfer numbers. All other numbers are drawn, subject by subject.
TISSUES: tuple[tuple[float, tuple[int, ...]], ...] = (
    (0.02, (0,)),
    (0.17, (4, 5, 14, 15, 24, 43, 44, 72)),
    (0.50, (17, 18, 53, 54)),
    (0.52, (3, 42)),
    (0.54, (8, 47)),
    (0.56, (11, 26, 50, 58)),
    (0.60, (12, 51, 25, 57)),
    (0.65, (10, 49)),
    (0.70, (13, 52)),
    (0.74, (16, 28, 60)),
    (0.80, (2, 41, 7, 46, 85)),
)
#: Brightness of the tissues of `TISSUES`, in their order: air, fluid, hippocampus and amygdala, cortex,
#: cerebellar cortex, caudate, putamen, thalamus, pallidum, brainstem, white matter; and of lesions of white matter.
CONTRASTS: dict[str, tuple[tuple[float, ...], float]] = {
    "T1": (tuple(value for value, _ in TISSUES), 0.50),
    "T2": ((0.02, 0.95, 0.58, 0.56, 0.56, 0.50, 0.47, 0.44, 0.36, 0.42, 0.38), 0.85),
    "FLAIR": ((0.02, 0.10, 0.62, 0.60, 0.58, 0.56, 0.54, 0.52, 0.46, 0.47, 0.45), 0.90),
}
# Largest change of a tissue's brightness, as a share of it, by subject and by visit (less than keeps fluid, grey and
# white matter apart); of all other numbers, by visit; of the logarithm of gamma; and the texture's standard deviation.
_SUBJECT, _VISIT, _ELSEWHERE, _GAMMA, _TEXTURE = 0.05, 0.08, 0.2, 0.2, 0.04


def scan(
    subject: MapSubject,
    key: tuple[int, int, int],
    time: float,
    affine: Tensor,
    residual: Tensor,
    size: tuple[int, int, int],
    lateral: bool,
    contrasts: Sequence[str] = ("T1",),
) -> Visit:
    """The visit of a subject on a grid of its frame; its age is left unknown.

    Args:
        subject: whose.
        key: seed, subject and visit, which draw all that is random.
        time: years since the subject's first visit.
        affine: ``(4, 4)`` index → frame in mm.
        residual: ``(4, 4)`` recorded frame → true frame in mm, the misregistration.
        size: voxels along each axis.
        lateral: classes are told apart by side.
        contrasts: names of the images, of `CONTRASTS`; each has its own scan, texture and brightness of other tissues.
    """
    anatomy = subject.anatomy
    axes = [torch.arange(count, dtype=torch.float32) for count in size]
    index = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    matrix = (residual @ affine).float()
    points = index.flatten(1).T @ matrix[:3, :3].T + matrix[:3, 3]
    place = anatomy.index(canonical(subject, points, time))
    code = _nearest(anatomy.code, place).view(size)
    head, images = code > 0, []
    for name in contrasts:
        stream = _generator("scan", name, *key)
        mean = _brightness(anatomy.numbers, key, stream, name)[anatomy.code.long()] * _texture(anatomy.code, key, name)
        image = acquire(sample_labels(mean[None], place, "zeros").view(size), index, affine[0, 0].item(), stream)
        images.append(normalise(image * head, head))
    return Visit(torch.stack(images), affine, head, label=classes(anatomy.numbers, lateral)[code])


def _generator(what: str, contrast: str, *key: object) -> torch.Generator:
    """The stream of a contrast; that of T1 is as it was before there were others."""
    return generator(f"label map {what}" if contrast == "T1" else f"label map {what} {contrast}", *key)


def _nearest(code: Tensor, place: Tensor) -> Tensor:
    """Codes of the nearest voxels at ``place (N, 3)``; 0 beyond the map."""
    index, size = place.round().long(), torch.tensor(code.shape)
    inside = ((index >= 0) & (index < size)).all(1)
    i, j, k = index.clamp_min(0).minimum(size - 1).unbind(1)
    return torch.where(inside, code[i, j, k].long(), 0)


def _brightness(numbers: Tensor, key: tuple[int, int, int], stream: torch.Generator, contrast: str) -> Tensor:
    """``(n,)`` of each FreeSurfer number in one visit: the subject's own, changed by the visit's, then by a gamma."""
    own = _generator("tissue", contrast, *key[:2])
    drawn = 0.05 + 0.85 * torch.rand(1024, generator=own)  # by number, so that it matters not which others a map has
    drawn = drawn * (1 + _ELSEWHERE * (2 * torch.rand(1024, generator=stream) - 1))
    for value, (_, names) in zip(CONTRASTS[contrast][0], TISSUES, strict=True):
        factor = (1 + uniform(own, -_SUBJECT, _SUBJECT)) * (1 + uniform(stream, -_VISIT, _VISIT))
        drawn[list(names)] = value * factor
    return drawn[numbers] ** math.exp(uniform(stream, -_GAMMA, _GAMMA))


def _texture(code: Tensor, key: tuple[int, int, int], contrast: str) -> Tensor:
    """``(D, H, W)`` factor of the subject's tissue in each voxel of its map."""
    return 1 + _TEXTURE * torch.randn(code.shape, generator=_generator("texture", contrast, *key[:2]))
