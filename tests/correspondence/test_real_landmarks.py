"""Real longitudinal FLAIR: places are found again in the other visit, which a known random affine has displaced."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lssl import Backbone, ViewSampler
from lssl.correspondence.landmarks import landmark_errors, one_pair_per_subject
from lssl.correspondence.matchers import EmbeddingMatcher
from lssl.data.batch import Visit, collate
from lssl.datamodules.nifti import NiftiDataModule
from lssl.strategies.anatomical_embedding import AnatomicalEmbedding, CoarseMap, FineMap
from lssl.views import geometry as geo

REAL = Path(os.environ.get("LSSL_REAL_DATA", Path(__file__).parents[2] / "../shared/data"))
STEPS = 150


def halved(visit: Visit) -> Visit:
    """At twice the voxel size, 3 mm."""
    step = geo.translation(torch.full((3,), 0.5).double()) @ geo.scaling(torch.full((3,), 2.0).double())
    return dataclasses.replace(
        visit,
        image=F.avg_pool3d(visit.image, 2),
        affine=visit.affine @ step,
        foreground=F.avg_pool3d(visit.foreground[None].float(), 2)[0] > 0.5,
        label=None,
    )


def network() -> Backbone:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 16, 2), (16, 24, 1), (24, 32, 2), (32, 48, 2), (48, 48, 1)):
        layers += [nn.Conv3d(before, after, 3, stride, 1, bias=False), nn.BatchNorm3d(after), nn.ReLU()]
    return Backbone(nn.Sequential(*layers), {"fine": "3", "deep": "12"})


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "mri").is_dir(), reason=f"no real MRI in {REAL}; set LSSL_REAL_DATA")
def test_places_are_found_again_in_subjects_never_seen():
    data = NiftiDataModule(root=str(REAL / "mri"), suffix="FLAIR", source_size=None, num_workers=0)
    data.setup()
    visits: dict[str, list[Visit]] = {}
    for row, subject in enumerate(data.table["subject"]):
        visit = dataclasses.replace(halved(data.read(row)), subject=len(visits), session=row)
        visits.setdefault(subject, []).append(visit)
    seen = [(one[0], one[0]) for one in visits.values() if len(one) == 1]
    unseen = [tuple(both) for both in visits.values() if len(both) == 2]
    seen = [tuple(dataclasses.replace(v, subject=n) for v in pair) for n, pair in enumerate(seen)]
    unseen = [tuple(dataclasses.replace(v, subject=n) for v in pair) for n, pair in enumerate(unseen)]
    assert len(seen) >= 4
    assert len(unseen) == 3
    strategy = AnatomicalEmbedding(
        network(),
        FineMap("fine", 48, 500, 128, 10.0),
        CoarseMap("deep", 48, 128, 64, 24.0, 200),
        views=ViewSampler(48, overlap=0.4, rotation=15.0, affine_probability=0.8),
        hidden=64,
        temperature=0.1,
    )
    held_out = one_pair_per_subject([collate(unseen)], 3)
    untrained = landmark_errors(EmbeddingMatcher(strategy), held_out, None)
    optimizer = torch.optim.AdamW([p for p in strategy.parameters() if p.requires_grad], 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS)
    strategy.train()
    for step in range(STEPS):
        strategy.generator.manual_seed(step)
        chosen = torch.randperm(len(seen), generator=strategy.generator)[:3].tolist()
        batch = collate([seen[number] for number in chosen])
        optimizer.zero_grad()
        torch.stack(list(strategy.terms(*strategy.views(batch, strategy.generator), batch).values())).sum().backward()
        optimizer.step()
        schedule.step()
    trained = landmark_errors(EmbeddingMatcher(strategy), held_out, None)
    print(untrained, trained)
    assert trained["visits/median"] < 0.5 * untrained["visits/median"]
    assert trained["visits/median"] < 4 * trained["voxel"]
    assert trained["visits/kept"] > untrained["visits/kept"]
