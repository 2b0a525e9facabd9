"""Values and gradients that the published longitudinal code gives on fixed inputs; and the examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import numpy as np
import pytest
import torch

import lssl.losses
from lssl.losses import Covariance, NegativeCosine, Orthogonality, Variance

TAPS = {"encoder": 0.5, "skip": 0.0, "decoder": 0.5}  # and their similarity weights


@pytest.fixture(scope="module")
def oracle() -> dict[str, torch.Tensor]:
    stored = np.load(Path(__file__).parent.parent / "oracles" / "longitudinal_local_losses.npz")
    return {name: torch.from_numpy(stored[name]) for name in stored}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.smoke
def test_terms_total_and_gradients_are_the_published_ones(oracle):
    z, p = ({tap: oracle[f"{kind}_{tap}"].clone().requires_grad_() for tap in TAPS} for kind in "zp")

    def rows(tap: str) -> tuple[torch.Tensor, torch.Tensor]:  # visit A first
        return z[tap][:2].flatten(0, 1), z[tap][2:].flatten(0, 1)

    similarity = {tap: NegativeCosine()(p[tap][:2], z[tap][:2], p[tap][2:], z[tap][2:]) for tap in TAPS}
    variance, covariance = Variance()(*rows("decoder")), Covariance()(*rows("decoder"))
    orthogonality = Orthogonality()(z["skip"], z["decoder"])
    close(similarity["encoder"], oracle["similarity_encoder"])
    close(similarity["decoder"], oracle["similarity_decoder"])
    close(sum(weight * similarity[tap] for tap, weight in TAPS.items()), oracle["similarity"])
    close(variance, oracle["variance_decoder"])
    close(covariance, oracle["covariance_decoder"])
    close(orthogonality, oracle["orthogonality_skip_decoder"])
    total = sum(weight * similarity[tap] for tap, weight in TAPS.items())
    total = total + 0.3 * variance + 0.2 * covariance + 5 * orthogonality
    close(total, oracle["total"])
    total.backward()
    for name, tensors in (("z", z), ("p", p)):
        for tap, tensor in tensors.items():
            expected = oracle[f"grad_{name}_{tap}"]
            found = torch.zeros_like(expected) if tensor.grad is None else tensor.grad
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * max(expected.abs().max().item(), 1e-3))
    assert oracle["grad_z_decoder"].abs().max() > 1e-4  # the comparison above is not one of zeros


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(lssl.losses.__path__)])
def test_examples_in_docstrings_run(name: str):
    result = doctest.testmod(importlib.import_module(f"lssl.losses.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
