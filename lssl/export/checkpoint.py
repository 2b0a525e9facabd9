"""A small checkpoint for lssl itself: weights in half precision, and what rebuilds the network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lssl.utils.errors import InputError
from lssl.utils.torch_file import write_torch

__all__ = ["small", "write_small"]

_OF_TRAINING = ("callbacks", "exact_resume", "loops", "lr_schedulers", "optimizer_states", "since_log")
_KEPT = ("backbone", "model", "views")  # groups of the config
USE = (
    "`lssl.load(FILE)` and `lssl.load_backbone(FILE)` take the file, as do `--model.init_args.pretrained FILE` of a "
    "fine-tuning and, of a Segmenter, `lssl segment --weights FILE`. Training cannot be resumed from it."
)


def small(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What of a checkpoint is needed to use its network; kernels are rounded to half precision.

    Vectors (biases, norms, label values) stay as they are: they are few, and statistics may exceed half precision's
    range. No path is kept.

    Args:
        stored: checkpoint of ``lssl fit``.
    """
    kept = {name: value for name, value in stored.items() if name not in _OF_TRAINING}
    kept["state_dict"] = {name: _halved(value) for name, value in stored["state_dict"].items()}
    config = yaml.safe_load(stored["lssl"]["config"])
    chosen = {name: config[name] for name in _KEPT}
    options = chosen["model"].get("init_args") or {}
    chosen["model"] = {
        **chosen["model"],
        "init_args": {**options, **({"pretrained": None} if "pretrained" in options else {})},
    }
    kept["lssl"] = {**stored["lssl"], "config": yaml.safe_dump(chosen, sort_keys=False), "job": ""}
    return kept


def write_small(stored: Mapping[str, Any], out: Path) -> tuple[str, str]:
    """Writes ``weights.ckpt``.

    Returns:
        The file with the weights, and how it is used.
    """
    content = small(stored)
    wrong = [name for name, value in content["state_dict"].items() if not value.isfinite().all()]
    if wrong:
        raise InputError(f"{wrong[0]} holds values that half precision cannot hold; export for safetensors instead.")
    write_torch(out / "weights.ckpt", content)
    return "weights.ckpt", USE


def _halved(value: Tensor) -> Tensor:
    return value.half() if value.dtype == torch.float32 and value.ndim > 1 else value
