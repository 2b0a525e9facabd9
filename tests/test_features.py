"""Features of whole scans: where they lie, how windows meet, and what is read as in training."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import TINY_NET, fit
from torch import nn

import lssl
from lssl.export import command
from lssl.features import FeatureMap, TrainedBackbone
from lssl.networks.backbone import Backbone
from lssl.utils.errors import InputError

TURNED = np.array([[0.0, -2.0, 0.0, 40.0], [1.5, 0.0, 0.0, -20.0], [0.0, 0.3, 1.0, 7.0], [0.0, 0.0, 0.0, 1.0]])


class Pools(nn.Module):
    """Means of 2×2×2 and 4×4×4 voxels: no feature depends on what a window leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv3d(1, 1, side, stride=side) for side in (2, 2))
        self.up = nn.Upsample(scale_factor=4)
        for layer in (self.one, self.two):
            nn.init.constant_(layer.weight, 1 / 8)
            nn.init.zeros_(layer.bias)

    def forward(self, image):
        return self.up(self.two(self.one(image)))


@pytest.fixture
def net():
    return TrainedBackbone(Backbone(Pools(), {"fine": "one", "coarse": "two"}), (1.0, 1.0, 1.0), (16, 8, 16))


@pytest.fixture
def ramp(tmp_path):
    """A scan whose intensity is a linear function of the place in mm, in turned and oblique axes of other sizes."""
    shape = (30, 21, 33)
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1).reshape(-1, 3)
    place = index @ TURNED[:3, :3].T + TURNED[:3, 3]
    values = (500 + place @ [1.0, 2.0, 4.0]).reshape(shape).astype(np.float32)
    assert values.min() > 0
    nib.save(nib.Nifti1Image(values, TURNED), tmp_path / "scan.nii.gz")
    nib.save(nib.Nifti1Image(np.ones(shape, np.uint8), TURNED), tmp_path / "mask.nii.gz")
    inner = np.linspace(0.3, 0.7, 5)[:, None] * (np.array(shape) - 1)
    points = inner @ TURNED[:3, :3].T + TURNED[:3, 3]
    return tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz", points, 500 + points @ [1.0, 2.0, 4.0]


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
def test_features_lie_where_their_affine_says(net, ramp, overlap):
    scan, mask, points, values = ramp
    features = net.features(scan, mask=mask, overlap=overlap)
    for name, stride in (("fine", 2), ("coarse", 4)):
        ratio = features[name].at(points)[:, 0].numpy() / values
        np.testing.assert_allclose(ratio, ratio.mean(), rtol=2e-5)
        side = torch.linalg.norm(features[name].affine[:3, :3], dim=0)
        torch.testing.assert_close(side, torch.full((3,), float(stride), dtype=torch.float64))


