"""Affine algebra, resampling and alignment, against closed forms, loops and float64."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.views import geometry as geo

D64 = torch.float64
VIEW = (64, 56, 48)


def matrices(n: int = 5, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    linear = torch.eye(3, dtype=D64) + 0.3 * torch.randn(n, 3, 3, generator=draw, dtype=D64)
    return geo.homogeneous(linear, 20 * torch.randn(n, 3, generator=draw, dtype=D64))


def view_affine(zoom: float, degrees: float, flips: tuple[int, int, int], shift: float, size=VIEW) -> Tensor:
    """Index of a view → frame, built from scratch: mirrored, rotated and anisotropic."""
    turn = math.radians(degrees) * torch.tensor([1.0, -0.7, 0.4], dtype=D64)
    skew = torch.tensor([[0, -turn[2], turn[1]], [turn[2], 0, -turn[0]], [-turn[1], turn[0], 0]], dtype=D64)
    affine = torch.eye(4, dtype=D64)
    step = zoom * torch.tensor([1.1, 0.9, 1.3], dtype=D64)
    signs = torch.tensor([-1.0 if flipped else 1.0 for flipped in flips], dtype=D64)
    affine[:3, :3] = torch.matrix_exp(skew) @ torch.diag(step * signs)
    middle = (torch.tensor(size, dtype=D64) - 1) / 2
    affine[:3, 3] = torch.tensor([-40.0 + shift, 12.0 - shift, 7.0], dtype=D64) - affine[:3, :3] @ middle
    return affine


def coordinates(affine: Tensor, size: tuple[int, int, int], dtype: torch.dtype = D64) -> Tensor:
    """``(1, 3, *size)``: every voxel holds its own place in mm."""
    axes = torch.meshgrid(*[torch.arange(n, dtype=D64) for n in size], indexing="ij")
    index = torch.stack([*axes, torch.ones_like(axes[0])])
    return torch.einsum("ab,bdhw->adhw", affine[:3], index)[None].to(dtype)


def trilinear(volume: Tensor, point: Tensor, padding: str) -> Tensor:
    """One value per channel of ``(C, D, H, W)`` at one index, by hand."""
    value = torch.zeros(volume.shape[0], dtype=D64)
    if padding == "border":
        point = torch.stack([p.clamp(0, n - 1) for p, n in zip(point, volume.shape[1:], strict=True)])
    low = point.floor().long()
    for corner in itertools.product((0, 1), repeat=3):
        index = [int(a) + c for a, c in zip(low, corner, strict=True)]
        if all(0 <= i < n for i, n in zip(index, volume.shape[1:], strict=True)):
            weight = math.prod(1 - abs(float(p) - i) for p, i in zip(point, index, strict=True))
            value += weight * volume[(slice(None), *index)].double()
    return value


# --- algebra ----------------------------------------------------------------------------------------------------------


def test_inverse_and_volume_are_those_of_linalg():
    a = matrices()
    torch.testing.assert_close(geo.inverse(a), torch.linalg.inv(a), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(geo.volume(a), torch.linalg.det(a[:, :3, :3]).abs())


@pytest.mark.parametrize("axis", range(3))
def test_rotation_turns_right_handed_about_its_own_axis(axis: int):
    angles = torch.zeros(3, dtype=D64)
    angles[axis] = 0.3
    unit = torch.eye(3, dtype=D64)
    turned = geo.rotation(angles)[:3, :3] @ unit[(axis + 1) % 3]
    expected = math.cos(0.3) * unit[(axis + 1) % 3] + math.sin(0.3) * unit[(axis + 2) % 3]
    torch.testing.assert_close(turned, expected)


def test_rotations_compose_in_the_stated_order():
    angles = torch.tensor([[0.3, -0.4, 0.5], [-1.0, 0.2, 0.1]], dtype=D64)
    single = [geo.rotation(angles * torch.eye(3, dtype=D64)[axis]) for axis in range(3)]
    torch.testing.assert_close(geo.rotation(angles), single[2] @ single[1] @ single[0])


def test_flip_mirrors_the_voxel_grid():
    matrix = geo.flip(torch.tensor([True, False, True]), (5, 6, 7))
    volume = torch.rand(1, 2, 5, 6, 7, dtype=D64)
    torch.testing.assert_close(geo.resample(volume, matrix[None], (5, 6, 7)), volume.flip(2, 4))


def test_about_fixes_its_centre_and_keeps_the_linear_part():
    matrix = geo.rotation(torch.tensor([0.1, 0.2, 0.3], dtype=D64)) @ geo.scaling(torch.tensor([2.0, 1, 1], dtype=D64))
    centre = torch.tensor([3.0, -4.0, 5.0], dtype=D64)
    fixed = geo.about(matrix, centre)
    torch.testing.assert_close(geo.transform(fixed, centre[None])[0], centre)
    torch.testing.assert_close(fixed[:3, :3], matrix[:3, :3])


def test_transform_lattice_and_spacing_against_loops():
    a = matrices(2)
    points = geo.lattice((2, 3, 4))
    assert points.tolist() == [list(p) for p in itertools.product(range(2), range(3), range(4))]
    moved = geo.transform(a, points.expand(2, -1, -1))
    for batch, (index, point) in itertools.product(range(2), enumerate(points)):
        expected = a[batch] @ torch.cat([point, torch.ones(1, dtype=D64)])
        torch.testing.assert_close(moved[batch, index], expected[:3])
    for axis in range(3):
        step = torch.zeros(3, dtype=D64)
        step[axis] = 1
        length = (geo.transform(a, step[None]) - geo.transform(a, torch.zeros(1, 3, dtype=D64))).norm(dim=-1)[:, 0]
        torch.testing.assert_close(geo.spacing(a)[:, axis], length)


@pytest.mark.parametrize("margin", [-0.5, 0.0, 1.0])
def test_contains_is_point_in_box(margin: float):
    points = torch.tensor(list(itertools.product([-1, -0.5, -0.4, 0, 0.5, 1, 2.9, 3, 3.5, 3.6], repeat=3)), dtype=D64)
    inside = [all(margin <= x <= n - 1 - margin for x, n in zip(p, (4, 5, 4), strict=True)) for p in points.tolist()]
    assert geo.contains(points, (4, 5, 4), margin).tolist() == inside


# --- resampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_resample_is_trilinear_interpolation_by_hand(padding: str):
    volume = torch.rand(2, 2, 6, 5, 7, dtype=D64)
    matrix = torch.stack([view_affine(0.8, 20, (1, 0, 0), 40, (4, 3, 5)), view_affine(1, 9, (0, 0, 1), 41, (4, 3, 5))])
    matrix[:, :3, 3] += torch.tensor([2.6, -12 + 41 + 2.2, -7 + 3.3], dtype=D64)  # somewhere around the volume's middle
    out = geo.resample(volume, matrix, (4, 3, 5), padding=padding)
    for b, index in itertools.product(range(2), itertools.product(range(4), range(3), range(5))):
        point = (matrix[b] @ torch.tensor([*index, 1.0], dtype=D64))[:3]
        torch.testing.assert_close(out[(b, slice(None), *index)], trilinear(volume[b], point, padding))


def test_sample_is_trilinear_interpolation_by_hand_and_its_gradient_the_weights():
    volume = torch.rand(2, 3, 6, 5, 7, dtype=D64, requires_grad=True)
    affine = matrices(2)
    index = torch.rand(2, 20, 3, dtype=D64) * torch.tensor([6.0, 5, 7]) - 0.5
    values = geo.sample(volume, affine, geo.transform(affine, index))
    assert values.shape == (2, 20, 3)
    for b, k in itertools.product(range(2), range(20)):
        torch.testing.assert_close(values[b, k].detach(), trilinear(volume[b].detach(), index[b, k], "border"))
    one = geo.sample(volume, affine, geo.transform(affine, torch.tensor([[[1.0, 2.0, 3.25]]], dtype=D64)))
    (gradient,) = torch.autograd.grad(one[:, 0, 1].sum(), volume)
    expected = torch.zeros_like(volume)
    expected[:, 1, 1, 2, 3], expected[:, 1, 1, 2, 4] = 0.75, 0.25
    torch.testing.assert_close(gradient, expected)


def test_nearest_takes_the_nearest_voxel():
    volume = torch.rand(1, 1, 6, 5, 7)
    index = torch.rand(1, 50, 3, dtype=D64) * torch.tensor([5.0, 4, 6])
    values = geo.sample(volume, torch.eye(4, dtype=D64)[None], index, mode="nearest")[0, :, 0]
    assert values.tolist() == [volume[(0, 0, *p)].item() for p in index[0].round().long().tolist()]


# --- alignment --------------------------------------------------------------------------------------------------------


def uniform(kernel: int, stride: int, padding: int) -> nn.Module:
    """A convolution that averages each channel over its window."""
    conv = nn.Conv3d(3, 3, kernel, stride, padding, bias=False, groups=3).double()
    nn.init.constant_(conv.weight, 1 / kernel**3)
    return conv


ENCODERS = {
    "pool2": (nn.AvgPool3d(2), (2, 2, 2), (0.5, 0.5, 0.5), 0),
    "pool8": (nn.AvgPool3d(8), (8, 8, 8), (3.5, 3.5, 3.5), 0),
    "pool1x4x2": (nn.AvgPool3d((1, 4, 2)), (1, 4, 2), (0.0, 1.5, 0.5), 0),
    "k3s2p1": (nn.Sequential(*[uniform(3, 2, 1) for _ in range(3)]), (8, 8, 8), (0.0, 0.0, 0.0), 1),
    "k4s2p1": (nn.Sequential(*[uniform(4, 2, 1) for _ in range(3)]), (8, 8, 8), (3.5, 3.5, 3.5), 1),
}
VIEWS = [(0.7, 0, (0, 0, 0)), (1.4, 0, (1, 0, 1)), (1.0, 30, (0, 0, 0)), (1.2, -30, (1, 0, 0)), (0.8, 15, (1, 1, 1))]


def alignment_error(
    name: str, second: tuple, offset: tuple[float, ...] | None = None, dtype: torch.dtype = D64
) -> tuple[float, int]:
    """Largest error, in feature voxels of view 1, of view 2's aligned coordinates; and how many were compared."""
    encoder, stride, right, margin = ENCODERS[name]
    one, two = view_affine(1.0, -12, (0, 0, 0), 0.0), view_affine(*second, 3.7)
    with torch.no_grad():
        features = copy.deepcopy(encoder).to(dtype)(coordinates(two, VIEW, dtype))
    size = tuple(n // s for n, s in zip(VIEW, stride, strict=True))
    g1, g2 = (geo.feature_affine(a[None], stride, offset or right) for a in (one, two))
    aligned, valid = geo.align(features, g2, g1, size, margin)
    assert aligned.dtype == dtype
    truth = geo.feature_affine(one[None], stride, right)
    found = geo.transform(torch.linalg.inv(truth), aligned.double().flatten(2).transpose(1, 2))
    error = (found[0] - geo.lattice(size)).abs().amax(-1)[valid.flatten()]
    return error.max().item(), len(error)


@pytest.mark.parametrize("second", VIEWS)
@pytest.mark.parametrize("name", ENCODERS)
def test_alignment_is_exact_on_linear_fields(name: str, second: tuple):
    for dtype, tolerance in ((torch.float32, 1e-4), (D64, 1e-10)):
        error, compared = alignment_error(name, second, dtype=dtype)
        assert error < tolerance
        assert compared >= 8


@pytest.mark.parametrize(("name", "wrong"), [("k3s2p1", 3.5), ("pool8", 0.0), ("k4s2p1", 0.0)])
def test_alignment_with_the_wrong_centre_offset_is_off_by_more_than_a_third_of_a_feature(name: str, wrong: float):
    error, _ = alignment_error(name, (1.2, -30, (1, 0, 0)), (wrong,) * 3)
    assert error > 0.3


def test_feature_affine_by_hand():
    affine = matrices(1)
    feature = geo.feature_affine(affine, (8, 4, 2), (3.5, 0.0, 0.5))
    place = feature[0] @ torch.tensor([2.0, 3, 5, 1], dtype=D64)
    torch.testing.assert_close(place, affine[0] @ torch.tensor([8 * 2 + 3.5, 4 * 3, 2 * 5 + 0.5, 1], dtype=D64))


def test_forth_and_back_is_the_identity():
    one, two = matrices(2)
    there, back = geo.inverse(two) @ one, geo.inverse(one) @ two
    torch.testing.assert_close(back @ there, torch.eye(4, dtype=D64), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (D64, 1e-12)])
