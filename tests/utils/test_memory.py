"""An allocation that fails ends in a sentence; the limit that makes it fail is given back."""

import re
import resource

import numpy as np
import pytest
import torch

from lssl.callbacks import within_memory
from lssl.callbacks.within_memory import WithinMemory
from lssl.datamodules.phantom import PhantomDataModule
from lssl.datamodules.synthetic_brains import SyntheticBrainsDataModule
from lssl.utils import memory
from lssl.utils.errors import InputError

FREE = 200 * 10**6


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(within_memory, "available_memory", lambda: FREE)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    yield
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.parametrize(
    ("allocate", "asked"),
    [
        (lambda more: torch.zeros(more // 4), "{more:.3g} GB more,"),
        (lambda more: np.zeros(more // 8), "{more:.3g} GB more,"),
        (lambda more: [np.zeros(10**6) for _ in range(more // 8_000_000)], "0.008 GB more,"),  # many small ones
        (lambda more: bytearray(more), "more,"),
        (lambda more: torch.empty(10**15), "4e+06 GB more,"),
    ],
)
def test_what_fails_beyond_the_free_memory_is_said(small, allocate, asked):
    # More than what is free and all that this process holds: earlier tests freed memory that the allocator kept.
    # Whole GiB, as numpy says what it asked for in three digits of GiB.
    more = (1 + (2 * FREE + memory.data_memory()) // 2**30) * 2**30
    asked = re.escape(asked.format(more=more / 1e9))
    with (
        pytest.raises(InputError, match=f"out of memory: it asked for {asked} and 0.2 GB in all were free"),
        WithinMemory(),
    ):
        allocate(more)


def test_less_than_is_free_is_granted_and_the_limit_lifted_after_a_step(small):
    with WithinMemory() as limit:
        torch.zeros(10**7)
        limit.on_train_batch_end(None)
        torch.zeros(10**8)


def test_other_errors_stay(small):
    with pytest.raises(RuntimeError, match="another"), WithinMemory():
        raise RuntimeError("another")


def test_a_gpu_says_what_it_has():
    text = (
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.25 GiB is "
        "free. Process 7 has 77.86 GiB memory in use."
    )
    sentence = str(memory.out_of_memory(torch.OutOfMemoryError(text)))
    assert "asked for 21.5 GB more, with 1.34 GB of the GPU's left. Choose" in sentence


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (PhantomDataModule, {"subjects": 10**9}, "A table of 3,000,000,000 visits needs 600 GB"),
        (PhantomDataModule, {"subjects": 20_000}, "Keeping 60,000 visits of 64×64×64 voxels needs 110 GB"),
        (PhantomDataModule, {"size": 10**4}, "making a visit of 10000×10000×10000 voxels needs 2.4e\\+04 GB"),
        (PhantomDataModule, {"num_workers": 10**6}, "starting 1,000,000 processes needs"),
        (SyntheticBrainsDataModule, {"size": 10**4}, "making a visit"),
        (SyntheticBrainsDataModule, {"pairs_per_epoch": 10**9}, "A table of 2,000,000,032 visits needs 400 GB"),
    ],
)
def test_data_that_cannot_be_held_are_refused_before_they_are_made(cls, options, words, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 20 * 10**9)
    with pytest.raises(InputError, match=words):
        cls(**options)
    if "subjects" in options and options["subjects"] < 10**6:
        assert cls(**options, cache=False).cache is None
