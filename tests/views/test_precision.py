"""Precisions: refused where places would lose digits, and said aloud where the CPU emulates them."""

import warnings

import pytest
import torch

from lssl.utils.errors import InputError
from lssl.views.precision import check_precision

LARGE = ((32, 32, 32), {"bottleneck": (8, 8, 8)})  # maps of 4 voxels a side


@pytest.fixture
def instructions(monkeypatch):
    """Sets whether the CPU has instructions for bfloat16."""

    def give(present):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: present)

    return give


def test_bfloat16_that_the_cpu_emulates_is_said(instructions):
    instructions(False)
    with pytest.warns(UserWarning, match="bf16-mixed may take a hundred times as long as 32-true on this CPU") as said:
        check_precision("bf16-mixed", torch.device("cpu"), *LARGE)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("present", "device", "precision"),
    [(True, "cpu", "bf16-mixed"), (False, "cuda", "bf16-mixed"), (False, "cpu", "32-true"), (False, "cpu", "16-mixed")],
)
def test_nothing_is_said_where_nothing_is_emulated(present, device, precision, instructions):
    instructions(present)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_precision(precision, torch.device(device), *LARGE)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_a_precision_that_converts_places_is_refused(precision):
    with pytest.raises(InputError, match=f"{precision} would convert the visits' places, too"):
        check_precision(precision, torch.device("cuda"), *LARGE)


def test_maps_whose_bfloat16_gradients_are_wrong_are_refused_on_cpus_alone(instructions):
    instructions(True)
    small = ((32, 32, 32), {"bottleneck": (8, 8, 16)})  # 2 voxels along the last axis
    check_precision("bf16-mixed", torch.device("cuda"), *small)
    with pytest.raises(InputError, match="as tap 'bottleneck' has here"):
        check_precision("bf16-mixed", torch.device("cpu"), *small)
