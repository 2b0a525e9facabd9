"""Initial weights other than torch's."""

from __future__ import annotations

from torch import nn

from lssl.networks.heads import StackedLinear

__all__ = ["published_init"]


def published_init(module: nn.Module) -> None:
    """Draws a module's own weights as the published code of Ren et al. (2022); use it with ``network.apply``.

    Convolutions and linear layers: normal with standard deviation √(2 / fan-in) (He et al., ICCV 2015), 2.4 times that
    of torch's default, √(1 / (3 fan-in)); biases 0. Three-dimensional batch norms: weights N(1, 0.02²), biases 0.
    Everything else, one-dimensional batch norms included, keeps torch's.
    """
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, StackedLinear):
        nn.init.normal_(module.weight, 0.0, (2 / module.weight.shape[1]) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm3d) and module.affine:
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
