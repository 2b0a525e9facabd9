"""``lssl segment``: label maps, volumes and their change of any scans, by a trained Segmenter, in one command."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from lssl.data.recognise import NIFTI, recognise
from lssl.data.tables import file_table
from lssl.prepare.commands import Parser
from lssl.utils.closing import say_next
from lssl.utils.errors import InputError
from lssl.utils.files import atomic_write

if TYPE_CHECKING:
    from lssl.segmentation.segmenter import Segmenter

__all__ = ["segment_command", "segment_parser"]

DAYS = 365.25
LISTED = "images.csv"
FEW = 4  # visits whose volumes are printed


def segment_parser() -> argparse.ArgumentParser:
    """The options of ``lssl segment``."""
    parser = Parser(
        prog="lssl segment",
        description="Segments scans with a trained Segmenter: label maps on each scan's own grid, volumes, yearly "
        "change, and pictures, as lssl predict does for a cohort.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    data = "NIfTI files; or one BIDS folder, prepared folder or table of visits"
    add("images", type=str, nargs="+", metavar="IMAGE", help=data)
    add("-o", "--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    years = "of each file, if all show one person: age, or time since the first; gives the yearly change"
    add("--years", type=float, nargs="+", metavar="Y", help=years)
    add("--suffix", default="T1w", help="which images of a BIDS folder; default: T1w")
    add("--weights", required=True, metavar="RUN", help="a run or checkpoint of a Segmenter")
    apart = (
        "leave out what does not touch the largest part, such as islands in the scalp; not for a structure in two parts"
    )
    add("--largest", action="store_true", help=apart)
    return parser


def segment_command(args: Sequence[str]) -> None:
    """Runs ``lssl segment``."""
    chosen = segment_parser().parse_args(list(args))
    if chosen.years and len(chosen.years) != len(chosen.images):
        given = f"{len(chosen.images)} images, not {len(chosen.years)}"
        raise InputError(f"--years: give one number for each of the {given}.")
    listed = None
    if len(chosen.images) == 1 and not chosen.years:
        found = recognise(chosen.images[0])
        bids = {"suffix": chosen.suffix} if found.kind == "BIDS" else {}
        source, options = found.class_path, {**found.init_args, **bids}
    else:
        listed = _table(chosen.images, chosen.years)
        source, options = "NiftiDataModule", {"table": str(chosen.out / LISTED)}
    task = _segmenter(chosen.weights)  # before anything is written
    if listed is not None:
        _write(listed, chosen.out)
    volumes = segment_visits(source, options, task, chosen.out, chosen.largest)
    if volumes["image"].nunique() <= FEW:
        table = volumes.pivot(index="structure", columns="image", values="ml").loc[volumes["structure"].unique()]
        print(table.rename_axis(index="ml", columns=None).to_string(float_format="%.1f"))
    say_next(chosen.out)


def _table(images: Sequence[str], years: Sequence[float] | None) -> pd.DataFrame:
    """The table of visits of several files."""
    for name in images:
        if not name.endswith(NIFTI) or not Path(name).is_file():
            kind = "is no NIfTI file" if Path(name).exists() else "does not exist"
            raise InputError(f"{name} {kind}; give several NIfTI files, or one folder or table.")
    table = pd.concat([file_table(Path(name).absolute()) for name in images], ignore_index=True)
    if years:
        table = table.assign(subject=str(table["subject"].iat[0]), days=[DAYS * value for value in years])
        table["session"] = [name if name else f"{year:g}" for name, year in zip(table["session"], years, strict=True)]
    stems = [Path(name).name.partition(".nii")[0] for name in images]
    repeated = table.duplicated(["subject", "session"], keep=False)
    table["session" if years else "subject"] = table["session" if years else "subject"].where(~repeated, stems)
    if table.duplicated(["subject", "session"]).any():
        raise InputError("Two of the images have the same name, so that their results would; give a table of visits.")
    return table[["subject", "session", "image", *(["days"] if years else [])]]


def _write(table: pd.DataFrame, out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(out / LISTED) as part:
            table.to_csv(part, index=False)
    except OSError as error:
        raise InputError(f"Nothing can be written to {out} ({error.strerror}).") from error


def _segmenter(weights: str) -> Segmenter:
    from lssl.checkpoint import load
    from lssl.cli.start import hush
    from lssl.segmentation.segmenter import Segmenter

    hush()
    task = load(weights)
    if not isinstance(task, Segmenter):
        raise InputError(
            f"--weights: {weights} is of a {type(task).__name__}; give a run or checkpoint of a Segmenter."
        )
    return task


def segment_visits(
    source: str, options: dict[str, Any], task: Segmenter, out: Path, largest: bool = False
) -> pd.DataFrame:
    """Segments all visits of a datamodule; writes what :class:`lssl.segmentation.writer.SegmentationWriter` does.

    Args:
        source: name of a datamodule.
        options: of it.
        task: trained.
        out: folder of the results.
        largest: leaves out what does not touch the largest part, as the Segmenter's own option does.

    Returns:
        ``image`` (subject and session), ``structure``, ``ml``.
    """
    import lightning as L

    from lssl.cli.registered import registered

    task.results, task.largest = out, task.largest or largest
    data: Any = next(cls for cls in registered() if cls.__name__ == source)(**options)
    said = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    said.setLevel(logging.WARNING)  # splits and pairs are of training
    trainer = L.Trainer(
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
    )
    try:
        trainer.predict(task, datamodule=data, return_predictions=False)
    finally:
        said.setLevel(logging.INFO)
    if data.excluded:
        print(f"Left out: {'; '.join(data.excluded)}.")
    volumes = pd.read_csv(out / "volumes.csv", dtype={"subject": str, "session": str}, keep_default_na=False)
    image = (volumes["subject"] + " " + volumes["session"]).str.strip()
    return pd.DataFrame({"image": image, "structure": volumes["structure"], "ml": volumes["mm3"].astype(float) / 1000})
