"""What two gloo processes compute, each on its half of a batch, and deliberate mistakes in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
from torch import Tensor, distributed, nn
from whole_batch import draws_of_the_whole_batch

import lssl.losses.aligned_cosine
import lssl.losses.nt_xent
from lssl.data.batch import PairBatch
from lssl.losses import AlignedCosine, DenseInfoNCE, NTXent
from lssl.networks.backbone import Backbone
from lssl.networks.queue import KeyQueue
from lssl.strategies import prior_guided_local
from lssl.strategies.global_contrastive import BYOL, GlobalContrastive, MoCo, SimCLR, VICReg
from lssl.strategies.longitudinal_local import Cosine, InfoNCE, LongitudinalLocal
from lssl.strategies.masked_autoencoder import MaskedAutoencoder
from lssl.strategies.prior_guided_local import PriorGuidedLocal
from lssl.strategy import Strategy
from lssl.utils.distributed import gather, no_sync, rank, weighted_mean, world_size
from lssl.views.sampler import View, ViewSampler

RANKS, PAIRS = 2, 4
SUBJECTS = torch.tensor([0, 1, 2, 0])  # the first and the last pair are of one subject, on different ranks
AGES = torch.tensor([[40.0, 42.0], [50.0, 50.5], [60.0, 66.0], [30.0, float("nan")]])
Views = tuple[View, View, PairBatch]


def common() -> dict:
    network = nn.Sequential(
        nn.Conv3d(1, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv3d(4, 6, 3, stride=2, padding=1)
    )
    return {"backbone": Backbone(network, {"deep": "3"}), "views": ViewSampler(16)}


def global_contrastive(objective: type, **settings) -> GlobalContrastive:
    narrow = {"hidden": 16, "projection": 8, "norm": "layer"}
    if objective is MoCo:
        narrow["queue"] = 16
    strategy = GlobalContrastive(taps=["deep"], objective=partial(objective, **narrow), **settings, **common())
    if objective is MoCo:
        queue = strategy.objective.queue
        queue.keys.normal_()
        # some of the batch; the rest stay empty
        queue.subject_ids[:11] = torch.tensor([7, 0, 1, 8, 2, 0, 9, 7, 1, 6, 5])
    return strategy


PGL_OBJECTIVES = {
    "cosine": prior_guided_local.Cosine,
    "info_nce": partial(prior_guided_local.InfoNCE, exclusion=5.0),
    "vicreg": prior_guided_local.VICReg,
}


def prior_guided(objective: str, **settings) -> PriorGuidedLocal:
    """``samples`` below the lattice's size: voxels are drawn."""
    narrow = {"hidden": 16, "projection": 8, "norm": "layer", "min_points": 8, "samples": 40}
    return PriorGuidedLocal(taps=["deep"], objective=PGL_OBJECTIVES[objective], **{**narrow, **settings}, **common())


def longitudinal(objective: str) -> LongitudinalLocal:
    only = {"loss_weights": {name: float(name == "similarity") for name in LongitudinalLocal.LOSS_WEIGHTS}}
    taps = {"encoder_taps": ["deep"], "decoder_taps": []}
    narrow = {"hidden": 16, "projection": 8, "samples": 16}
    kinds = {"cosine": partial(Cosine, predictor_hidden=6), "info_nce": InfoNCE}
    strategy = LongitudinalLocal(objective=kinds[objective], **taps, **narrow, **only, **common())
    return strategy.eval()  # its heads' batch norm would see half the rows


def masked(**settings) -> MaskedAutoencoder:
    """As many blocks as others have places; they do not fit into the view, so that masks differ in size."""
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv3d(4, 6, 3, padding=1))
    return MaskedAutoencoder(
        Backbone(network, {"deep": "3"}), block=5, mask_ratio=0.5, views=ViewSampler(16), **settings
    )


GLOBAL = (SimCLR, MoCo, BYOL, VICReg)
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    **{kind.__name__: partial(global_contrastive, kind) for kind in GLOBAL},
    **{f"{kind.__name__} by interval": partial(global_contrastive, kind, interval=3.0) for kind in GLOBAL},
    **{f"PGL {kind}": partial(prior_guided, kind) for kind in ("cosine", "info_nce", "vicreg")},
    "PGL all terms": partial(prior_guided, "cosine", loss_weights={"variance": 2.0, "covariance": 2.0}),
    "masked": masked,
    **{f"longitudinal {kind}": partial(longitudinal, kind) for kind in ("cosine", "info_nce")},
}
PGL = [name for name in STRATEGIES if name.startswith("PGL")]
#: Strategy and the batch it sees: in ``air`` the second rank has nothing to compare. test_all_ranks.py has all terms.
CASES = [("SimCLR", "full"), ("PGL vicreg", "full"), *((name, "air") for name in PGL)]


def gradients(name: str, data: Views, rows: slice = slice(None)) -> dict[str, Tensor]:
    """Of the weighted sum of terms; ``rows`` are the pairs of the whole batch that these are."""
    torch.manual_seed(0)
    strategy = STRATEGIES[name]()
    if strategy.teacher is not None:  # else it would start equal to the network
        with torch.no_grad():
            for parameter in strategy.teacher.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    strategy.generator.manual_seed(0)
    with draws_of_the_whole_batch(rows, len(data[0].image), PAIRS):  # each pair's voxels are its own
        terms = strategy.terms(*data)
    loss = torch.stack([strategy.loss_weights.get(term, 1.0) * value for term, value in terms.items()]).sum()
    loss.backward()
    trained = {name: parameter for name, parameter in strategy.named_parameters() if parameter.requires_grad}
    found = {name: parameter.grad for name, parameter in trained.items()}
    return {"loss": loss.detach(), **found}


