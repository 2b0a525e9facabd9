"""Prepared folders whose visits have fields: batches follow them, and a folder without any says so."""

# ruff: noqa: F811

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import TINY_NET, fit
from test_prepared import make, prepared, setup  # noqa: F401

from lssl.correspondence.matchers import full_view
from lssl.data.fields import VisitField, write_field
from lssl.utils.errors import InputError
from lssl.views import geometry as geo


def with_fields(root: Path) -> Path:
    """The first visits' tissue widens by 5 % about the corner of the frame, the second ones' the other way."""
    make(root, subjects=3)
    table = pd.read_csv(root / "visits.csv")
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = (-54, -44, -34)
    points = np.moveaxis(np.indices((30, 30, 30)), 0, -1) * 4.0 + affine[:3, 3]
    names = []
    for number, image in enumerate(table["image"]):
        factor = 1.05 if number % 2 == 0 else 1 / 1.05
        fields = [np.moveaxis(points * (each - 1), -1, 0) for each in (factor, 1 / factor)]
        names.append(image.replace(".b2nd", "_field.npz"))
        write_field(root / names[-1], VisitField(*fields, affine))
    names[-1] = ""
    table.assign(field=names).to_csv(root / "visits.csv", index=False)
    return root


def test_batches_of_a_folder_with_fields_follow_them(tmp_path, caplog):
    data = setup(with_fields(tmp_path), split=(1.0, 0.0, 0.0), batch_size=3, source_size=24, num_workers=1)
    data.use_motion()
    batch = next(iter(data.train_dataloader()))
    order = batch.subject.argsort()
    for row in order[:2].tolist():
        view = full_view(batch.rows(slice(row, row + 1)), 0)
        points = geo.transform(view.affine, geo.lattice(view.size)[None])
        torch.testing.assert_close(view.follow(points), points / 1.05**2, rtol=0, atol=0.06)  # stored as float16
        assert (view.follow(points) - points).norm(dim=-1).max() > 1
    assert not batch.motion[order[2]].any()


def test_a_folder_without_fields_says_so(prepared, tmp_path):
    with pytest.raises(InputError, match="has no fields between visits; run `lssl prepare --nonrigid`"):
        setup(prepared).use_motion()
    data = setup(with_fields(tmp_path))
    (tmp_path / "visits/sub-1/sub-1_ses-0_field.npz").unlink()
    with pytest.raises(InputError, match=r"sub-1_ses-0_field\.npz does not exist"):
        data.use_motion()


def test_fit_asks_for_the_fields_that_views_follow(prepared, tmp_path, capsys):
    options = ["--views.correspondence=field", "--data.class_path=PreparedDataModule", "--trainer.max_steps=2"]
    root = with_fields(tmp_path / "fields")
    with pytest.raises(SystemExit):
        fit(tmp_path, "demo.yaml", options=[*options, f"--data.init_args.root={prepared}"], backbone=TINY_NET)
    assert "has no fields between visits" in capsys.readouterr().err
    run = fit(tmp_path, "demo.yaml", options=[*options, f"--data.init_args.root={root}"], backbone=TINY_NET)
    assert (run / "checkpoints/last.ckpt").is_file()
