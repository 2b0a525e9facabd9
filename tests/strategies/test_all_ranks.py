"""Every term of every strategy, and the Segmenter's, on two and on four processes is that of one with the whole batch.

Four gloo processes run all cases once: all of them, then two of them. Each writes down, for every term by itself, its
value and its gradient, averaged over the ranks as distributed training does; the tests compare them with one process.
Batch norm is left out: its statistics are those of a rank's own rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from importlib.metadata import entry_points
from math import nan

import pytest
import torch
from test_distributed import part
from torch import Tensor, distributed, multiprocessing, nn
from whole_batch import draws_of_the_whole_batch

from lssl.networks.backbone import Backbone
from lssl.segmentation.classes import Classes
from lssl.segmentation.segmenter import Segmenter
from lssl.strategies import anatomical_invariance, longitudinal_local, prior_guided_local
from lssl.strategies.anatomical_embedding import AnatomicalEmbedding, CoarseMap, FineMap
from lssl.strategies.anatomical_invariance import Alignment, AnatomicalInvariance
from lssl.strategies.global_contrastive import BYOL, GlobalContrastive, MoCo, SimCLR, VICReg
from lssl.strategies.label_contrast import LabelContrast
from lssl.strategies.latent_direction import LatentDirection
from lssl.strategies.longitudinal_local import LongitudinalLocal
from lssl.strategies.masked_autoencoder import MaskedAutoencoder
from lssl.strategies.neighbourhood_embedding import NeighbourhoodEmbedding
from lssl.strategies.prior_guided_local import PriorGuidedLocal
from lssl.strategies.siamese_masked_autoencoder import SiameseMaskedAutoencoder
from lssl.strategies.temporal_order import TemporalOrder
from lssl.strategies.trajectory_order import TrajectoryOrder
from lssl.strategies.trajectory_prediction import TrajectoryPrediction
from lssl.strategy import Strategy
from lssl.task import Task
from lssl.timed_strategy import SeriesStrategy
from lssl.views.sampler import View, ViewSampler

PAIRS, SIZE, EVERY = 4, 16, 10**6  # EVERY: more than there are, so that all are taken
SUBJECTS = torch.tensor([0, 1, 2, 0])  # the first and the last pair are of one subject, on different ranks
HEADS = {"hidden": 16, "projection": 8, "norm": "layer"}


class Network(nn.Module):
    """Two levels and a skip connection, without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv3d(1, 4, 2, stride=2), nn.GroupNorm(2, 4), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv3d(4, 6, 2, stride=2), nn.GroupNorm(2, 6), nn.ReLU())
        self.up = nn.ConvTranspose3d(6, 4, 2, stride=2)
        self.decoder = nn.Sequential(nn.Conv3d(8, 4, 1), nn.ReLU())
        self.out = nn.ConvTranspose3d(4, 3, 2, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        skip = self.encoder(image)
        return self.out(self.decoder(torch.cat([skip, self.up(self.deep(skip))], 1)))


def common() -> dict:
    taps = {"encoder": "encoder", "deep": "deep", "decoder": "decoder"}
    return {"backbone": Backbone(Network(), taps), "views": ViewSampler(SIZE)}


def longitudinal(objective: Callable, orthogonality: str) -> LongitudinalLocal:
    """In evaluation mode, as its heads have batch norm."""
    taps = {"encoder_taps": ["encoder"], "decoder_taps": ["decoder"], "orthogonal_taps": ("encoder", "decoder")}
    narrow = {"samples": 40, "hidden": 16, "projection": 8}
    return LongitudinalLocal(objective=objective, orthogonality=orthogonality, **taps, **narrow, **common()).eval()


def embedding() -> AnatomicalEmbedding:
    fine = FineMap("decoder", anchors=20, hard=EVERY, diverse=EVERY, exclusion=3.0)
    coarse = CoarseMap("deep", anchors=9, hard=EVERY, diverse=EVERY, exclusion=6.0, cross_subject_negatives=EVERY)
    return AnatomicalEmbedding(fine=fine, coarse=coarse, hidden=16, embedding=8, norm="layer", **common())


def invariance(objective: Callable) -> AnatomicalInvariance:
    """Blocks of 5 do not fit into the view, so that masks differ in size."""
    return AnatomicalInvariance(
        encoder="deep",
        decoder="decoder",
        objective=objective,
        alignment=Alignment(heads=2),
        block=5,
        **HEADS,
        **common(),
    )


def contrastive(objective: Callable, **options) -> GlobalContrastive:
    task = GlobalContrastive(taps=["deep"], objective=partial(objective, **HEADS, **options), interval=3.0, **common())
    if objective is MoCo:
        task.objective.queue.keys.normal_()
        task.objective.queue.subject_ids[:] = torch.arange(16) % 5 - 1  # -1: empty
    return task


def segmenter() -> Segmenter:
    task = Segmenter(**common())
    task.build(
        Classes(("a", "b"), ((1, 2), (3,)), open=True), torch.ones(3), torch.arange(3), torch.tensor([1, 2, 5.0])
    )
    return task


def prior_guided(objective: Callable) -> PriorGuidedLocal:
    weights = {"variance": 2.0, "covariance": 2.0}
    return PriorGuidedLocal(
        taps=["deep", "decoder"],
        objective=objective,
        min_points=4,
        samples=40,
        loss_weights=weights,
        **HEADS,
        **common(),
    )


def siamese() -> SiameseMaskedAutoencoder:
    """Without a bound, so that the divergence of untrained networks, which is small, has a gradient."""
    narrow = {"width": 12, "depth": 1, "heads": 2, "variables": 3, "categories": 4, "free": 0.0}
    return SiameseMaskedAutoencoder(tap="deep", block=5, mask_ratio=0.5, **narrow, **common())


def label_contrast() -> LabelContrast:
    """In evaluation mode, as its heads have batch norm."""
    return LabelContrast(taps=["encoder", "decoder"], samples=40, hidden=16, projection=8, **common()).eval()


TASKS: dict[str, Callable[[], Task]] = {
    "LongitudinalLocal": partial(longitudinal, longitudinal_local.Cosine, "projected"),
    "LongitudinalLocal InfoNCE": partial(longitudinal, longitudinal_local.InfoNCE, "raw"),
    "PriorGuidedLocal": partial(prior_guided, prior_guided_local.Cosine),
    "PriorGuidedLocal InfoNCE": partial(prior_guided, partial(prior_guided_local.InfoNCE, exclusion=5.0)),
    "PriorGuidedLocal VICReg": partial(prior_guided, prior_guided_local.VICReg),
    "AnatomicalEmbedding": embedding,
    "AnatomicalInvariance": partial(invariance, partial(anatomical_invariance.DINO, prototypes=12)),
    "AnatomicalInvariance InfoNCE": partial(invariance, anatomical_invariance.InfoNCE),
    "GlobalContrastive SimCLR": partial(contrastive, SimCLR),
    "GlobalContrastive MoCo": partial(contrastive, MoCo, queue=16),
    "GlobalContrastive BYOL": partial(contrastive, BYOL),
    "GlobalContrastive VICReg": partial(contrastive, VICReg),
    "LabelContrast": label_contrast,
    "MaskedAutoencoder": lambda: MaskedAutoencoder(block=5, mask_ratio=0.5, **common()),
    "TemporalOrder": lambda: TemporalOrder(tap="deep", hidden=16, **common()),
    "TrajectoryOrder": lambda: TrajectoryOrder(tap="deep", width=8, depth=1, heads=2, **HEADS, **common()),
    "LatentDirection": lambda: LatentDirection(tap="deep", latent=8, hidden=8, **common()),
    "NeighbourhoodEmbedding": lambda: NeighbourhoodEmbedding(tap="deep", latent=8, hidden=8, neighbours=2, **common()),
    "TrajectoryPrediction": lambda: TrajectoryPrediction(tap="deep", **HEADS, **common()),
    "SiameseMaskedAutoencoder": siamese,
    "Segmenter": segmenter,
}
BATCHES = ("full", "uneven", "nothing")
Views = tuple[View, View, object]


def terms_of(task: Task, data: list) -> dict[str, Tensor]:
    """Of a series, with a third view that is the first one mirrored, a year before the second."""
    if isinstance(task, Segmenter):
        return task.terms(*data[:2])
    if isinstance(task, SeriesStrategy):
        first, second, batch = data
        third = dataclasses.replace(first, image=first.image.flip(2), time=second.time - 1)
        return task.series_terms((first, second, third), batch)
    return task.terms(*data)


def results(name: str, data: Views, rows: slice) -> dict[str, Tensor]:
    """Each term's value and gradient, and the buffers afterwards (queues, centres)."""
    torch.manual_seed(0)
    task = TASKS[name]()
    # Every term counts, whatever its default weight.
    task.loss_weights = dict.fromkeys(task.loss_weights, 1.0)
    if isinstance(task, Strategy) and task.teacher is not None:  # else it would start equal to the network
        for parameter in task.teacher.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    task.generator.manual_seed(0)
    own = [part(item, rows) for item in data]
    with draws_of_the_whole_batch(rows, len(own[0].image), PAIRS):
        terms = terms_of(task, own)
    trained = {key: value for key, value in task.named_parameters() if value.requires_grad}
    found = {}
    for term, value in terms.items():
        gradients = torch.autograd.grad(value, list(trained.values()), retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, trained.values(), strict=True)]
        found[f"value/{term}"] = value.detach()
        found[f"gradient/{term}"] = torch.cat([gradient.flatten() for gradient in flat])
    if isinstance(task, Strategy):
        task.on_step_end(0.5)
    for key, value in task.named_buffers():
        if "centre" in key:
            found[f"buffer/{key}"] = value.clone()
        elif key.endswith("queue.keys"):  # ranks queue both views of their pairs, one process all first views first
            found[f"buffer/{key}"] = value[value[:, 0].argsort()]
    return found