def test_identical_views_align_to_themselves(dtype: torch.dtype, tolerance: float):
    features = torch.randn(1, 4, 12, 10, 8, dtype=dtype)
    affine = matrices(1)
    aligned, valid = geo.align(features, affine, affine, (12, 10, 8))
    torch.testing.assert_close(aligned, features, rtol=0, atol=tolerance)
    assert valid.all()


@pytest.mark.parametrize("axes", [(2,), (3, 4), (2, 3, 4)])
def test_pure_flip_aligns_like_torch_flip(axes: tuple[int, ...]):
    view, size = (16, 24, 32), (4, 6, 8)
    mirror = geo.flip(torch.tensor([axis in axes for axis in (2, 3, 4)]), view)
    features = torch.randn(1, 3, *size, dtype=D64)
    one = matrices(1)
    g1, g2 = (geo.feature_affine(a, (4, 4, 4), (1.5, 1.5, 1.5)) for a in (one, one @ mirror))
    aligned, valid = geo.align(features, g2, g1, size)
    torch.testing.assert_close(aligned, features.flip(axes))
    assert valid.all()


@pytest.mark.parametrize("margin", [0.0, 1.0])
def test_validity_is_point_in_box_by_brute_force(margin: float):
    one, two = view_affine(1.0, -12, (0, 0, 0), 0.0), view_affine(1.1, 20, (1, 0, 0), 9.0)
    n1, n2 = (8, 7, 6), (7, 8, 9)
    g1, g2 = (geo.feature_affine(a[None], (8, 8, 8), (3.5, 3.5, 3.5)) for a in (one, two))
    _, valid = geo.align(torch.zeros(1, 1, *n2), g2, g1, n1, margin)
    back = torch.linalg.inv(g2[0]) @ g1[0]
    assert 0 < valid.sum() < valid.numel()
    for index in itertools.product(*map(range, n1)):
        point = (back @ torch.tensor([*index, 1.0], dtype=D64))[:3].tolist()
        inside = all(margin <= x <= n - 1 - margin for x, n in zip(point, n2, strict=True))
        inside &= all(margin <= x <= n - 1 - margin for x, n in zip(index, n1, strict=True))
        assert valid[(0, *index)].item() == inside


