"""``lssl export``: a network's weights for programs that do not know lssl, verified in a process without lssl."""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lssl
from lssl.prepare.commands import Parser
from lssl.utils.errors import InputError

__all__ = ["export_command", "export_network", "export_parser"]

#: Largest difference of an answer, as a share of its largest value; convolutions may sum in another order.
TOLERANCE = 1e-4
TARGETS = ("monai", "nnunet", "safetensors", "onnx", "lssl")


def export_parser() -> argparse.ArgumentParser:
    """The options of ``lssl export``."""
    parser = Parser(
        prog="lssl export",
        description="Writes a network's weights for programs that do not know lssl; or (--to lssl) a small one for it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder (its best checkpoint, or its last), or a .ckpt")
    add("out", type=Path, metavar="OUT", help="new folder")
    add("--to", choices=TARGETS, default="monai", help="what it is for; default: monai")
    add(
        "--image",
        type=Path,
        help="NIfTI file whose middle is the crop to compare on, which is stored in OUT; default: a procedural head",
    )
    add("--spacing", type=float, nargs=3, metavar=("X", "Y", "Z"), help="mm between voxels, if the checkpoint lacks it")
    add("--license", default="unknown", help="of the weights, as Hugging Face names it: cc-by-4.0, apache-2.0, …")
    add("--python", default=sys.executable, help="Python that rebuilds the network, for example of nnU-Net's own venv")
    return parser


def export_command(args: Sequence[str]) -> None:
    """Runs ``lssl export``.

    Args:
        args: its options.
    """
    chosen = export_parser().parse_args(list(args))
    if "" not in sys.path:
        sys.path.insert(0, "")  # a method or network of one's own, beside the config
    from lssl.checkpoint import checkpoint_of

    difference = export_network(
        checkpoint_of(chosen.run), chosen.out, chosen.to, chosen.image, chosen.spacing, chosen.license, chosen.python
    )
    files = ", ".join(sorted(path.name for path in chosen.out.iterdir()))
    if chosen.to == "lssl":
        print(f"{chosen.out}: {files}.\nRounding the weights changes answers by {difference:.1e} of the largest value.")
        return
    print(
        f"{chosen.out}: {files}.\nRebuilt without lssl, its answers differ by {difference:.1e} of the largest value.\n"
        f"Next: python {chosen.out / 'rebuild.py'}"
    )


def export_network(
    checkpoint: Path,
    out: Path,
    to: str = "monai",
    image: Path | None = None,
    spacing: Sequence[float] | None = None,
    license: str = "unknown",
    python: str = sys.executable,
) -> float:
    """Writes weights, metadata, a model card and the program that rebuilds the network; then runs that program.

    Args:
        checkpoint: of ``lssl fit``.
        out: folder to make; it must be new or empty.
        to: ``monai``, ``nnunet``, ``safetensors``, ``onnx`` or ``lssl``.
        image: NIfTI file whose middle is compared; ``None`` takes a procedural head.
        spacing: mm between voxels; ``None`` takes the checkpoint's.
        license: of the weights.
        python: interpreter that runs the program.

    Returns:
        Largest difference between the rebuilt network's answers and ours, as a share of the largest value of each.
    """
    import torch

    from lssl.checkpoint import load_task, read_checkpoint
    from lssl.export import targets
    from lssl.export.checkpoint import write_small
    from lssl.export.describe import described, model_card

    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise InputError(f"{out} is not empty; name a new folder, so that nothing is mixed.")
    stored = read_checkpoint(checkpoint)
    if "structure" in stored["lssl"]:
        raise InputError(f"{checkpoint} comes from a Trainer in Python, without a config; export runs of lssl fit.")
    task: Any = load_task(checkpoint)
    if not task.exports:
        raise InputError(
            f"{checkpoint} is of a {type(task).__name__}, whose answer needs two visits; export writes networks of one "
            f"image."
        )
    backbone = task.backbone
    meta = described(task, stored, spacing, license)
    backbone.network.to(memory_format=torch.contiguous_format)
    paths = {name: backbone.path_of(name) for name in backbone.taps}
    crop = _crop(task.views.size, backbone.in_channels, image)
    network = targets.Network(backbone.network, task.head if meta["classes"] else None, paths, meta, crop)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        part = Path(folder) / "part"  # becomes OUT if the network can be rebuilt from it
        part.mkdir()
        own = to == "lssl"
        weights, use = write_small(stored, part) if own else targets.TARGETS[to](network, part)
        meta["revision"] = hashlib.sha256((part / weights).read_bytes()).hexdigest()
        (part / "metadata.json").write_text(json.dumps(meta, indent=2) + "\n")
        (part / "README.md").write_text(model_card(meta, checkpoint.resolve().parents[1].name, to, weights, use))
        difference = _loaded(part / weights, network) if own else _verified(part, python)
        part.replace(out)
    return difference


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


def _loaded(file: Path, network: Any) -> float:
    """Largest difference of the answers of a file's own network from a network's, as a share of their largest value."""
    from lssl.checkpoint import load_task
    from lssl.export import targets

    task: Any = load_task(file)
    theirs = targets.Network(task.backbone.network, task.head if network.head else None, {}, network.meta, network.crop)
    before, after = (targets.answers(each)["output"] for each in (network, theirs))
    return float((after - before).abs().max() / before.abs().max())


def _verified(out: Path, python: str) -> float:
    """Runs the program that a user will run, where lssl cannot be imported."""
    blocked = "import sys; sys.modules['lssl'] = None; import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
    try:
        done = subprocess.run([python, "-c", blocked, str(out / "rebuild.py")], capture_output=True, text=True)
    except OSError:
        raise InputError(f"--python: {python} cannot be run.") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        hint = "; give --python of an environment that has it" if "No module named" in reason else ""
        raise InputError(f"Nothing was written: {python} could not rebuild the network without lssl: {reason}{hint}.")
    difference = float(done.stdout.strip().splitlines()[-1])
    if not difference <= TOLERANCE:
        raise InputError(
            f"Nothing was written: the network rebuilt without lssl answers differently (by {difference:.1e} of the "
            f"largest value, more than {TOLERANCE:g}); report this for lssl {lssl.__version__}."
        )
    return difference