def test_windows_cover_the_scan_and_no_more(net, ramp):
    scan, mask, _, _ = ramp
    volume, _ = net.read(scan, mask)
    features = net.features(scan, ["coarse"], mask)
    assert list(features) == ["coarse"]
    assert features["coarse"].values.shape[1:] == tuple(-(-side // 4) for side in volume.shape[1:])
    whole = TrainedBackbone(net.backbone, net.spacing.tolist(), [4 * -(-side // 4) for side in volume.shape[1:]])
    torch.testing.assert_close(features["coarse"].values, whole.features(scan, ["coarse"], mask)["coarse"].values)


def test_intensities_and_axes_are_those_of_training(net, ramp):
    """The foreground's 99.9th percentile is 1; the first axis runs to the right."""
    scan, mask, _, _ = ramp
    net.spacing = torch.tensor([2.0, 1.5, (1 + 0.0) ** 0.5])
    volume, affine = net.read(scan, mask)
    assert abs(float(torch.quantile(volume, 0.999)) - 1) < 0.01
    assert (affine[:3, :3].diagonal() > 0).all()


def test_what_does_not_fit_is_said(net, ramp, tmp_path):
    scan, mask, _, _ = ramp
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "other.nii.gz")
    with pytest.raises(InputError, match="does not lie on the grid"):
        net.features(scan, mask=tmp_path / "other.nii.gz")
    with pytest.raises(InputError, match=r"takes 1 channel\(s\), not 2"):
        net.features([scan, scan], mask=mask)
    with pytest.raises(InputError, match="There is no tap 'fin'"):
        net.features(scan, ["fin"])
    with pytest.raises(InputError, match="an overlap from 0"):
        net.features(scan, overlap=1.0)


def test_channels_lie_on_the_first_ones_grid(ramp, tmp_path):
    scan, mask, _, _ = ramp
    other = nib.load(scan)
    nib.save(
        nib.Nifti1Image(other.get_fdata()[::-1].astype(np.float32), TURNED @ np.diag([-1, 1, 1, 1]) + _shift(29)),
        tmp_path / "b.nii",
    )
    net = TrainedBackbone(Backbone(nn.Conv3d(2, 2, 1), {"a": ""}, in_channels=2), (1.0, 1.0, 1.0), (16, 16, 16))
    volume, _ = net.read([scan, tmp_path / "b.nii"], mask)
    torch.testing.assert_close(volume[0], volume[1], rtol=1e-4, atol=1e-4)


def _shift(steps):
    moved = np.zeros((4, 4))
    moved[:3, 3] = TURNED[:3, 0] * steps
    return moved


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model = {"class_path": "PriorGuidedLocal", "init_args": {"taps": ["bottleneck"], "min_points": 1}}
    taps = {"bottleneck": "down_4.convs.conv_1", "decoder.0": "upcat_1.convs.conv_1"}
    return fit(
        tmp_path_factory.mktemp("features"), model=model, backbone={**TINY_NET, "taps": taps, "padding": "reflect"}
    )


def test_three_lines_from_a_run_or_from_what_it_exported(run, ramp, tmp_path, monkeypatch):
    scan, mask, _, _ = ramp
    net = lssl.load_backbone(run)
    features = net.features(scan, mask=mask)
    assert net.spacing.tolist() == [5.0, 5.0, 5.0]
    assert (net.window, net.backbone.padding, net.backbone.training) == ((32, 32, 32), "reflect", False)
    assert list(features) == ["bottleneck", "decoder.0"]
    monkeypatch.setattr(command, "_verified", lambda folder, python: 0.0)
    for to in ("monai", "safetensors"):
        command.export_network(run / "checkpoints/best.ckpt", tmp_path / to, to)
        again = lssl.load_backbone(tmp_path / to).features(scan, mask=mask)
        for name, value in features.items():
            assert torch.equal(value.values, again[name].values)
    monkeypatch.chdir(run.parent)
    run.parent.joinpath("runs").mkdir()
    run.parent.joinpath("runs/mine").symlink_to(run)
    assert lssl.load_backbone("mine").window == net.window


def test_a_checkpoint_without_voxel_size_needs_one(run, tmp_path):
    stored = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    del stored["lssl"]["data"]
    stored.pop("spacing", None)
    torch.save(stored, tmp_path / "old.ckpt")
    with pytest.raises(InputError, match="does not say the voxel size"):
        lssl.load_backbone(tmp_path / "old.ckpt")
    with pytest.raises(InputError, match="three sides in mm above 0"):
        lssl.load_backbone(tmp_path / "old.ckpt", spacing=(1, 0, 1))
    assert lssl.load_backbone(tmp_path / "old.ckpt", spacing=(1, 2, 3)).spacing.tolist() == [1, 2, 3]
    with pytest.raises(InputError, match="neither a checkpoint nor a run folder"):
        lssl.load_backbone("nowhere")


def test_points_between_features_are_interpolated():
    values = torch.arange(8.0).reshape(1, 2, 2, 2)
    found = FeatureMap(values, torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64)))
    assert found.at([[0, 0, 0], [1, 1, 1], [2, 2, 2]])[:, 0].tolist() == [0.0, 3.5, 7.0]
