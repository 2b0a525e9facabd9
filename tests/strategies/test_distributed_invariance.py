"""Alice on two processes: centres, loss and gradients are those of one process with the whole batch."""

from __future__ import annotations

from datetime import timedelta
from functools import partial

import pytest
import torch
from test_distributed import averaged, error, part
from torch import Tensor, distributed, multiprocessing, nn

from lssl.networks.backbone import Backbone
from lssl.strategies.anatomical_invariance import DINO, Alignment, AnatomicalInvariance, InfoNCE
from lssl.views.sampler import ViewSampler

RANKS, PAIRS = 2, 4
OBJECTIVES = {"dino": partial(DINO, prototypes=12), "info_nce": InfoNCE}


def results(objective: str, data: tuple, rows: slice) -> dict[str, Tensor]:
    """Loss, gradients and centres after one step on some pairs, whose masks are their own."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 2, stride=2), nn.ReLU(), nn.ConvTranspose3d(4, 2, 2, stride=2))
    options = {"hidden": 16, "projection": 8, "block": 4, "norm": "layer"}
    strategy = AnatomicalInvariance(
        Backbone(network, {"encoder": "0", "decoder": "2"}),
        "encoder",
        "decoder",
        objective=OBJECTIVES[objective],
        alignment=Alignment(heads=2),
        views=ViewSampler(8),
        **options,
    )
    with torch.no_grad():
        for parameter in strategy.teacher.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    masks = strategy.masking.draw(2 * PAIRS, torch.Generator().manual_seed(0), "cpu").unflatten(0, (2, PAIRS))
    strategy.masking.draw = lambda *_: masks[:, rows].flatten(0, 1)
    terms = strategy.terms(*(part(item, rows) for item in data))
    loss = sum(strategy.loss_weights[name] * value for name, value in terms.items())
    loss.backward()
    found = {name: p.grad for name, p in strategy.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **found, **{name: b for name, b in strategy.named_buffers() if "centre" in name}}


def work(own: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=own, world_size=RANKS, timeout=timedelta(seconds=120)
    )
    data = torch.load(f"{folder}/batch.pt", weights_only=False)
    rows = slice(own * PAIRS // RANKS, (own + 1) * PAIRS // RANKS)
    found = {name: results(name, data, rows) for name in OBJECTIVES}
    centres = {key: value.clone() for key, value in found["dino"].items() if "centre" in key}
    torch.save(({name: averaged(value) for name, value in found.items()}, centres), f"{folder}/results{own}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def data(make_batch):
    batch = make_batch(PAIRS, (14, 13, 12))
    return (*ViewSampler(8)(batch, torch.Generator().manual_seed(0)), batch)


@pytest.fixture(scope="module")
def together(data, tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(data, folder / "batch.pt")
    multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"results{own}.pt", weights_only=False) for own in range(RANKS)]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_learn_what_one_learns(objective, data, together):
    """InfoNCE: negatives of both ranks, the pair of none counted twice."""
    expected = results(objective, data, slice(None))
    found = together[0][0][objective]
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-5)
    trained = {name: value for name, value in expected.items() if "centre" not in name}
    assert error(found, trained) < 1e-5


def test_centres_agree_between_one_and_two_processes(data, together):
    expected = {name: value for name, value in results("dino", data, slice(None)).items() if "centre" in name}
    assert len(expected) == 2
    for _, centres in together:
        for name, value in expected.items():
            assert value.abs().max() > 1e-3
            torch.testing.assert_close(centres[name], value, rtol=1e-5, atol=1e-7)
