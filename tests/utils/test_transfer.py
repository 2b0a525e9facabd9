"""Arrays sent in one copy come out as they went in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lssl.utils.random import host_generator
from lssl.utils.transfer import pack, send, unpack

ARRAYS = [
    np.arange(5, dtype=np.int64),
    np.array([True, False, True]),
    np.linspace(0, 1, 7, dtype=np.float32).reshape(7, 1)[::-1],
    np.broadcast_to(np.float64(3.25), (2, 3)),
    np.zeros((0, 4), np.float32),
    np.random.default_rng(0).random((4, 4, 4)).swapaxes(0, 2),
]


def same(tensors: list[torch.Tensor]) -> None:
    assert len(tensors) == len(ARRAYS)
    for tensor, array in zip(tensors, ARRAYS, strict=True):
        assert tensor.shape == array.shape
        assert tensor.numpy().dtype == array.dtype
        assert np.array_equal(tensor.numpy(), array)


def test_packed_and_unpacked_arrays_are_as_before():
    buffer = pack(ARRAYS)
    assert buffer.dtype == torch.uint8
    same(unpack(buffer, ARRAYS))


def test_one_copy_holds_them_all():
    parts = unpack(buffer := pack(ARRAYS), ARRAYS)
    start, end = buffer.data_ptr(), buffer.data_ptr() + buffer.numel()
    assert all(start <= part.data_ptr() < end for part in parts if part.numel())
    assert all((part.data_ptr() - start) % part.element_size() == 0 for part in parts)


def test_sent_arrays_are_as_before_and_own_their_memory():
    same(send(ARRAYS, "cpu"))
    array = np.zeros(3)
    send([array], "cpu")[0].fill_(1)
    assert array.tolist() == [0, 0, 0]


@pytest.mark.parametrize("device", ["meta"])
def test_another_device_gets_the_shapes_and_types(device: str):
    for tensor, array in zip(send(ARRAYS, device), ARRAYS, strict=True):
        assert tensor.device.type == device
        assert tensor.shape == array.shape
        assert torch.empty(0, dtype=tensor.dtype).numpy().dtype == array.dtype


def test_plans_are_drawn_from_torchs_generator():
    one, other = (torch.Generator().manual_seed(5) for _ in range(2))
    first, again = host_generator(one).random(4), host_generator(other).random(4)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, host_generator(one).random(4))  # the next plan is another
