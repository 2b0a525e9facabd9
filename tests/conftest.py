"""Small shared fixtures: batches whose images may be their own coordinates, so that geometry can be read off them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from lssl.data.batch import PairBatch
from lssl.datamodules import phantom
from lssl.networks import backbone
from lssl.networks.feature_geometry import Measured
from lssl.synthetic.phantom_image import Scan
from lssl.views import geometry as geo


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


#: Networks whose measured places depend on nothing but the structure, which `repr` shows: no interpolation, one centre.
#: By name, as monai takes seconds to import, which not every test needs.
PLAIN = (
    "monai.networks.nets.basic_unet.BasicUNet",
    "test_all_ranks.Network",
    "test_sharding.Network",
    "test_exact_resume.Noisy",
)


@pytest.fixture(autouse=True, scope="session")
def _measured_once() -> Iterator[None]:
    """Networks of one structure are measured once a process: it takes up to a second, in hundreds of tests."""
    measure, known = backbone.measure, {}

    def once(network: torch.nn.Module, paths: dict[str, str], in_channels: int) -> Measured:
        kind = f"{type(network).__module__}.{type(network).__name__}"
        key = (kind, repr(network), repr(paths), in_channels)
        if key not in known:
            found = measure(network, paths, in_channels)
            mixed = any(any(tap.uncertainty) for tap in found.taps.values())
            if mixed or kind not in PLAIN or any(isinstance(part, torch.nn.Upsample) for part in network.modules()):
                return found
            known[key] = found
        return Measured(dict(known[key].taps), known[key].out_channels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "measure", once)
        yield


@pytest.fixture(autouse=True, scope="session")
def _drawn_once() -> Iterator[None]:
    """Small phantoms are drawn once a process: it takes a third of a second, and hundreds of runs show the same ones.

    Whoever tests how they are drawn calls `lssl.synthetic.phantom_image.scan`, or draws each in a process of its own.
    """
    draw = phantom.scan
    known = functools.lru_cache(maxsize=150)(draw)  # of 48 voxels a side at most, 100 MB

    def once(*which, **options) -> Scan:
        _, _, _, _, size, _, _, _, lesions = which
        if math.prod(size) > 48**3 or lesions:
            return draw(*which, **options)
        kept = known(*which, **options)
        parts = {part.name: getattr(kept, part.name) for part in dataclasses.fields(kept)}
        return Scan(**{name: value if value is None else value.clone() for name, value in parts.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom, "scan", once)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def oblique(pairs: int, seed: int = 0, visits: int = 2) -> torch.Tensor:
    """Affines ``(pairs, visits, 4, 4)``: anisotropic voxels, rotated axes, and later visits displaced by some mm."""
    draw = torch.Generator().manual_seed(seed)
    angles = 0.15 * torch.randn(pairs, visits, 3, generator=draw, dtype=torch.float64)
    shift = torch.tensor([-40.0, 12.0, 7.0]) + 1.5 * torch.randn(pairs, visits, 3, generator=draw, dtype=torch.float64)
    size = torch.tensor([1.1, 0.9, 1.3], dtype=torch.float64).expand(pairs, visits, 3)
    return geo.translation(shift) @ geo.rotation(angles) @ geo.scaling(size)


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., PairBatch]:
    """Builds a `PairBatch`.

    ``image``: ``"noise"`` (one channel, another for each visit) or ``"frame"`` (three channels: the place of each voxel
    in mm). ``affine``: ``"oblique"``, ``"same"`` (oblique, one for both visits) or ``"unit"``.
    """

    def make(
        pairs: int = 2,
        size: tuple[int, int, int] = (28, 24, 20),
        image: str = "noise",
        affine: str = "oblique",
        identical: bool = False,
        labels: bool = False,
        seed: int = 0,
        visits: int = 2,
    ) -> PairBatch:
        draw = torch.Generator().manual_seed(seed)
        affines = oblique(pairs, seed, visits)
        if affine != "oblique":
            affines = affines[:, :1].repeat(1, visits, 1, 1)
        if affine == "unit":
            affines = torch.eye(4, dtype=torch.float64).repeat(pairs, visits, 1, 1)
        if image == "frame":
            places = geo.transform(affines, geo.lattice(size).expand(pairs, visits, -1, -1))
            images = places.transpose(-1, -2).unflatten(-1, size).float()
        else:
            images = torch.rand(pairs, visits, 1, *size, generator=draw)
        if identical:
            images = images[:, :1].repeat(1, visits, 1, 1, 1, 1)
        return PairBatch(
            images=images,
            affines=affines,
            extent=torch.tensor(size).repeat(pairs, visits, 1),
            foreground=torch.ones(pairs, visits, *size, dtype=torch.bool),
            ages=40.0 + 2 * torch.arange(visits).repeat(pairs, 1),
            times=2.0 * torch.arange(visits).repeat(pairs, 1),
            labels=torch.randint(0, 9, (pairs, visits, *size), generator=draw).short() if labels else None,
            subject=torch.arange(pairs),
            session=torch.arange(visits * pairs).view(pairs, visits),
        )

    return make


@pytest.fixture
def bids(tmp_path: Path) -> Path:
    """Five subjects of two visits each as a BIDS folder: noisy balls in a field of air, one grid."""
    draw = np.random.default_rng(0)
    place = np.stack(np.meshgrid(*[np.arange(40) - 19.5] * 3, indexing="ij"))
    ball = np.linalg.norm(place, axis=0) < 15
    for subject in range(1, 6):
        for session in ("M000", "M012"):
            name = f"sub-{subject:02}_ses-{session}_T1w.nii.gz"
            folder = tmp_path / "bids" / f"sub-{subject:02}" / f"ses-{session}" / "anat"
            folder.mkdir(parents=True)
            image = ball * (100 + 10 * draw.standard_normal(ball.shape))
            nib.save(nib.Nifti1Image(image.astype(np.int16), np.diag([4.0, 4.0, 4.0, 1.0])), folder / name)
    return tmp_path / "bids"
