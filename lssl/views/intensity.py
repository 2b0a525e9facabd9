"""MR intensity augmentation, batched, on the device.

Every transform takes images ``(N, V, C, D, H, W)`` and changes each of the N groups with its own probability and its
own parameters; the V views of a group share both, down to the noise. Parameters are drawn on the CPU from one
generator, so the host knows which groups change and the device is never waited for; only those groups are computed.

Images are expected with background 0 and the brightest tissue near 1. Default probabilities and ranges of blur,
noise, bias field and gamma are those of the published longitudinal code (torchio 0.18: Ren et al., NeurIPS 2022);
brightness, contrast and low resolution follow nnU-Net's usual values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "BiasField",
    "Blur",
    "Brightness",
    "Contrast",
    "Gamma",
    "IntensityTransform",
    "LowResolution",
    "Noise",
    "default_transforms",
]


class IntensityTransform(ABC):
    """Base of the transforms: gates by probability, then changes the chosen groups.

    A new one implements :meth:`apply`; draw its parameters with :meth:`uniform`.

    Args:
        p: probability per group.
    """

    def __init__(self, p: float = 1.0) -> None:
        self.p = p

    @abstractmethod
    def apply(self, images: Tensor, spacing: Tensor, generator: torch.Generator) -> Tensor:
        """Changes all of ``images (n, V, C, D, H, W)``; ``spacing (n, 3)`` is their voxel size in mm."""

    def __call__(self, images: Tensor, spacing: Tensor, generator: torch.Generator) -> Tensor:
        """Changes a random subset of ``images (N, V, C, D, H, W)``; never in place."""
        chosen = (torch.rand(len(images), generator=generator) < self.p).nonzero().squeeze(1)
        if len(chosen) == 0:
            return images
        chosen = chosen.to(images.device, non_blocking=True)
        changed = self.apply(images[chosen], spacing[chosen].float(), generator)
        return images.index_copy(0, chosen, changed)

    @staticmethod
    def uniform(
        images: Tensor, low: float, high: float, generator: torch.Generator, count: int | None = None
    ) -> Tensor:
        """One draw per group, shaped to broadcast over the images; with ``count``, ``(n, count)`` draws."""
        shape = (len(images), count or 1)
        draws = (torch.rand(shape, generator=generator) * (high - low) + low).to(images.device, non_blocking=True)
        return draws if count else draws.view(-1, 1, 1, 1, 1, 1)


class Gamma(IntensityTransform):
    """``x → x^exp(g)``, ``g ~ U(-log_gamma, log_gamma)``; the sign of negative values is kept.

    Args:
        p: probability per group.
        log_gamma: half-width of the exponent's logarithm.
    """

    def __init__(self, p: float = 0.3, log_gamma: float = 0.3) -> None:
        super().__init__(p)
        self.log_gamma = log_gamma

    def apply(self, images: Tensor, spacing: Tensor, generator: torch.Generator) -> Tensor:
        """See the class."""
        exponent = self.uniform(images, -self.log_gamma, self.log_gamma, generator).exp()
        return images.sign() * images.abs().pow(exponent)


class Brightness(IntensityTransform):
    """``x → f x``, ``f ~ U(low, high)``.

    Args:
        p: probability per group.
        factor: range of the factor.
    """

    def __init__(self, p: float = 0.15, factor: tuple[float, float] = (0.75, 1.25)) -> None:
        super().__init__(p)
        self.factor = factor

    def apply(self, images: Tensor, spacing: Tensor, generator: torch.Generator) -> Tensor:
        """See the class."""
        return images * self.uniform(images, *self.factor, generator)


class Contrast(Brightness):
    """``x → m + f (x - m)``, ``m`` the image's own mean, ``f ~ U(low, high)``.

    Args:
        p: probability per group.
        factor: range of the factor.
    """

    def apply(self, images: Tensor, spacing: Tensor, generator: torch.Generator) -> Tensor:
        """See the class."""
        mean = images.mean((-3, -2, -1), keepdim=True)
        return torch.lerp(mean, images, self.uniform(images, *self.factor, generator))


class Noise(IntensityTransform):
    """Adds Gaussian noise of standard deviation ``σ ~ U(0, std)``.

    Args:
        p: probability per group.
        std: largest standard deviation, on images whose brightest tissue is 1.
    """

    def __init__(self, p: float = 0.25, std: float = 0.25) -> None:
        super().__init__(p)
        self.std = std

    def apply(self, images: Tensor, spacing: Tensor, generator: torch.Generator) -> Tensor:
        """See the class."""
        sigma = self.uniform(images, 0.0, self.std, generator)
        seed = int(torch.randint(2**62, (1,), generator=generator))
        on_device = torch.Generator(images.device).manual_seed(seed)
        noise = torch.randn(images[:, :1].shape, device=images.device, generator=on_device)
        return images + sigma * noise


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

    def apply(self, images: Tensor, spacing: Tensor, generator: torch.Generator) -> Tensor:
        """See the class."""
        powers = torch.arange(self.order + 1, device=images.device)
        bases = [torch.linspace(-1, 1, n, device=images.device)[:, None] ** powers for n in images.shape[-3:]]
        a, b, c = torch.meshgrid(powers, powers, powers, indexing="ij")
        draws = self.uniform(images, -self.coefficient, self.coefficient, generator, a.numel())
        draws = draws.view(-1, *a.shape) * (a + b + c <= self.order)
        field = torch.einsum("nabc,da,hb,wc->ndhw", draws, *bases)
        return images * field.exp()[:, None, None]


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

    def apply(self, images: Tensor, spacing: Tensor, generator: torch.Generator) -> Tensor:
        """See the class."""
        sigma = self.uniform(images, 0.0, self.sigma, generator, 3) / spacing
        matrices = []
        for axis, n in enumerate(images.shape[-3:]):
            index = torch.arange(n, device=images.device, dtype=torch.float32)
            width = sigma[:, axis, None, None].clamp_min(0.05)  # below that a voxel is untouched
            matrices.append(torch.softmax(-0.5 * ((index[:, None] - index) / width) ** 2, -1))
        return _separable(images, matrices)


class LowResolution(IntensityTransform):
    """As if scanned on voxels ``f`` times as large and interpolated back: box means, then linear interpolation.

    Args:
        p: probability per group.
        factor: range of ``f``, drawn for each axis on its own.
    """

    def __init__(self, p: float = 0.1, factor: tuple[float, float] = (1.0, 2.0)) -> None:
        super().__init__(p)
        self.factor = factor

    def apply(self, images: Tensor, spacing: Tensor, generator: torch.Generator) -> Tensor:
        """See the class."""
        factors = self.uniform(images, *self.factor, generator, 3)
        matrices = []
        for axis, n in enumerate(images.shape[-3:]):
            f = factors[:, axis, None, None]
            fine = torch.arange(n, device=images.device, dtype=torch.float32)
            centre = (fine[:, None] + 0.5) * f - 0.5  # of coarse voxel j, in fine voxels
            overlap = ((f + 1) / 2 - (fine - centre).abs()).clamp(0, 1)
            average = overlap / overlap.sum(-1, keepdim=True).clamp_min(1e-6)
            last = (n / f).ceil() - 1  # coarse voxels beyond the image do not exist
            position = torch.minimum((fine[:, None] + 0.5) / f - 0.5, last).clamp_min(0)
            matrices.append((1 - (position - fine).abs()).clamp_min(0) @ average)
        return _separable(images, matrices)


def _separable(images: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Applies one ``(n, size, size)`` matrix along each of the last three axes of ``(n, V, C, D, H, W)``."""
    d, h, w = matrices
    images = torch.einsum("nab,nvcbhw->nvcahw", d, images)
    images = torch.einsum("nab,nvcdbw->nvcdaw", h, images)
    return torch.einsum("nab,nvcdhb->nvcdha", w, images)


def default_transforms() -> list[IntensityTransform]:
    """The recommended chain, in the order in which a scanner would add it."""
    return [Blur(), LowResolution(), Noise(), BiasField(), Brightness(), Contrast(), Gamma()]
