"""``lssl export``: a network's weights for programs that do not know lssl, verified in a process without lssl."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lssl
from lssl.prepare.commands import Parser
from lssl.utils.errors import InputError

__all__ = ["export_command", "export_network"]

TOLERANCE = (
    1e-4  # largest difference of an output, as a share of its largest value; convolutions may sum in another order
)
REBUILD = '''\
"""Rebuilds the network; needs torch and MONAI alone. `python rebuild.py` compares it with the stored output."""

import json
from pathlib import Path

import torch
from monai.networks import nets

HERE = Path(__file__).parent


def load() -> torch.nn.Module:
    meta = json.loads((HERE / "metadata.json").read_text())
    network = getattr(nets, meta["network"]["class"])(**meta["network"]["arguments"])
    network.load_state_dict(torch.load(HERE / "network.pt", weights_only=True))
    for module in network.modules():  # how borders are padded is no weight
        padded = isinstance(module, torch.nn.Conv3d) and any(n != 0 for n in module.padding)
        module.padding_mode = meta["padding"] if padded else getattr(module, "padding_mode", "zeros")
    if (HERE / "head.pt").exists():  # classes are read off the network's output
        weights = torch.load(HERE / "head.pt", weights_only=True)
        head = torch.nn.Conv3d(weights["weight"].shape[1], weights["weight"].shape[0], 1)
        head.load_state_dict(weights)
        network = torch.nn.Sequential(network, head)
    return network.eval()


if __name__ == "__main__":
    sample = torch.load(HERE / "sample.pt", weights_only=True)
    with torch.no_grad():
        output = load()(sample["image"])
    print(float((output - sample["output"]).abs().max() / sample["output"].abs().max()))
'''
CARD = """\
---
library_name: monai
tags: [medical-imaging, mri, longitudinal, self-supervised, 3d]
license: other
---
# {name}

A {network} of {parameters:,} parameters, trained with {model} by lssl {version} for {steps} steps.

| | |
|---|---|
| input | {channels} channel(s), `(B, C, D, H, W)`, axes closest to RAS+; sides {size} in training |
| intensities | background 0, the 99.9th percentile of the foreground 1 |
| voxels | {spacing} |
| output | {output} |
| weights | `network.pt`, SHA-256 {revision} |

`python rebuild.py` rebuilds the network with torch and MONAI alone and compares its output with the stored one.
`rebuild.load()` gives the network. The padding of its convolutions is `{padding}`; a state_dict does not hold that, and
a network with another padding loads the weights and answers differently.

