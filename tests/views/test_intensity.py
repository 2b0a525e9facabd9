"""Intensity transforms, each against a slow reference; and what all of them promise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lssl.views import intensity
from lssl.views.intensity import (
    BiasField,
    Blur,
    Brightness,
    Changes,
    Contrast,
    Gamma,
    IntensityTransform,
    LowResolution,
    Noise,
    default_transforms,
)

SPACING = torch.tensor([[1.0, 0.8, 2.0]])
ALL = [Gamma, Brightness, Contrast, Noise, BiasField, Blur, LowResolution]


def images(n: int = 3, views: int = 2, channels: int = 1, size=(12, 10, 8)) -> Tensor:
    return torch.rand(n, views, channels, *size, generator=torch.Generator().manual_seed(5)) + 0.05


def apply(change: IntensityTransform, x: Tensor, seed: int = 0) -> Tensor:
    return change(x, SPACING.expand(len(x), 3), torch.Generator().manual_seed(seed))


@pytest.fixture
def force(monkeypatch):
    """Gives every group the stated parameters instead of random ones."""

    def to(*values: float) -> None:
        def uniform(draws: object, groups: int, low: float, high: float, count: int | None = None) -> np.ndarray:
            drawn = np.tile(np.array(values, np.float32), (groups, 1))
            assert drawn.shape[1] == (count or 1)
            return drawn if count else drawn.reshape(-1, 1, 1, 1, 1, 1)

        monkeypatch.setattr(IntensityTransform, "uniform", staticmethod(uniform))

    return to


# --- what all transforms promise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_probability_zero_changes_nothing_and_one_all(kind: type):
    x = images(6)
    before = x.clone()
    assert torch.equal(apply(kind(p=0.0), x), before)
    changed = apply(kind(p=1.0), x)
    assert torch.equal(x, before)  # never in place
    assert (changed - before).abs().flatten(1).amax(1).gt(0).all()
    assert changed.shape == x.shape
    assert changed.dtype == torch.float32


@pytest.mark.parametrize("kind", ALL)
def test_probability_is_per_group(kind: type):
    x = images(400, 1, size=(4, 4, 4))
    touched = (apply(kind(p=0.3), x) - x).abs().flatten(1).amax(1) > 0
    assert 0.2 < touched.float().mean() < 0.4


@pytest.mark.parametrize("kind", ALL)
def test_views_of_a_group_share_parameters_and_noise_and_groups_do_not(kind: type):
    x = images(1, 1).expand(3, 2, 1, -1, -1, -1)  # six times one image
    changed = apply(kind(p=1.0), x)
    assert torch.equal(changed[:, 0], changed[:, 1])
    assert not torch.equal(changed[0], changed[1])
    assert not torch.equal(changed[1], changed[2])


@pytest.mark.parametrize("kind", ALL)
def test_untouched_groups_are_passed_on_and_touched_ones_do_not_depend_on_them(kind: type):
    """A batch equals its groups one by one, where they have the same parameters."""
    x, change = images(5), kind(p=0.5)
    changed = apply(change, x)
    draws = (changed != x).flatten(1).any(1)
    assert 0 < draws.sum() < 5
    if kind in (Noise, Contrast):
        return  # Noise is drawn for all at once; Contrast is checked in closed form below
    other = x.clone()
    other[draws.nonzero()[0]] = 0.5
    again = apply(change, other)
    assert torch.equal(again[draws][1:], changed[draws][1:])


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("value", [0.0, -0.3])
def test_zeros_and_negatives_give_finite_numbers(kind: type, value: float):
    x = torch.full((2, 1, 1, 6, 6, 6), value)
    x[..., 3] = 1.0
    for seed in range(5):
        assert apply(kind(p=1.0), x, seed).isfinite().all()


def test_default_chain_leaves_the_background_of_an_image_near_zero():
    x = torch.zeros(16, 1, 1, 12, 12, 12)
    x[..., 4:8, 4:8, 4:8] = 1.0
    generator, y = torch.Generator().manual_seed(0), x
    for change in default_transforms():
        if not isinstance(change, Noise):
            y = change(y, SPACING.expand(16, 3), generator)
    assert y[..., 0, 0, 0].abs().max() < 0.05
    assert y.max() < 10


# --- point-wise transforms, their parameters read off the result ------------------------------------------------------


def test_gamma_is_a_power_within_range_and_keeps_signs():
    x = images(200, 2, size=(3, 3, 3))
    exponent = (apply(Gamma(1.0, 0.3), x).log() / x.log()).flatten(1)
    torch.testing.assert_close(exponent, exponent[:, :1].expand_as(exponent), rtol=2e-3, atol=2e-3)
    log = exponent.median(1).values.log()
    assert -0.301 < log.min() < -0.25
    assert 0.25 < log.max() < 0.301
    assert torch.equal(apply(Gamma(1.0), -x), -apply(Gamma(1.0), x))


def test_brightness_is_one_factor_within_range():
    x = images(200, 2, 2, size=(3, 3, 3))
    factor = (apply(Brightness(1.0, (0.75, 1.25)), x) / x).flatten(1)
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor))
    assert 0.75 <= factor.min() < 0.8
    assert 1.2 < factor.max() <= 1.2501


def test_contrast_scales_about_the_mean_of_each_image():
    x = images(200, 2, 2, size=(4, 4, 4))
    y = apply(Contrast(1.0, (0.75, 1.25)), x)
    mean = x.double().mean((3, 4, 5), keepdim=True)
    torch.testing.assert_close(y.double().mean((3, 4, 5), keepdim=True), mean, rtol=1e-5, atol=1e-6)
    ratio = (y.std((3, 4, 5)) / x.std((3, 4, 5))).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    torch.testing.assert_close(y.double(), mean + ratio[:, 0].view(-1, 1, 1, 1, 1, 1) * (x - mean), rtol=0, atol=1e-5)
    assert 0.75 <= ratio.min() < 0.8
    assert 1.2 < ratio.max() <= 1.2501


def test_noise_is_white_gaussian_of_the_drawn_deviation(force):
    x = images(2, 1, size=(40, 40, 40))
    force(0.2)
    noise = apply(Noise(1.0, 0.25), x) - x
    assert noise.mean().abs() < 0.002
    assert (noise.std() - 0.2).abs() < 0.002
    assert ((noise.abs() < 0.2).float().mean() - 0.6827).abs() < 0.01
    assert (noise[..., 1:] * noise[..., :-1]).mean().abs() < 0.002
    assert (noise[0] * noise[1]).mean().abs() < 0.002  # groups


def test_noise_deviations_are_uniform_up_to_the_largest():
    x = torch.zeros(400, 1, 1, 12, 12, 12)
    sigma = apply(Noise(1.0, 0.25), x).flatten(1).std(1)
    assert sigma.min() < 0.01
    assert 0.24 < sigma.max() < 0.265
    assert (sigma.mean() - 0.125).abs() < 0.015


# --- smooth fields, blur, low resolution: explicit loops --------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 3])
def test_bias_field_is_the_polynomial_by_triple_loop(force, order: int):
    powers = list(itertools.product(range(order + 1), repeat=3))
    draws = [0.1 * math.sin(3 * i + 1) for i in range(len(powers))]
    force(*draws)
    x = images(2, 2, size=(5, 4, 3))
    field = torch.zeros(5, 4, 3, dtype=torch.float64)
    for i, j, k in itertools.product(range(5), range(4), range(3)):
        p, q, r = (2 * index / (n - 1) - 1 for index, n in zip((i, j, k), (5, 4, 3), strict=True))
        for draw, (a, b, c) in zip(draws, powers, strict=True):
            if a + b + c <= order:
                field[i, j, k] += draw * p**a * q**b * r**c
    torch.testing.assert_close(apply(BiasField(1.0, order=order), x).double(), x * field.exp(), rtol=1e-5, atol=1e-6)


def test_bias_field_coefficients_fill_their_range(monkeypatch):
    seen = []
    original = IntensityTransform.uniform
    monkeypatch.setattr(IntensityTransform, "uniform", staticmethod(lambda *a: seen.append(original(*a)) or seen[-1]))
    apply(BiasField(1.0, 0.5), images(50, 1, size=(3, 3, 3)))
    assert -0.5 <= seen[0].min() < -0.49
    assert 0.49 < seen[0].max() <= 0.5


@pytest.mark.parametrize("sigma", [(0.7, 1.0, 1.6), (2.0, 0.3, 0.9)])
def test_blur_is_explicit_convolution_with_a_normalised_kernel(force, sigma: tuple):
    force(*sigma)
    x = images(1, 2, size=(31, 31, 21))
    y, expected = apply(Blur(1.0), x).double(), x.double().flatten(0, 1)
    reach = 10
    for axis, (mm, step) in enumerate(zip(sigma, SPACING[0].tolist(), strict=True)):
        steps = torch.arange(-reach, reach + 1, dtype=torch.float64)
        kernel = torch.exp(-0.5 * (steps * step / mm) ** 2)
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = -1
        expected = F.conv3d(expected, (kernel / kernel.sum()).view(shape))
    interior = y.flatten(0, 1)[..., reach:-reach, reach:-reach, reach:-reach]
    torch.testing.assert_close(interior, expected, rtol=1e-5, atol=1e-6)


def test_blur_of_almost_nothing_is_the_image(force):
    force(1e-4, 0.0, 1e-4)
    torch.testing.assert_close(apply(Blur(1.0), images()), images())


@pytest.mark.parametrize("factor", [(2.0, 2.0, 2.0), (2.0, 1.0, 4.0)])
def test_low_resolution_is_block_means_and_linear_interpolation(force, factor: tuple):
    force(*factor)
    x = images(2, 1, 2, size=(12, 10, 16))
    coarse = F.avg_pool3d(x.flatten(0, 1), [int(f) for f in factor])
    expected = F.interpolate(coarse, size=(12, 10, 16), mode="trilinear", align_corners=False)
    torch.testing.assert_close(apply(LowResolution(1.0), x).flatten(0, 1), expected)


def test_low_resolution_with_a_broken_factor_averages_voxel_parts(force):
    """One axis, factor 1.5, by fine slices: each voxel is cut in a thousand parts."""
    force(1.5, 1.0, 1.0)
    x, n = images(1, 1, size=(12, 1, 1)), 12
    parts = x.double().flatten().repeat_interleave(1000)
    coarse = parts.view(-1, 1500).mean(1)
    position = torch.arange(n, dtype=torch.float64).add(0.5).div(1.5).sub(0.5).clamp(0, len(coarse) - 1)
    low = position.floor().long()
    high = (low + 1).clamp_max(len(coarse) - 1)
    expected = torch.lerp(coarse[low], coarse[high], position - low)
    torch.testing.assert_close(apply(LowResolution(1.0), x).double().flatten(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "values"), [(Blur, (1.1, 0.7, 2.0)), (LowResolution, (1.37, 1.9, 1.6))])
@pytest.mark.parametrize("axis", range(3))
def test_nothing_moves(force, kind: type, values: tuple, axis: int):
    """A ramp along any axis stays where it was, away from the border; a constant everywhere."""
    force(*values)
    shape = [1, 1, 1, 1, 1, 1]
    shape[3 + axis] = 32
    ramp = torch.arange(32.0).view(shape).expand(1, 1, 1, 32, 32, 32)
    inner = (..., slice(10, -10), slice(10, -10), slice(10, -10))
    stairs = 0.1 if kind is LowResolution else 1e-3  # the mean over parts of voxels is not quite the ramp's
    torch.testing.assert_close(apply(kind(1.0), ramp)[inner], ramp[inner], rtol=0, atol=stairs)
    constant = torch.full((1, 1, 1, 17, 13, 11), 0.7)
    torch.testing.assert_close(apply(kind(1.0), constant), constant)


def test_default_chain_holds_every_transform_once():
    assert {type(change) for change in default_transforms()} == set(ALL)
    assert set(ALL) == {
        getattr(intensity, name)
        for name in intensity.__all__
        if name not in ("Changes", "IntensityTransform", "default_transforms")
    }


@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_a_chain_is_its_transforms_one_after_another_and_leaves_its_input(probability: float):
    """Groups that a transform leaves out keep what the transforms before made of them."""
    x = images(6)
    before = x.clone()
    chain = default_transforms()
    for change in chain:
        change.p = probability
    changes = Changes(chain, SPACING.expand(6, 3).numpy(), x.shape[3:], np.random.default_rng(0))
    arrays = [torch.from_numpy(np.ascontiguousarray(array)) for array in changes.arrays]
    changed = changes(x, arrays)
    assert torch.equal(x, before)
    expected, rest = x.clone(), iter(arrays)
    generator = torch.Generator().manual_seed(changes.seed)
    for transform, _, count in changes._steps:
        chosen, *parameters = (next(rest) for _ in range(1 + count))
        expected[chosen] = transform.apply(expected[chosen], generator, *parameters)
    # Chosen images lie elsewhere in memory, which older torch rounds otherwise in a resampling
    torch.testing.assert_close(changed, expected, rtol=1e-5, atol=1e-6)
    assert len({tuple(arrays[0].tolist()), tuple(range(6))}) == 2 - int(probability)
