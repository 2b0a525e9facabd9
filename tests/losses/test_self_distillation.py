"""Self-distillation against the published code's numbers, loops in float64, and its two collapses."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lssl.losses import Prototypes, SelfDistillation
from lssl.utils.errors import InputError

ORACLE = Path(os.environ.get("LSSL_ORACLES", Path(__file__).parents[2] / "../shared/oracles"))
ORACLE = ORACLE / "anatomical_invariance_losses.npz"


@pytest.fixture(scope="module")
def oracle() -> dict[str, Tensor]:
    if not ORACLE.is_file():
        pytest.skip(f"no {ORACLE}; set LSSL_ORACLES")
    with np.load(ORACLE) as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored}


def published(oracle: dict[str, Tensor], kind: str) -> SelfDistillation:
    """As it stood at the oracle's epoch."""
    centre = oracle[f"center_{kind}_before"].flatten()
    loss = SelfDistillation(len(centre), oracle["student_temperature"].item())
    loss.centre.copy_(centre)
    loss.temperature.fill_(oracle["teacher_temperature"].item())
    return loss


def test_values_centres_and_gradients_of_the_published_code(oracle):
    """Query first, key second: the pooled outputs are crossed, the tokens are not."""
    cls, tokens = (oracle[f"student_{kind}"].clone().requires_grad_() for kind in ("cls", "tokens"))
    recon = oracle["reconstruction"].clone().requires_grad_()
    inter, intra = published(oracle, "cls"), published(oracle, "tokens")
    crossed = torch.cat(oracle["teacher_cls"].chunk(2)[::-1])
    terms = {
        "inter_volume": inter(cls, crossed),
        "intra_volume": intra(tokens, oracle["teacher_tokens"]),
        "reconstruction_term": 5 * (recon - oracle["images"]).square().mean(),
    }
    for name, value in terms.items():
        assert value.item() == pytest.approx(oracle[name].item(), rel=1e-5), name
    total = sum(terms.values())
    assert total.item() == pytest.approx(oracle["total"].item(), rel=1e-5)
    total.backward()
    for name, tensor in (("student_cls", cls), ("student_tokens", tokens), ("reconstruction", recon)):
        torch.testing.assert_close(tensor.grad, oracle[f"grad_{name}"], rtol=1e-5, atol=1e-7)
    for loss, kind, teacher in ((inter, "cls", crossed), (intra, "tokens", oracle["teacher_tokens"])):
        loss.observe(teacher)
        loss.follow(0.0)
        after = oracle[f"center_{kind}_after"].flatten()
        torch.testing.assert_close(loss.centre, after, rtol=1e-5, atol=1e-7)


def test_the_schedule_is_that_of_the_published_epochs(oracle):
    """30 epochs of 1000 from .008 to .01, the last of them at .01: epoch 10 is 10/29 of the way."""
    loss = SelfDistillation(4, warmup=29 / 1000)
    assert loss.temperature.item() == pytest.approx(0.008)
    loss.follow(oracle["epoch"].item() / 1000)
    assert loss.temperature.item() == pytest.approx(oracle["teacher_temperature"].item(), rel=1e-6)
    loss.follow(0.5)
    assert loss.temperature.item() == pytest.approx(0.01)
    still = SelfDistillation(4, warmup=0.0)
    still.follow(0.0)
    assert still.temperature.item() == pytest.approx(0.01)


def test_value_by_loops():
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, 5, generator=draw) for _ in range(2))
    loss = SelfDistillation(5, student_temperature=0.3, teacher_temperature=(0.5, 0.5))
    loss.centre.copy_(torch.randn(5, generator=draw))
    total = 0.0
    for s, t in zip(student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), strict=True):
        weights = [math.exp((x - c) / 0.5) for x, c in zip(t, loss.centre.tolist(), strict=True)]
        log_scale = math.log(sum(math.exp(x / 0.3) for x in s))
        total -= sum(w / sum(weights) * (x / 0.3 - log_scale) for w, x in zip(weights, s, strict=True))
    assert loss(student, teacher).item() == pytest.approx(total / 12, rel=1e-5)


def test_no_gradient_reaches_the_teacher_and_bfloat16_is_left_behind():
    draw = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(6, 9, generator=draw, requires_grad=True) for _ in range(2))
    loss = SelfDistillation(9)
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == loss(student, teacher).item()


def test_the_centre_is_a_moving_mean_over_all_rows():
    draw = torch.Generator().manual_seed(2)
    loss, expected = SelfDistillation(3, momentum=0.8), torch.zeros(3)
    for _ in range(4):
        teacher = torch.randn(2, 5, 3, generator=draw)
        loss.observe(teacher)
        loss.follow(1.0)
        expected = 0.8 * expected + 0.2 * teacher.mean((0, 1))
    torch.testing.assert_close(loss.centre, expected)
    assert set(loss.state_dict()) == {"centre", "temperature"}


def test_accumulated_batches_move_the_centre_once_by_their_mean():
    draw = torch.Generator().manual_seed(2)
    batches = torch.randn(4, 6, 3, generator=draw)
    together, apart = SelfDistillation(3), SelfDistillation(3)
    together.observe(batches)
    for batch in batches:
        apart.observe(batch)
        assert apart.centre.abs().max() == 0  # all batches of a step are centred alike
    for loss in (together, apart):
        loss.follow(0.0)
    torch.testing.assert_close(apart.centre, together.centre)
    before = apart.centre.clone()
    apart.follow(0.5)  # nothing was observed since
    assert torch.equal(apart.centre, before)


def test_centring_keeps_one_prototype_from_taking_all():
    """A teacher that always says the same: centred on what it says, it says nothing."""
    teacher = torch.tensor([[1.0, 0.0, 0.0]]).repeat(4, 1)
    loss = SelfDistillation(3, teacher_temperature=(0.01, 0.01))
    assert loss.target(teacher)[:, 0].min() > 0.999
    for _ in range(200):
        loss.observe(teacher)
        loss.follow(1.0)
    torch.testing.assert_close(loss.target(teacher), torch.full((4, 3), 1 / 3), atol=1e-4, rtol=0)


def test_prototypes_give_cosines():
    torch.manual_seed(0)
    prototypes, rows = Prototypes(4, 6), torch.randn(2, 3, 4) * 100
    expected = torch.nn.functional.cosine_similarity(rows[:, :, None], prototypes.weight[None, None], dim=-1)
    torch.testing.assert_close(prototypes(rows), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prototypes(rows), prototypes(rows.float()))


def test_numbers_that_cannot_be_are_refused():
    for options in (
        {"student_temperature": 0.0},
        {"teacher_temperature": (0.0, 0.1)},
        {"teacher_temperature": (0.1, -1.0)},
        {"warmup": 2.0},
        {"momentum": 1.0},
    ):
        with pytest.raises(InputError):
            SelfDistillation(3, **options)