def part(data: object, rows: slice) -> object:
    """Some pairs of a view or a batch."""
    tensors = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    return type(data)(**{name: None if tensor is None else tensor[rows] for name, tensor in tensors.items()})


def dense_rows() -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    z1, z2 = (torch.randn(PAIRS, 9, 5, generator=draw) for _ in range(2))
    places = 12 * torch.rand(PAIRS, 9, 3, generator=draw, dtype=torch.float64)
    return [z1, z2, places]


WEIGHTS = {"mixed": [1.0, 0.0, 0.5, 2.0], "one rank": [1.0, 0.5, 0.0, 0.0], "none": [0.0, 0.0, 0.0, 0.0]}


def loss_gradients(kind: str, weights: str, rows: slice) -> dict[str, Tensor]:
    """Of a loss on plain rows, with respect to them; beyond ``rows`` they are zero."""
    z1, z2, places = dense_rows()
    z1.requires_grad_()
    weight = torch.tensor(WEIGHTS[weights])[rows]
    if kind == "DenseInfoNCE":
        value = DenseInfoNCE()(z1[rows], z2[rows], places[rows], weight)
    elif kind == "NTXent":
        value = NTXent()(z1[rows, 0], z2[rows, 0], SUBJECTS[rows], weight)
    else:
        value = AlignedCosine()(z1[rows], z2[rows], places[rows, :, 0] > 4, weight)
    value.backward()
    return {"loss": value.detach(), "rows": z1.grad}


LOSS_CASES = [(kind, weights) for kind in ("DenseInfoNCE", "NTXent", "AlignedCosine") for weights in WEIGHTS]


def detached(rows: Tensor) -> Tensor:
    """The common gather: other ranks' rows are constants."""
    parts = [torch.empty(rows.shape, dtype=rows.dtype) for _ in range(world_size())]
    distributed.all_gather(parts, rows.detach().contiguous())
    parts[rank()] = rows
    return torch.cat(parts)


def by_own_weights(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """A mean over what this rank holds."""
    weight = torch.ones_like(values) if weight is None else weight
    return (weight * values).sum() / weight.sum().clamp_min(1e-6)


#: Case, module, name → what it is replaced by.
MISTAKES = {
    "detached gather in SimCLR": (("SimCLR", "full"), lssl.losses.nt_xent, "gather", detached),
    "detached gather in VICReg": (("PGL vicreg", "full"), prior_guided_local, "gather", detached),
    "mean over a rank's own weights": (
        ("PGL cosine", "air"),
        lssl.losses.aligned_cosine,
        "weighted_mean",
        by_own_weights,
    ),
}


@contextmanager
def replaced(module: object, name: str, value: object) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def averaged(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """As distributed training does."""
    for tensor in found.values():
        distributed.all_reduce(tensor)
        tensor /= RANKS
    return found


def work(own: int, folder: str) -> None:
    """What each of the two processes does; rank 0's results and rank 1's are written down."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=own, world_size=RANKS, timeout=timedelta(seconds=120)
    )
    rows = slice(own * PAIRS // RANKS, (own + 1) * PAIRS // RANKS)
    whole = torch.load(f"{folder}/batches.pt", weights_only=False)
    halves = {name: tuple(part(data, rows) for data in views) for name, views in whole.items()}
    results = {case: averaged(gradients(case[0], halves[case[1]], rows)) for case in CASES}
    for name, (case, *mistake) in MISTAKES.items():
        with replaced(*mistake):
            results[name] = averaged(gradients(case[0], halves[case[1]], rows))
    results |= {case: averaged(loss_gradients(*case, rows)) for case in LOSS_CASES}
    results |= {f"gather {name}": gather(value) for name, value in ragged(own).items()}
    results["rank"] = rank(), world_size()
    results["queue"] = queued(own)
    if own == 0:  # the other does not take part: asking it would wait for the time limit
        results["alone"] = by_oneself(rows)
    results["together again"] = gather(torch.tensor([own])), world_size()
    torch.save(results, f"{folder}/results{own}.pt")
    distributed.destroy_process_group()


def ragged(own: int) -> dict[str, Tensor]:
    """Rows of other types and memory layouts."""
    rows = torch.arange(12.0).view(3, 2, 2) + 100 * own
    return {"plain": rows, "transposed": rows.transpose(0, 1), "long": rows.long()[:, 0, 0], "strided": rows[:, :, 1]}


def queued(own: int) -> dict[str, Tensor]:
    """After two pushes of three keys into seven places: the last three, then the first two of the next round."""
    queue = KeyQueue(7, 2)
    for step in range(2):
        numbers = 10 * step + 5 * own + torch.arange(3)
        queue.push(numbers[:, None].float().expand(3, 2), 100 + numbers)
    return queue.state_dict()


def by_oneself(rows: slice) -> dict[str, Tensor]:
    values, weight = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0])
    with no_sync():
        with no_sync():
            pass
        found = {"gather": gather(values), "mean": weighted_mean(values), "weighted": weighted_mean(values, weight)}
        found["size"], found["rank"] = torch.tensor(world_size()), torch.tensor(rank())
        return found | loss_gradients("NTXent", "mixed", rows)
