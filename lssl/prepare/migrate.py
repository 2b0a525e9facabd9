"""``lssl import``: data sets of other programs become a table of visits that every command reads."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lssl.data.pairs import count
from lssl.prepare.commands import Parser
from lssl.utils.closing import say_next
from lssl.utils.errors import InputError
from lssl.utils.files import atomic_write

__all__ = ["import_command", "import_parser", "import_visits"]

TABLE = "visits.csv"
HDF5 = (".hdf5", ".h5")


def import_parser() -> argparse.ArgumentParser:
    """The options of ``lssl import``."""
    parser = Parser(
        prog="lssl import",
        description="Turns nnssl's pretrain_data.json, or an HDF5 file of Ren et al. (2022), into a table of visits.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", type=Path, metavar="FILE", help="a .json of nnssl, or an .hdf5 file; only read")
    add("out", type=Path, metavar="OUT", help="new folder for visits.csv and, of HDF5, a NIfTI file per image")
    add("--suffix", nargs="+", metavar="NAME", help="modalities of a .json, one channel each (T1w)")
    add("--spacing", nargs="+", type=float, metavar="MM", help="voxel size of an HDF5 file: one number, or three")
    add("--axes", metavar="RAS", help="directions of an HDF5 file's axes (RAS)")
    return parser


def import_command(args: Sequence[str]) -> None:
    """Runs ``lssl import``."""
    chosen = import_parser().parse_args(list(args))
    table, notes = import_visits(chosen.source, chosen.out, chosen.suffix, chosen.spacing, chosen.axes)
    for note in notes:
        print(f"{note}.")
    place = chosen.out / TABLE
    print(f"{place}: {count(len(table), 'visit')} of {count(table['subject'].nunique(), 'subject')}.")
    say_next(chosen.out, ["inspect", str(place)])


def import_visits(
    source: Path,
    out: Path,
    suffixes: Sequence[str] | None = None,
    spacing: Sequence[float] | None = None,
    axes: str | None = None,
) -> tuple[pd.DataFrame, list[str]]:
    """Writes ``visits.csv``, and of an HDF5 file the images, into a new folder; a failed import leaves none.

    Args:
        source: ``pretrain_data.json`` or an HDF5 file, told apart by their endings.
        out: new folder.
        suffixes: see :func:`lssl.prepare.nnssl_json.nnssl_table`; ``None`` takes T1w.
        spacing: mm, one number or three; see :func:`lssl.prepare.longitudinal_h5.write_visits`.
        axes: see there; ``None`` takes RAS.

    Returns:
        The table and notes.
    """
    if not source.is_file():
        raise InputError(f"There is no file {source}.")
    if out.exists():
        raise InputError(f"{out} exists; give a new folder.")
    of_json = source.suffix == ".json"
    if not of_json and source.suffix not in HDF5:
        raise InputError(f"{source} is neither nnssl's pretrain_data.json nor an HDF5 file (.hdf5, .h5).")
    if of_json and (spacing or axes):
        raise InputError("--spacing and --axes are for HDF5 files; the images of a .json say both themselves.")
    if not of_json and suffixes:
        raise InputError("--suffix is for .json files; an HDF5 file of Ren et al. holds one modality, t1.")
    step = [] if of_json else _spacing(source, spacing)
    if of_json:
        from lssl.prepare.nnssl_json import nnssl_table

        table, notes = nnssl_table(source, suffixes or ("T1w",))
        out.mkdir(parents=True)
    else:
        from lssl.prepare.longitudinal_h5 import write_visits

        out.mkdir(parents=True)
        try:
            table, notes = write_visits(source, out, step, axes or "RAS")
        except BaseException:
            shutil.rmtree(out)
            raise
    with atomic_write(out / TABLE) as part:
        table.to_csv(part, index=False)
    return table, notes


def _spacing(source: Path, given: Sequence[float] | None) -> list[float]:
    if not given:
        raise InputError(f"{source} does not say its voxel size; give it in mm, such as --spacing 1.")
    if len(given) not in (1, 3) or not all(0 < step < 1000 for step in given):
        raise InputError(f"--spacing is {' '.join(f'{step:g}' for step in given)}; give one positive number, or three.")
    return list(given) * (3 // len(given))
