"""What a representation is worth before any label: measured on held-out pairs, without training anything."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor

from lssl import geometry as geo
from lssl.batch import PairBatch
from lssl.distributed import alone
from lssl.metrics import CrossVisitRetrieval, EffectiveRank, PositionR2
from lssl.strategy import Strategy
from lssl.views import View

__all__ = ["evaluate"]


@torch.no_grad()
@alone()
def evaluate(strategy: Strategy, batches: Iterable[PairBatch], most: int | None = None) -> dict[str, float]:
    """Terms, and per tap: retrieval across visits, effective rank, and how readable the place in the crop is.

    Args:
        strategy: evaluated in eval mode, its mode restored.
        batches: held-out pairs; their views and noise are drawn as in validation, the same every time.
        most: number of batches to use.

    Returns:
        ``term/<name>``, ``retrieval/<tap>``, ``rank/<tap>``, ``position/<tap>`` (on images) and ``shortcut/<tap>`` (on
        noise images).
    """
    training = strategy.training
    strategy.eval()
    meters = {name: _TapMeters(tap.channels).to(strategy.device) for name, tap in strategy.backbone.taps.items()}
    terms: dict[str, list[Tensor]] = {}
    for number, batch in enumerate(islice(batches, most)):
        batch = batch.to(strategy.device)
        strategy.seed("val", number)
        first, second = strategy.views(batch, strategy.generator)
        for name, value in strategy.terms(first, second, batch).items():
            terms.setdefault(name, []).append(value)
        for visit, view in enumerate(strategy.views.centred(batch)):
            for name, embedding in strategy.embed(view).items():
                meters[name].retrieval.update(embedding, batch.subject, batch.session[:, visit])
        _add_voxels(strategy, meters, first)
    strategy.train(training)
    result = {f"term/{name}": torch.stack(values).mean() for name, values in terms.items()}
    for kind in ("retrieval", "rank", "position", "shortcut"):
        result |= {f"{kind}/{name}": getattr(meter, kind).compute() for name, meter in meters.items()}
    return {name: value.item() for name, value in result.items()}


class _TapMeters(torch.nn.Module):
    """The metrics of one tap."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        alone = {"sync_on_compute": False}  # one process evaluates; asking the others would wait forever
        self.retrieval = CrossVisitRetrieval(**alone)
        self.rank = EffectiveRank(channels, **alone)
        self.position = PositionR2(channels, **alone)
        self.shortcut = PositionR2(channels, **alone)


def _add_voxels(strategy: Strategy, meters: dict[str, _TapMeters], view: View, most: int = 512) -> None:
    """Ranks on the view's foreground; places on images and on noise of the same mean and deviation."""
    seed = int(torch.randint(2**62, (1,), generator=strategy.generator))
    generator = torch.Generator(view.image.device).manual_seed(seed)
    noise = torch.randn(view.image.shape, device=view.image.device, generator=generator)
    noise = view.image.mean() + view.image.std() * noise
    names = list(strategy.backbone.taps)
    on_image, on_noise = (strategy.backbone(image, names) for image in (view.image, noise))
    for name in names:
        size = on_image[name].shape[2:]
        count = min(most, size.numel())
        index = torch.rand(size.numel(), generator=strategy.generator).topk(count).indices.to(view.image.device)
        places = geo.lattice(size, view.image.device)[index]
        inside = torch.nn.functional.adaptive_avg_pool3d(view.foreground, size).flatten(1)[:, index] > 0.5
        for sample, (image_rows, noise_rows) in enumerate(zip(on_image[name], on_noise[name], strict=True)):
            image_rows, noise_rows = (rows.flatten(1).T[index].float() for rows in (image_rows, noise_rows))
            meters[name].rank.update(image_rows[inside[sample]])
            meters[name].position.update(image_rows, places)
            meters[name].shortcut.update(noise_rows, places)
