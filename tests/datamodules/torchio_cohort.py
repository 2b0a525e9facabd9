"""A cohort as a TorchIO SubjectsDataset, in a module of its own as users write it."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pandas as pd
import torchio as tio

SIDE = 40
FLIPPED = np.diag([-2.0, -2.0, 2.0, 1.0])  # LPS: the first two axes run to the left and to the back
FLIPPED[:3, 3] = 31, 47, -5
COHORT = f"""
import numpy as np
import torch
import torchio as tio

SIDE = {SIDE}
BALL = np.linalg.norm(np.mgrid[:SIDE, :SIDE, :SIDE] - 19.5, axis=0) < 15


def voxels(person, session):
    drawn = np.random.default_rng([person, session]).random((10, 10, 10))
    blocks = drawn.repeat(4, 0).repeat(4, 1).repeat(4, 2)
    return (100 * BALL * (1 + blocks)).astype(np.float32)[None], (BALL * (1 + (blocks > 0.5))).astype(np.int16)[None]


def visit(person, session, affine=None):
    affine = np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine
    image, label = voxels(person, session)
    return tio.Subject(
        t1=tio.ScalarImage(tensor=torch.from_numpy(image), affine=affine),
        seg=tio.LabelMap(tensor=torch.from_numpy(label), affine=affine),
        subject_id=f"sub-{{person}}",
        session=session,
        age=60.0 + person + 1.5 * session,
    )


def cohort(persons: int = 4, **options) -> tio.SubjectsDataset:
    return tio.SubjectsDataset([visit(person, session, **options) for person in range(persons) for session in (0, 1)])
"""
scope: dict = {}
exec(COHORT, scope)
cohort, visit = scope["cohort"], scope["visit"]


def on_disk(folder, affine):
    """The same cohort as files: a table for lssl, and a dataset of TorchIO."""
    rows, subjects = [], []
    for one in cohort(affine=affine).dry_iter():
        paths = {name: folder / f"{one['subject_id']}_{one['session']}_{name}.nii.gz" for name in ("t1", "seg")}
        for name, path in paths.items():
            nib.save(nib.Nifti1Image(one[name].data[0].numpy(), affine), path)
        facts = {name: one[name] for name in ("subject_id", "session", "age")}
        rows.append((*facts.values(), paths["t1"].name, paths["seg"].name))
        subjects.append(tio.Subject(t1=tio.ScalarImage(paths["t1"]), seg=tio.LabelMap(paths["seg"]), **facts))
    table = pd.DataFrame(rows, columns=["subject", "session", "age", "image", "label"])
    table.to_csv(folder / "visits.csv", index=False)
    return folder / "visits.csv", tio.SubjectsDataset(subjects)