def test_batch_aligns_as_its_samples_one_by_one():
    features, onto, affine = torch.randn(5, 2, 6, 5, 4), matrices(5, 1), matrices(5, 1) @ matrices(5, 2)
    affine[:, :3, 3] = onto[:, :3, 3]
    together = geo.align(features, affine, onto, (5, 6, 7))
    for b in range(5):
        alone = geo.align(features[b : b + 1], affine[b : b + 1], onto[b : b + 1], (5, 6, 7))
        assert torch.equal(together[0][b : b + 1], alone[0])
        assert torch.equal(together[1][b : b + 1], alone[1])


def test_grids_stay_float32_under_autocast():
    volume = torch.rand(1, 1, 160, 4, 4)
    matrix = view_affine(0.9, 5, (0, 0, 0), 40, (160, 4, 4))[None]
    matrix[:, :3, 3] = torch.tensor([3.3, 0.2, 0.1])
    points = torch.rand(1, 20, 3, dtype=D64) * 3
    expected = geo.resample(volume, matrix, (160, 4, 4)), geo.sample(volume, matrix, points)
    with torch.autocast("cpu", torch.bfloat16):
        found = geo.resample(volume, matrix, (160, 4, 4)), geo.sample(volume, matrix, points)
        from_half = geo.sample(volume.bfloat16(), matrix, points)
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(expected, found, strict=True))
    assert torch.equal(from_half, geo.sample(volume.bfloat16().float(), matrix, points))


