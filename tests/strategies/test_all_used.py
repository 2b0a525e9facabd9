"""Every trained parameter takes part in every step, so that DDP need not look for unused ones."""

from __future__ import annotations

import pytest
import torch
from test_all_ranks import BATCHES, TASKS, batches  # noqa: F401
from test_distributed import part

from lssl.segmentation.segmenter import Segmenter


@pytest.mark.parametrize("name", TASKS)
def test_every_parameter_has_a_gradient_whatever_the_batch(name, batches):  # noqa: F811
    """Also where no pair of a rank shares a place and no visit has a label: other ranks wait for these gradients."""
    for kind in BATCHES:
        for rows in (slice(None), slice(2, 4)):
            torch.manual_seed(0)
            task = TASKS[name]()
            task.generator.manual_seed(0)
            own = [part(item, rows) for item in batches[kind]]
            terms = task.terms(*own[:2]) if isinstance(task, Segmenter) else task.terms(*own)
            task.total(terms).backward()
            unused = [key for key, value in task.named_parameters() if value.requires_grad and value.grad is None]
            assert not unused, (kind, rows)
