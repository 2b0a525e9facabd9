"""Rebuilds the network by its plans, without lssl. `python rebuild.py` compares its output with the stored one.

It does what nnU-Net does, and needs dynamic_network_architectures alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from pydoc import locate
from typing import Any

import torch

HERE = Path(__file__).parent
CHECKPOINT = HERE / "fold_all" / "checkpoint_final.pth"


def load() -> Any:
    """The network of ``plans.json`` with the checkpoint's weights."""
    plans = json.loads((HERE / "plans.json").read_text())
    meta = json.loads((HERE / "metadata.json").read_text())
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    options = dict(architecture["arch_kwargs"])
    for name in architecture["_kw_requires_import"]:
        options[name] = options[name] and locate(options[name])
    kind: Any = locate(architecture["network_class_name"])
    if kind is None:
        raise ModuleNotFoundError("no module named dynamic_network_architectures")
    network = kind(input_channels=meta["in_channels"], num_classes=meta["out_channels"], **options)
    network.decoder.deep_supervision = False
    network.load_state_dict(torch.load(CHECKPOINT, weights_only=True)["network_weights"])
    return network.eval()


def compare() -> float:
    """Largest difference to the stored output, as a share of its largest value."""
    sample = torch.load(HERE / "sample.pt", weights_only=True)
    with torch.no_grad():
        output = load()(sample["image"])
    return float((output - sample["answers"]["output"]).abs().max() / sample["answers"]["output"].abs().max())


if __name__ == "__main__":
    print(compare())