Not a medical device. State a licence that your training data allow before you pass the weights on.
"""


def export_command(args: Sequence[str]) -> None:
    """Runs ``lssl export``.

    Args:
        args: its options.
    """
    parser = Parser(prog="lssl export", description="Writes a network's weights for programs that do not know lssl.")
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="run folder (its best checkpoint, or its last), or a .ckpt"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder")
    parser.add_argument("--to", choices=["monai"], default="monai", help="what it is for: a MONAI network")
    parser.add_argument(
        "--image", type=Path, help="NIfTI file whose middle is the crop to compare on; default: a phantom"
    )
    chosen: argparse.Namespace = parser.parse_args(list(args))
    difference = export_network(checkpoint_of(chosen.run), chosen.out, chosen.image)
    print(
        f"{chosen.out}: network.pt, metadata.json, README.md, rebuild.py; rebuilt without lssl, its output differs by "
        f"{difference:.1e} of the largest value.\nNext: python {chosen.out / 'rebuild.py'}"
    )


def checkpoint_of(run: Path) -> Path:
    """The file itself, or the best or last checkpoint of a run folder."""
    if run.is_file():
        return run
    for name in ("best", "last"):
        if (path := run / "checkpoints" / f"{name}.ckpt").is_file():
            return path
    raise InputError(f"{run} is neither a checkpoint nor a run folder with one in checkpoints/.")


def export_network(checkpoint: Path, out: Path, image: Path | None = None) -> float:
    """Writes weights, metadata, a model card and the program that rebuilds the network; then runs that program.

    Args:
        checkpoint: of ``lssl fit``.
        out: folder to make; it must be new or empty.
        image: NIfTI file whose middle is compared; ``None`` takes a procedural head.

    Returns:
        Largest difference between the rebuilt network's output and ours, as a share of the largest value.
    """
    import torch

    from lssl.checkpoint import load_task, read_checkpoint

    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; name a new folder, so that nothing is mixed.")
    task: Any = load_task(checkpoint)
    stored = read_checkpoint(checkpoint)
    network = task.backbone.network
    described = _described(task, stored)
    head = task.head if "classes" in stored else None
    out.mkdir(parents=True, exist_ok=True)
    torch.save({name: value.contiguous() for name, value in network.state_dict().items()}, out / "network.pt")
    if head is not None:
        torch.save(head.state_dict(), out / "head.pt")
    crop = _crop(task.views.size, task.backbone.in_channels, image)
    with torch.no_grad():
        output = network(crop) if head is None else head(network(crop))
    torch.save({"image": crop, "output": output}, out / "sample.pt")
    described["revision"] = hashlib.sha256((out / "network.pt").read_bytes()).hexdigest()
    (out / "metadata.json").write_text(json.dumps(described, indent=2) + "\n")
    (out / "rebuild.py").write_text(REBUILD)
    (out / "README.md").write_text(_card(described, checkpoint))
    return _verified(out)


def _described(task: Any, stored: dict[str, Any]) -> dict[str, Any]:
    """What the weights alone do not say."""
    import yaml

    config = yaml.safe_load(stored["lssl"]["config"])
    backbone = task.backbone
    kind, arguments = _constructor(config["backbone"].get("network"), backbone.in_channels)
    classes = stored.get("classes") or {}
    spacing = task.spacing if classes else None
    return {
        "network": {"class": kind, "arguments": arguments},
        "padding": backbone.padding,
        "in_channels": backbone.in_channels,
        "taps": {name: {"path": backbone.path_of(name), "stride": tap.stride} for name, tap in backbone.taps.items()},
        "normalisation": "background 0, 99.9th percentile of the foreground 1",
        "spacing_mm": None if spacing is None else [round(float(side), 4) for side in spacing],
        "view_size": list(task.views.size),
        "classes": dict(zip(classes.get("names", ()), map(list, classes.get("values", ())), strict=True)),
        "parameters": sum(parameter.numel() for parameter in backbone.network.parameters()),
        "model": config["model"]["class_path"].rpartition(".")[2],
        "steps": int(stored["global_step"]),
        "lssl": stored["lssl"]["version"],
        "licence": None,
    }


def _constructor(network: dict[str, Any] | None, in_channels: int) -> tuple[str, dict[str, Any]]:
    """MONAI's class and all arguments that differ from its defaults."""
    from lssl.networks.backbone import unet

    path = "lssl.networks.backbone.unet" if network is None else network["class_path"]
    given = {key: value for key, value in ((network or {}).get("init_args") or {}).items() if value is not None}
    if path == "lssl.networks.backbone.unet":
        options = {name: parameter.default for name, parameter in inspect.signature(unet).parameters.items()}
        options |= {"in_channels": in_channels, **given}
        norm = options["norm"]
        kind = ["group", {"num_groups": 8}] if norm == "group" else [norm, {"affine": True}]
        return "BasicUNet", {
            "spatial_dims": 3,
            "in_channels": options["in_channels"],
            "out_channels": options["out_channels"],
            "features": list(options["features"]),
            "act": "relu",
            "norm": kind,
            "bias": norm != "batch",
        }
    if not path.startswith("monai.networks.nets."):
        raise InputError(f"backbone.network: {path} is no network of MONAI, so that MONAI could not rebuild it.")
    return path.rpartition(".")[2], given


def _crop(size: Sequence[int], channels: int, image: Path | None) -> Any:
    """``(1, C, D, H, W)``, the middle of an image or of a procedural head."""
    import torch

    if image is None:
        from lssl.synthetic.phantom_image import scan

        volume = scan(0, 0, 0, 0.0, (max(64, size[0]), max(64, size[1]), max(64, size[2])), 3.0).image
    else:
        from lssl.data.nifti import automatic_foreground, read_image, scale

        voxels, _ = read_image(str(image))
        volume = torch.from_numpy(scale(voxels, automatic_foreground(voxels)))
    starts = [(have - want) // 2 for have, want in zip(volume.shape, size, strict=True)]
    if min(starts) < 0:
        raise InputError(f"{image} is smaller than the network's views of {'×'.join(map(str, size))} voxels.")
    d, h, w = (slice(start, start + want) for start, want in zip(starts, size, strict=True))
    return volume[d, h, w].float()[None, None].repeat(1, channels, 1, 1, 1)


def _card(described: dict[str, Any], checkpoint: Path) -> str:
    classes = ", ".join(["background", *described["classes"]])
    spacing = described["spacing_mm"]
    return CARD.format(
        name=checkpoint.resolve().parents[1].name,
        network=f"MONAI {described['network']['class']}",
        parameters=described["parameters"],
        model=described["model"],
        version=described["lssl"],
        steps=described["steps"],
        channels=described["in_channels"],
        size="×".join(map(str, described["view_size"])),
        spacing="those of the training data"
        if spacing is None
        else " × ".join(f"{side:g}" for side in spacing) + " mm",
        output=f"logits of {classes}" if described["classes"] else "a feature map; `metadata.json` names the others",
        revision=described["revision"][:16],
        padding=described["padding"],
    )


def _verified(out: Path) -> float:
    """Runs the program that a user will run, where lssl cannot be imported."""
    blocked = "import sys; sys.modules['lssl'] = None; import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", blocked, str(out / "rebuild.py")], capture_output=True, text=True, env={**os.environ}
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise InputError(f"{out} was written, but the network could not be rebuilt from it without lssl: {reason}")
    difference = float(done.stdout.strip().splitlines()[-1])
    if not difference <= TOLERANCE:
        raise InputError(
            f"{out} was written, but the network rebuilt from it answers differently (by {difference:.1e} of the "
            f"largest value, more than {TOLERANCE:g}); do not use it, and report this for lssl {lssl.__version__}."
        )
    return difference
