"""What a network was trained on, without a name of a subject, a visit or a file."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import yaml

import lssl
from lssl.data.source import DataSource
from lssl.utils.errors import InputError
from lssl.utils.structure import pack

__all__ = ["CHECKPOINT_FORMAT", "check_format", "describe", "record"]

CHECKPOINT_FORMAT = 3  # raised whenever the names of options or weights in a checkpoint change


def describe(data: Any) -> dict[str, Any]:
    """Counts and medians of a datamodule; of one that is no DataSource, the class alone.

    Args:
        data: a datamodule after its setup, or None.
    """
    if not isinstance(data, DataSource):
        return {} if data is None else {"class": type(data).__name__}
    table = data.table
    visits = table[table["split"] == "train"] if "split" in table else table
    ages = pd.to_numeric(visits["age"], errors="coerce") if "age" in visits else pd.Series(dtype=float)
    return {
        "class": type(data).__name__,
        "training_subjects": int(visits["subject"].nunique()),
        "training_visits": len(visits),
        "median_age_years": None if ages.isna().all() else round(float(np.nanmedian(ages)), 1),
        "channels": [str(name) for name in data.channels()],
        "spacing_mm": [round(float(side), 4) for side in data.working_spacing()],
    }


def record(task: Any, number: int) -> dict[str, Any]:
    """What a checkpoint holds in the place of a config, if a Trainer in Python writes it; :func:`lssl.load` reads it.

    Args:
        task: the trained task.
        number: of the checkpoint's format.

    Returns:
        Format, version, data, the few settings that others read, and the task's structure; or, where it cannot be
        pickled, the reason.
    """
    kind, backbone = type(task), task.backbone
    config = {
        "model": {"class_path": f"{kind.__module__}.{kind.__qualname__}"},
        "backbone": {"padding": backbone.padding, "in_channels": backbone.in_channels},
        "views": {"size": list(task.views.size)},
    }
    about = {"format": number, "version": lssl.__version__, "config": yaml.safe_dump(config)}
    try:
        structure: Any = pack(task, (task.optimizer, task.schedule, task.device_mesh))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        structure = str(error)
    return {**about, "data": describe(getattr(task._trainer, "datamodule", None)), "structure": structure}


def check_format(checkpoint: Mapping[str, Any], where: str, resumes: bool = False) -> None:
    """Refuses a checkpoint of ``lssl fit`` in another format, and weights alone where a run shall go on.

    Args:
        checkpoint: content of the checkpoint. A checkpoint of another program passes.
        where: path of the checkpoint, or the option that named it.
        resumes: a run goes on from it.
    """
    if resumes and "optimizer_states" not in checkpoint:
        raise InputError(
            f"{where}: this file holds weights alone, so no run can go on from it; start a new run from its weights, "
            f"--model.init_args.pretrained FILE, or give the checkpoint of a run."
        )
    if "lssl" in checkpoint and (found := checkpoint["lssl"].get("format", 1)) != CHECKPOINT_FORMAT:
        raise InputError(
            f"{where}: the checkpoint has format {found} and this version of lssl reads format {CHECKPOINT_FORMAT}; "
            f"use lssl {checkpoint['lssl'].get('version', 'of its time')} for it, or train again."
        )
