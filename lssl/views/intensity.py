"""MR intensity augmentation, batched: parameters are drawn on the host, images are changed on the device.

Every transform takes images ``(N, V, C, D, H, W)`` and changes each of the N groups with its own probability and its
own parameters; the V views of a group share both, down to the noise. All parameters of a chain are drawn first, on the
host, so the host knows which groups change and the device is never waited for; only those groups are computed.

Images are expected with background 0 and the brightest tissue near 1. Default probabilities and ranges of blur,
noise, bias field and gamma are those of the published longitudinal code (torchio 0.18: Ren et al., NeurIPS 2022);
brightness, contrast and low resolution follow nnU-Net's usual values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lssl.utils.random import host_generator
from lssl.utils.transfer import send

__all__ = [
    "BiasField",
    "Blur",
    "Brightness",
    "Changes",
    "Contrast",
    "Gamma",
    "IntensityTransform",
    "LowResolution",
    "Noise",
    "default_transforms",
]

Size = tuple[int, int, int]


class IntensityTransform(ABC):
    """Base of the transforms: gates by probability, then changes the chosen groups.

    A new one implements :meth:`draw`, unless it has no parameters, and :meth:`apply`.

    Args:
        p: probability per group.
    """

    def __init__(self, p: float = 1.0) -> None:
        self.p = p

    def draw(self, spacing: np.ndarray, size: Size, draws: np.random.Generator) -> Sequence[np.ndarray]:
        """Parameters of n groups, which :meth:`apply` gets as tensors; by default none.

        Args:
            spacing: ``(n, 3)`` mm, voxel size of the images.
            size: voxels of an image.
            draws: source of random numbers; see :meth:`uniform`.
        """
        return ()

    @abstractmethod
    def apply(self, images: Tensor, generator: torch.Generator, *parameters: Tensor) -> Tensor:
        """Changes all of ``images (n, V, C, D, H, W)``, not in place.

        Args:
            images: on their device.
            generator: on the same device, for what is drawn voxel by voxel.
            *parameters: what :meth:`draw` gave.
        """

    def __call__(self, images: Tensor, spacing: Tensor, generator: torch.Generator) -> Tensor:
        """Changes a random subset of ``images (N, V, C, D, H, W)``; ``spacing (N, 3)`` is their voxel size in mm."""
        changes = Changes([self], spacing.cpu().numpy(), images.shape[-3:], host_generator(generator))
        return changes(images, send(changes.arrays, images.device))

    @staticmethod
    def uniform(
        draws: np.random.Generator, groups: int, low: float, high: float, count: int | None = None
    ) -> np.ndarray:
        """A float32 draw per group, shaped to broadcast over the images; with ``count``, ``(groups, count)`` draws."""
        drawn = draws.uniform(low, high, (groups, count or 1)).astype(np.float32)
        return drawn if count else drawn.reshape(-1, 1, 1, 1, 1, 1)


class Changes:
    """What a chain of transforms is to do to N groups, drawn on the host.

    Args:
        transforms: in order.
        spacing: ``(N, 3)`` mm, voxel size of the images.
        size: voxels of an image.
        draws: source of all random numbers.

    Attributes:
        arrays: indices and parameters, for the device.
    """

    def __init__(
        self,
        transforms: Sequence[IntensityTransform],
        spacing: np.ndarray,
        size: Sequence[int],
        draws: np.random.Generator,
    ) -> None:
        self.arrays: list[np.ndarray] = []
        self.seed = int(draws.integers(2**62))
        self._steps: list[tuple[IntensityTransform, bool, int]] = []  # whether it changes all, number of its arrays
        depth, height, width = size
        gates = draws.random((len(spacing), len(transforms))) < [transform.p for transform in transforms]
        for transform, gate in zip(transforms, gates.T, strict=True):
            chosen = np.flatnonzero(gate)
            if len(chosen):
                parameters = transform.draw(spacing[chosen], (depth, height, width), draws)
                self.arrays += [chosen, *parameters]
                self._steps.append((transform, len(chosen) == len(spacing), len(parameters)))

    def __call__(self, images: Tensor, arrays: Sequence[Tensor]) -> Tensor:
        """The changed ``images (N, V, C, D, H, W)``, which are left as they were; ``arrays`` are on their device.

        In the images' own type, whatever autocast says.
        """
        with torch.autocast(images.device.type, enabled=False):
            return self._changed(images, arrays)

    def _changed(self, images: Tensor, arrays: Sequence[Tensor]) -> Tensor:
        if not self._steps:
            return images
        generator = torch.Generator(images.device).manual_seed(self.seed)
        rest, changed, own = iter(arrays), images, False
        for transform, everything, count in self._steps:
            chosen, *parameters = (next(rest) for _ in range(1 + count))
            if everything:
                changed, own = transform.apply(changed, generator, *parameters), False
            else:
                some = transform.apply(changed.index_select(0, chosen), generator, *parameters)
                changed, own = changed if own else changed.clone(), True
                changed.index_copy_(0, chosen, some)
        return changed


class Gamma(IntensityTransform):
    """``x → x^exp(g)``, ``g ~ U(-log_gamma, log_gamma)``; the sign of negative values is kept.

    Args:
        p: probability per group.
        log_gamma: half-width of the exponent's logarithm.
    """

    def __init__(self, p: float = 0.3, log_gamma: float = 0.3) -> None:
        super().__init__(p)
        self.log_gamma = log_gamma

    def draw(self, spacing: np.ndarray, size: Size, draws: np.random.Generator) -> Sequence[np.ndarray]:
        """The exponent."""
        return (np.exp(self.uniform(draws, len(spacing), -self.log_gamma, self.log_gamma)),)

    def apply(self, images: Tensor, generator: torch.Generator, *parameters: Tensor) -> Tensor:
        """See the class."""
        return images.abs().pow_(parameters[0]).copysign_(images)


class Brightness(IntensityTransform):
    """``x → f x``, ``f ~ U(low, high)``.

    Args:
        p: probability per group.
        factor: range of the factor.
    """

    def __init__(self, p: float = 0.15, factor: tuple[float, float] = (0.75, 1.25)) -> None:
        super().__init__(p)
        self.factor = factor

    def draw(self, spacing: np.ndarray, size: Size, draws: np.random.Generator) -> Sequence[np.ndarray]:
        """The factor."""
        return (self.uniform(draws, len(spacing), *self.factor),)

    def apply(self, images: Tensor, generator: torch.Generator, *parameters: Tensor) -> Tensor:
        """See the class."""
        return images * parameters[0]


class Contrast(Brightness):
    """``x → m + f (x - m)``, ``m`` the image's own mean, ``f ~ U(low, high)``.

    Args:
        p: probability per group.
        factor: range of the factor.
    """

    def apply(self, images: Tensor, generator: torch.Generator, *parameters: Tensor) -> Tensor:
        """See the class."""
        return torch.lerp(images.mean((-3, -2, -1), keepdim=True), images, parameters[0])


class Noise(IntensityTransform):
    """Adds Gaussian noise of standard deviation ``σ ~ U(0, std)``.

    Args:
        p: probability per group.
        std: largest standard deviation, on images whose brightest tissue is 1.
    """

    def __init__(self, p: float = 0.25, std: float = 0.25) -> None:
        super().__init__(p)
        self.std = std

    def draw(self, spacing: np.ndarray, size: Size, draws: np.random.Generator) -> Sequence[np.ndarray]:
        """The standard deviation."""
        return (self.uniform(draws, len(spacing), 0.0, self.std),)

    def apply(self, images: Tensor, generator: torch.Generator, *parameters: Tensor) -> Tensor:
        """See the class."""
        noise = torch.randn(images[:, :1].shape, device=images.device, generator=generator)
        return torch.addcmul(images, noise, parameters[0])


class BiasField(IntensityTransform):
    """Multiplies by ``exp(Σ c_abc x^a y^b z^c)``, ``a + b + c ≤ order``, ``x, y, z ∈ [-1, 1]`` across the view.

    Args:
        p: probability per group.
        coefficient: coefficients are drawn from ``U(-coefficient, coefficient)``.
        order: order of the polynomial.
    """

    def __init__(self, p: float = 0.2, coefficient: float = 0.5, order: int = 3) -> None:
        super().__init__(p)
        self.coefficient, self.order = coefficient, order

    def draw(self, spacing: np.ndarray, size: Size, draws: np.random.Generator) -> Sequence[np.ndarray]:
        """The polynomial at each plane of the first axis, ``(n, D, b, c)``, and the powers of the other axes."""
        (d, h, w), within = _polynomial(self.order, size)
        drawn = self.uniform(draws, len(spacing), -self.coefficient, self.coefficient, within.size)
        coefficients = drawn.reshape(-1, *within.shape) * within
        planes = d @ coefficients.reshape(len(drawn), len(within), -1)
        return planes.reshape(len(drawn), len(d), *within.shape[1:]), h, w.T

    def apply(self, images: Tensor, generator: torch.Generator, *parameters: Tensor) -> Tensor:
        """See the class."""
        planes, h, w = parameters
        return images * (h @ planes @ w).exp_()[:, None, None]


class Blur(IntensityTransform):
    """Gaussian blur, ``σ ~ U(0, sigma)`` mm along each axis on its own.

    Three dense ``n × n`` Gaussian matrices, rows summing to 1, are several times faster than a 3D convolution here.

    Args:
        p: probability per group.
        sigma: largest standard deviation in mm.
    """

    def __init__(self, p: float = 0.3, sigma: float = 2.0) -> None:
        super().__init__(p)
        self.sigma = sigma

    def draw(self, spacing: np.ndarray, size: Size, draws: np.random.Generator) -> Sequence[np.ndarray]:
        """``-1 / 2σ²`` in voxels, ``(n, 3, 1, 1)``, indices, and 0 or -∞ for indices within an axis and beyond."""
        sigma = self.uniform(draws, len(spacing), 0.0, self.sigma, 3) / spacing.astype(np.float32)
        sharpness = -0.5 / np.clip(sigma, 0.05, None) ** 2  # below that a voxel is untouched
        index, inside = _axes(size)
        return sharpness[..., None, None], index, np.where(inside, np.float32(0), np.float32(-np.inf))

    def apply(self, images: Tensor, generator: torch.Generator, *parameters: Tensor) -> Tensor:
        """See the class."""
        sharpness, index, beyond = parameters
        logits = torch.addcmul(beyond, (index[:, None] - index).square_(), sharpness)
        return _separable(images, logits.softmax(-1))


class LowResolution(IntensityTransform):
    """As if scanned on voxels ``f`` times as large and interpolated back: box means, then linear interpolation.

    Args:
        p: probability per group.
        factor: range of ``f``, drawn for each axis on its own.
    """

    def __init__(self, p: float = 0.1, factor: tuple[float, float] = (1.0, 2.0)) -> None:
        super().__init__(p)
        self.factor = factor

    def draw(self, spacing: np.ndarray, size: Size, draws: np.random.Generator) -> Sequence[np.ndarray]:
        """Reach and centres of the coarse voxels, positions of the fine ones among them; indices as in Blur."""
        f = self.uniform(draws, len(spacing), *self.factor, 3)[..., None]
        index, inside = _axes(size)
        last = np.ceil(np.asarray(size, np.float32)[:, None] / f) - 1  # coarse voxels beyond the image do not exist
        centre = (index + np.float32(0.5)) * f - np.float32(0.5)  # of coarse voxel j, in fine voxels
        position = np.clip(np.minimum((index + np.float32(0.5)) / f - np.float32(0.5), last), 0, None)
        reach = (f + 1) / 2
        return reach[..., None], centre[..., None], position[..., None], index, inside.astype(np.float32)

    def apply(self, images: Tensor, generator: torch.Generator, *parameters: Tensor) -> Tensor:
        """See the class."""
        reach, centre, position, index, inside = parameters
        overlap = (reach - (centre - index).abs_()).clamp_(0, 1).mul_(inside)
        average = overlap / overlap.sum(-1, keepdim=True).clamp_min_(1e-6)
        weights = (position - index).abs_().neg_().add_(1).clamp_min_(0)
        return _separable(images, weights @ average)


@lru_cache(maxsize=8)
def _polynomial(order: int, size: Size) -> tuple[list[np.ndarray], np.ndarray]:
    """Powers ``(n, order + 1)`` of the positions along each axis, and 1 for terms up to the order, else 0."""
    powers = np.arange(order + 1)
    axes = [np.linspace(-1, 1, n, dtype=np.float32)[:, None] ** powers.astype(np.float32) for n in size]
    return axes, (powers[:, None, None] + powers[:, None] + powers <= order).astype(np.float32)


@lru_cache(maxsize=8)
def _axes(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the longest axis as float32, and bool ``(3, 1, longest)``, true within each axis."""
    index = np.arange(max(size), dtype=np.float32)
    return index, (index < np.asarray(size)[:, None])[:, None]


def _separable(images: Tensor, matrices: Tensor) -> Tensor:
    """Applies one matrix of ``(n, 3, longest, longest)`` along each of the last axes of ``(n, V, C, D, H, W)``."""
    d, h, w = (matrices[:, axis, :n, :n] for axis, n in enumerate(images.shape[-3:]))
    images = torch.einsum("nab,nvcbhw->nvcahw", d, images)
    images = torch.einsum("nab,nvcdbw->nvcdaw", h, images)
    return torch.einsum("nab,nvcdhb->nvcdha", w, images)


def default_transforms() -> list[IntensityTransform]:
    """The recommended chain, in the order in which a scanner would add it."""
    return [Blur(), LowResolution(), Noise(), BiasField(), Brightness(), Contrast(), Gamma()]