def test_views_that_share_nothing_have_no_valid_feature_and_no_gradient():
    features = torch.randn(1, 2, 4, 4, 4, requires_grad=True)
    far = geo.translation(torch.tensor([[500.0, 0, 0]], dtype=D64))
    aligned, valid = geo.align(features, far, torch.eye(4, dtype=D64)[None], (4, 4, 4))
    assert not valid.any()
    assert aligned.isfinite().all()
    loss = (F.mse_loss(aligned, torch.ones_like(aligned), reduction="none") * valid[:, None]).sum()
    loss.backward()
    assert features.grad.abs().sum() == 0


def linear_field(affine: Tensor, size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """``u(p) = A p + b``, which trilinear interpolation reproduces, and ``[I + A | b]``."""
    matrix = 0.15 * torch.randn(len(affine), 3, 3, generator=torch.Generator().manual_seed(3), dtype=D64)
    offset = torch.tensor([[1.5, -2.0, 0.7]], dtype=D64).expand(len(affine), 3)
    places = geo.transform(affine, geo.lattice(size))
    field = (places @ matrix.mT + offset[:, None]).mT.unflatten(2, size)
    return field, geo.homogeneous(torch.eye(3, dtype=D64) + matrix, offset)


def test_displacement_fields_move_points_and_back():
    size = (20, 18, 16)
    affine = matrices(2)
    field, whole = linear_field(affine, size)
    index = 6 + 5 * torch.rand(2, 30, 3, dtype=D64)
    points = geo.transform(affine, index)
    moved = geo.displace(points, field, affine)
    torch.testing.assert_close(moved, geo.transform(whole, points), rtol=0, atol=1e-9)
    assert (moved - points).norm(dim=-1).max() > 1
    far = geo.transform(affine, index + 100)
    assert torch.equal(geo.displace(far, field, affine), far)  # nothing is known there


def test_a_displacement_is_undone():
    """A smooth field, bent and not symmetric, so that forth and back differ."""
    size, affine = (24, 24, 24), torch.eye(4, dtype=D64)[None] * torch.tensor([2.0, 2.0, 2.0, 1.0])
    x, y, z = geo.lattice(size).T.reshape(3, *size) / 4
    field = torch.stack([y.sin() + 0.3, (z + x).cos(), 0.5 * x.sin()])[None].double()
    points = geo.transform(affine, 8 + 8 * torch.rand(1, 50, 3, dtype=D64))
    back = geo.undisplace(geo.displace(points, field, affine), field, affine)
    torch.testing.assert_close(back, points, rtol=0, atol=1e-6)
    moved = geo.displace(points, field, affine)
    one_step = moved - (geo.displace(moved, field, affine) - moved)
    assert (one_step - points).norm(dim=-1).max() > 0.05  # the field taken at the wrong end
