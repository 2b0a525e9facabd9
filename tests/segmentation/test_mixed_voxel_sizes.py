"""A cohort of mixed voxel sizes: trained, validated, tested and predicted at one spacing."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import TINY_NET, fit, sentence

from lssl import Segmenter
from lssl.checkpoint import load_task
from lssl.cli.main import main
from lssl.segmentation.volumes import check_memory
from lssl.strategies.masked_autoencoder import MaskedAutoencoder
from lssl.utils import memory
from lssl.utils.errors import InputError
from lssl.views import geometry as geo

CUBIC, THICK = (4.0, 4.0, 4.0), (2.5, 2.5, 8.0)
COHORT = {  # subject → split, voxel size; the median of all headers is 2.5×2.5×8
    "sub-1": ("train", CUBIC),
    "sub-2": ("train", CUBIC),
    "sub-3": ("train", THICK),
    "sub-4": ("val", THICK),
    "sub-5": ("test", THICK),
    "sub-6": ("test", THICK),
}


def ball(spacing: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """A ball of 50 mm in 160 mm, and its affine."""
    size = [round(160 / side) for side in spacing]
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-side * (n - 1) / 2 for side, n in zip(spacing, size, strict=True)]
    place = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"), -1) * spacing + affine[:3, 3]
    return np.linalg.norm(place, axis=-1) < 50, affine


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    draw, rows = np.random.default_rng(0), []
    for subject, (split, spacing) in COHORT.items():
        inside, affine = ball(spacing)
        for session in ("ses-1", "ses-2"):
            image = np.where(inside, 100 + 10 * draw.standard_normal(inside.shape), 5 * draw.random(inside.shape))
            names = [f"{subject}_{session}_{kind}.nii.gz" for kind in ("T1w", "dseg")]
            for name, voxels in zip(names, (image.astype(np.float32), inside.astype(np.int16)), strict=True):
                nib.save(nib.Nifti1Image(voxels, affine), folder / name)
            rows.append({"subject": subject, "session": session, "image": names[0], "label": names[1], "split": split})
    pd.DataFrame(rows).to_csv(folder / "visits.csv", index=False)
    return folder / "visits.csv"


def run(tmp_path: Path, cohort: Path, *options: str, **views: object) -> Path:
    data = {
        "class_path": "NiftiDataModule",
        "init_args": {"table": str(cohort), "num_workers": 0, "batch_size": 2, "source_size": [36, 36, 36]},
    }
    data["init_args"]["few_shot"] = {"subjects": None, "visits": None, "batch_size": 3, "steps": 2}
    views = {"size": 32, "affine_probability": 0.0, **views}
    return fit(tmp_path, "finetune.yaml", options=options, data=data, views=views, backbone=TINY_NET)


@pytest.fixture(scope="module")
def trained(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list]:
    """A run, what it said, and spacing and padded share of each view of its training steps."""
    seen, said = [], []
    with pytest.MonkeyPatch.context() as patch:
        terms = Segmenter.terms

        def recorded(self, first, second, *wanted):
            seen.extend((geo.spacing(view.affine), (view.label < 0).float().mean()) for view in (first, second))
            return terms(self, first, second, *wanted)

        patch.setattr(Segmenter, "terms", recorded)
        patch.setattr("lssl.views.working_spacing.rank_zero_info", said.append)
        folder = run(tmp_path_factory.mktemp("trained"), cohort)
    return folder, "\n".join(said), seen


def test_all_views_have_the_median_of_the_training_visits(trained):
    _, said, seen = trained
    assert said == (
        "Voxel sizes of 12 visits: 8 of 2.5×2.5×8 mm, 4 of 4×4×4 mm; all views have the working spacing 4×4×4 mm "
        "(the median of the training visits; views.spacing sets another)."
    )
    assert len(seen) == 4
    for spacing, beyond in seen:
        torch.testing.assert_close(spacing, torch.full((3, 3), 4.0, dtype=torch.float64), rtol=1e-5, atol=0)
        assert beyond < 0.02  # the loaded boxes are large enough in mm


def test_the_checkpoint_keeps_it_and_predictions_lie_on_the_native_grid(trained, cohort, tmp_path, capsys):
    folder, _, _ = trained
    checkpoint = folder / "checkpoints" / "last.ckpt"
    stored = torch.load(checkpoint, weights_only=True)
    assert stored["spacing"] == [4.0, 4.0, 4.0] == stored["state_dict"]["spacing"].tolist()
    task = load_task(checkpoint)
    assert task.working_spacing.mm == [4.0, 4.0, 4.0]
    assert task.views.spacing == (4.0, 4.0, 4.0)
    thick = cohort.parent / "sub-5_ses-1_T1w.nii.gz"
    main(["predict", "--config", str(folder / "config.yaml"), "--ckpt_path", str(checkpoint), "--data", str(thick),
          "--trainer.default_root_dir", str(tmp_path)])  # fmt: skip
    (written,) = tmp_path.rglob("*dseg.nii.gz")
    predicted, native = nib.load(written), nib.load(thick)
    assert predicted.shape == native.shape == (64, 64, 20)
    np.testing.assert_allclose(predicted.affine, native.affine, atol=1e-5)


def test_another_spacing_than_the_checkpoints_is_refused(trained, cohort, capsys):
    folder, _, _ = trained
    options = ["--config", str(folder / "config.yaml"), "--ckpt_path", "last", "--views.spacing", "2"]
    words = "it was trained at 4×4×4 mm and views.spacing is 2×2×2; leave views.spacing out"
    assert words in sentence(capsys, "test", *options)


def test_the_option_sets_it(cohort, tmp_path):
    folder = run(tmp_path, cohort, "--trainer.limit_val_batches", "0", spacing=[5.0, 5.0, 4.0])
    assert load_task(folder / "checkpoints" / "last.ckpt").spacing.tolist() == [5.0, 5.0, 4.0]


def test_a_grid_beyond_the_memory_is_refused_before_it_is_made(trained, cohort, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 10**9)
    with pytest.raises(InputError, match=r"visit of 64×64×20 voxels of 2\.5×2\.5×8 mm, on the grid of the working"):
        check_memory((1, 64, 64, 20), THICK, (0.1, 0.1, 0.1), 3, torch.device("cpu"))
    check_memory((1, 64, 64, 20), THICK, CUBIC, 3, torch.device("cpu"))
    monkeypatch.setattr(memory, "available_memory", lambda: 50 * 10**6)
    large = tmp_path / "large.nii.gz"
    nib.save(
        nib.Nifti1Image(np.random.default_rng(0).random((48, 48, 48), np.float32), np.diag([16.0, 16.0, 16.0, 1.0])),
        large,
    )
    folder, _, _ = trained
    checkpoint = str(folder / "checkpoints" / "last.ckpt")
    options = ["--config", str(folder / "config.yaml"), "--ckpt_path", checkpoint, "--data", str(large)]
    assert "grid of the working spacing (192×192×192 voxels of 4×4×4 mm), needs" in sentence(
        capsys, "predict", *options
    )


def test_pretraining_draws_its_pairs_at_the_working_spacing(cohort, tmp_path, monkeypatch):
    """Three subjects of two voxel sizes in one batch."""
    seen, said, terms = [], [], MaskedAutoencoder.terms

    def recorded(self, first, second, batch):
        seen.extend((geo.spacing(view.affine), view.foreground.mean()) for view in (first, second))
        return terms(self, first, second, batch)

    monkeypatch.setattr(MaskedAutoencoder, "terms", recorded)
    monkeypatch.setattr("lssl.views.working_spacing.rank_zero_info", said.append)
    options = {"table": str(cohort), "num_workers": 0, "batch_size": 3, "source_size": [36, 36, 36]}
    data = {"class_path": "NiftiDataModule", "init_args": options}
    views = {"size": 32, "affine_probability": 0.0}
    folder = fit(tmp_path, "masked_autoencoder.yaml", data=data, views=views, backbone=TINY_NET)
    assert len(said) == 1
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["spacing"] == [4.0, 4.0, 4.0]
    assert len(seen) >= 4
    for spacing, inside in seen:
        torch.testing.assert_close(spacing, torch.full_like(spacing, 4.0), rtol=1e-5, atol=0)
        assert inside > 0.1