def work(own: int, folder: str) -> None:
    """All cases on four ranks, then on two."""
    torch.set_num_threads(1)
    data = torch.load(f"{folder}/batches.pt", weights_only=False)
    for ranks in (4, 2):
        if own >= ranks:
            return
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meeting{ranks}",
            rank=own,
            world_size=ranks,
            timeout=timedelta(seconds=300),
        )
        rows = slice(own * PAIRS // ranks, (own + 1) * PAIRS // ranks)
        found = {(name, kind): results(name, data[kind], rows) for name in TASKS for kind in BATCHES}
        for values in found.values():
            for value in values.values():
                distributed.all_reduce(value)
                value /= ranks
        if own == 0:
            torch.save(found, f"{folder}/ranks{ranks}.pt")
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def batches(make_batch) -> dict[str, Views]:
    """Four pairs; ``uneven``: they share more and less; ``nothing``: two share no place, label or time."""
    batch = dataclasses.replace(make_batch(PAIRS, labels=True), subject=SUBJECTS)
    first, second = ViewSampler(SIZE)(batch, torch.Generator().manual_seed(0))
    moved = {}
    for kind, shift in (("uneven", (0.0, 3.0, 6.0, 9.0)), ("nothing", (0.0, 3.0, 1000.0, 1000.0))):
        affine = second.affine.clone()
        affine[:, 0, 3] += torch.tensor(shift)
        time = torch.tensor([2.0, 0.5, nan, -3.0] if kind == "uneven" else [2.0, -0.5, nan, 0.0])
        moved[kind] = dataclasses.replace(second, affine=affine, time=time)
    unlabelled = first.source_label.clone()
    unlabelled[2:] = -1
    nothing = (dataclasses.replace(view, source_label=unlabelled) for view in (first, moved["nothing"]))
    return {"full": (first, second, batch), "uneven": (first, moved["uneven"], batch), "nothing": (*nothing, batch)}


@pytest.fixture(scope="module")
def together(batches, tmp_path_factory) -> dict[int, dict]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(batches, folder / "batches.pt")
    multiprocessing.start_processes(work, (str(folder),), nprocs=4, start_method="fork")  # imports take longest
    return {ranks: torch.load(folder / f"ranks{ranks}.pt", weights_only=False) for ranks in (2, 4)}


@pytest.fixture(scope="module")
def alone(batches) -> dict:
    return {(name, kind): results(name, batches[kind], slice(None)) for name in TASKS for kind in BATCHES}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", TASKS)
def test_every_term_is_that_of_the_whole_batch(name, kind, ranks, alone, together):
    expected, found = alone[name, kind], together[ranks][name, kind]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        scale = value.norm().clamp_min(1e-6)
        assert ((found[key] - value).norm() / scale).item() < 1e-5, (key, found[key].norm(), value.norm())


def test_every_registered_strategy_and_every_term_is_compared(alone):
    compared: dict[str, set[str]] = {}
    for (name, _), found in alone.items():
        terms = {
            key.removeprefix("gradient/") for key, value in found.items() if key.startswith("gradient") and value.any()
        }
        compared.setdefault(name.split()[0], set()).update(terms)
    wanted = {point.name: point.load().LOSS_WEIGHTS for point in entry_points(group="lssl.strategies")}
    wanted["Segmenter"] = Segmenter.LOSS_WEIGHTS
    for name, terms in wanted.items():
        assert compared.get(name, set()) >= {*terms}, f"list {name} in TASKS, with all of its terms"
    assert compared["GlobalContrastive"] >= {"similarity", "variance", "covariance"}
