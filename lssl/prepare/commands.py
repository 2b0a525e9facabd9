"""``lssl prepare`` and ``lssl inspect``: their options, and what they print."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lssl.utils.closing import say_next
from lssl.utils.errors import InputError, nearest

__all__ = ["Parser", "inspect_command", "inspect_parser", "prepare_command", "prepare_parser"]

RECIPE = "longitudinal_infonce"  # what we recommend for pretraining
VIEWS = (16, 96)  # voxels: the largest stride of its network, and its views; two strides is the smallest that it takes


class Parser(argparse.ArgumentParser):
    """Mistakes become InputError, with the nearest option that exists."""

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage."""
        if found := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            options = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            raise InputError(f"{self.prog} has no option {found[1]}{nearest(found[1], options)}")
        raise InputError(f"{self.prog}: {message}; see {self.prog} --help.")


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"a shard is i/n with 1 ≤ i ≤ n, such as 2/8, not {text!r}")
    return int(found[1]), int(found[2])


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1000:
        raise argparse.ArgumentTypeError(f"it must be positive, not {text}")
    return value


def _add_selection(add: Callable[..., Any]) -> None:
    """Options of the commands that read a BIDS folder."""
    add(
        "--select",
        nargs="+",
        default=[],
        metavar="ENTITY=VALUE",
        help="which image of a session is taken, such as run=last rec=norm,none space=native; default: no ce, native "
        "space, the last run, and the most common value of any other entity",
    )
    add("--list", action="store_true", help="only list which images are taken, which are left, and why")


def _print_files(root: Path, suffixes: Sequence[str], select: str) -> None:
    """A dry listing of every image of the suffixes."""
    from lssl.data.bids import bids_files

    if not root.is_dir():
        raise InputError(f"{root} is no folder: a table names one image per visit, so there is nothing to choose.")
    for suffix in suffixes:
        files, notes = bids_files(root, suffix, select)
        for path, taken, why in zip(files["file"], files["taken"], files["why"], strict=True):
            print(f"{'taken' if taken else 'left '}  {Path(path).relative_to(root)}{'' if taken else f'  ({why})'}")
        print("; ".join([f"{suffix}: {int(files['taken'].sum())} of {len(files)} images taken", *notes]) + ".")


def prepare_parser() -> Parser:
    """The options of ``lssl prepare``."""
    parser = Parser(
        prog="lssl prepare",
        description="Registers the visits of every subject of a BIDS folder and writes them as cached, chunked arrays.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "bids",
        type=Path,
        metavar="BIDS_DIR|TABLE",
        help="folder with sub-*/[ses-*]/anat/*_<suffix>.nii[.gz], or a table of visits (CSV); only read",
    )
    add("out", type=Path, metavar="OUT_DIR", help="new folder, or one that an earlier run on this cohort wrote")
    add(
        "--suffix",
        nargs="+",
        default=["T1w"],
        metavar="NAME",
        help="image suffixes; several become channels of one visit, registered within the session to the first (T1w)",
    )
    add(
        "--missing-channels",
        choices=["drop", "keep"],
        default="drop",
        help="visits that lack some of several suffixes are left out or kept; kept ones are registered with the others "
        "by a contrast that both have, and otherwise across contrasts (drop)",
    )
    _add_selection(add)
    add("--spacing", type=_positive, default=1.0, metavar="MM", help="side of the isotropic voxels (1.0)")
    add("--transform", choices=["rigid", "affine"], default="rigid", help="between visits (rigid)")
    add(
        "--nonrigid",
        action="store_true",
        help="also find how tissue moved between visits: a field and a map of local volume change beside each visit, "
        "and percent volume changes in change.tsv; images are not warped",
    )
    add("--n4", action="store_true", help="even out the bias field by N4 before anything else")
    add(
        "--masks",
        default="auto",
        metavar="PATTERN",
        help="brain or head masks below BIDS_DIR, with {subject} and {session}; auto takes *desc-brain_mask below "
        "derivatives/*/, none finds the head in every image (auto)",
    )
    add("--labels", default="auto", metavar="PATTERN", help="label maps, likewise; auto takes *dseg (auto)")
    add("--template", metavar="FILE", help="image whose space the subjects are brought into, by an affine map")
    add("--margin", type=_positive, default=8.0, metavar="MM", help="kept around the foreground (8)")
    add("--floor", type=float, default=0.5, metavar="NCC", help="visits that correlate less are flagged (0.5)")
    add(
        "--exclude", nargs="+", default=[], metavar="NAME", help="subjects (sub-01) and visits (sub-01_ses-02) left out"
    )
    add("--workers", type=int, default=1, metavar="N", help="processes, each with one thread (1)")
    add("--shard", type=_shard, default=(1, 1), metavar="i/n", help="only every n-th subject, from the i-th on")
    return parser


def prepare_command(args: list[str]) -> None:
    """Runs ``lssl prepare``; a visit that was left out ends it with status 1, after all others are done."""
    chosen = prepare_parser().parse_args(args)
    if chosen.workers < 1:
        raise InputError(f"--workers is {chosen.workers}; at least one process is needed.")
    if len(set(chosen.suffix)) < len(chosen.suffix):
        raise InputError(f"--suffix names {' '.join(chosen.suffix)}; name every suffix once.")
    if chosen.list:
        _print_files(chosen.bids, chosen.suffix, " ".join(chosen.select))
        return
    if chosen.nonrigid and chosen.missing_channels == "keep":
        raise InputError("--nonrigid compares visits of one contrast; leave --missing-channels at drop.")
    if chosen.template and not Path(chosen.template).is_file():
        raise InputError(f"The template {chosen.template} does not exist; correct its path.")
    import pandas as pd

    from lssl.prepare.cohort import Options
    from lssl.prepare.runner import CHANGE, TABLE, prepare

    options = Options(
        suffixes=tuple(chosen.suffix),
        select=" ".join(chosen.select),
        spacing=chosen.spacing,
        transform=chosen.transform,
        n4=chosen.n4,
        masks=chosen.masks,
        labels=chosen.labels,
        template=chosen.template,
        margin=chosen.margin,
        floor=chosen.floor,
        nonrigid=chosen.nonrigid,
        exclude=tuple(chosen.exclude),
        missing_channels=chosen.missing_channels,
    )
    outcome = prepare(chosen.bids, chosen.out, options, chosen.workers, chosen.shard)
    for visit, reasons in outcome.flagged.items():
        picture = chosen.out / "pictures" / f"{visit.split()[0]}.png"
        print(f"look at {visit}: {'; '.join(reasons)} ({picture})")
    _print_fates(outcome, chosen.out / TABLE)
    if chosen.nonrigid and (outcome.done or outcome.kept):
        print(_about_change(chosen.out / CHANGE))
    say_next(
        chosen.out,
        *(
            [_fit(chosen.out, len(chosen.suffix), pd.read_csv(chosen.out / TABLE))]
            if outcome.done or outcome.kept
            else []
        ),
    )
    if outcome.failed or outcome.left:
        raise SystemExit(1)


def _fit(data: Path, channels: int, table: Any) -> list[str]:
    """The command that trains on prepared visits, with smaller views where those of the recipe do not fit.

    Args:
        data: the prepared folder.
        channels: of each visit.
        table: its visits, whose sizes are numbers.
    """
    several = ["--backbone.in_channels", str(channels)] if channels > 1 else []
    if "channels" in table and table["channels"].nunique() > 1:
        several += ["--data.init_args.missing_channels", "keep", "--views.contrasts", "mix"]
    sides = table[["size_d", "size_h", "size_w"]].to_numpy()
    fits = int(sides.min()) // VIEWS[0] * VIEWS[0] if len(sides) else VIEWS[1]
    smaller = ["--views.size", str(fits)] if 2 * VIEWS[0] <= fits < VIEWS[1] else []
    return ["fit", "--config", RECIPE, "--data", str(data), *several, *smaller]


def _about_change(path: Path) -> str:
    import pandas as pd

    if pd.read_csv(path, sep="\t").empty:
        maps = "Maps of local change, where a subject has two aligned visits, are beside the visits"
        return f"{maps}; no percent volume changes, as these take label maps or brain masks (--labels, --masks)."
    return f"Percent volume changes are listed in {path}."


def _print_fates(outcome: Any, table: Path) -> None:
    for name, reason in outcome.failed.items():
        print(f"lssl: {name} failed: {reason}", file=sys.stderr)
    for name, reason in outcome.left.items():
        print(f"lssl: {name} left out: {reason}", file=sys.stderr)
    for line in outcome.overlays:
        print(line)
    parts = [f"{len(outcome.done)} prepared in {outcome.seconds:.0f} s", f"{len(outcome.kept)} finished before"]
    parts += [f"{len(outcome.failed)} failed"] if outcome.failed else []
    parts += [f"{len(outcome.left)} visits left out"] if outcome.left else []
    parts += [f"{len(outcome.flagged)} visits to look at"] if outcome.flagged else []
    look = f"; look at {table.with_name('quality.html')}" if outcome.done or outcome.kept else ""
    print(f"Subjects: {', '.join(parts)}. The visits are listed in {table}{look}.")


def inspect_parser() -> Parser:
    """The options of ``lssl inspect``."""
    parser = Parser(prog="lssl inspect", description="Says what a BIDS or prepared folder holds.", allow_abbrev=False)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="a BIDS folder, a table of visits, or what lssl prepare wrote")
    add("--suffix", default="T1w", metavar="NAME", help="of the images in a BIDS folder (T1w)")
    _add_selection(add)
    add(
        "--subjects",
        type=int,
        default=10,
        metavar="N",
        help="of how many subjects of a BIDS folder images are read, some seconds each (10); headers, masks and label "
        "maps are read of all",
    )
    add(
        "--all",
        action="store_true",
        help="read every voxel, mask and label map once; what is found is kept, and lssl fit leaves bad visits out",
    )
    add(
        "--spacing",
        type=_positive,
        metavar="MM",
        help="of the voxels for which the cache is estimated (1, or the finest side of coarser images)",
    )
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--sheet", type=Path, metavar="FILE.png", help="write a picture of it, too")
    return parser


def inspect_command(args: list[str]) -> None:
    """Runs ``lssl inspect``."""
    chosen = inspect_parser().parse_args(args)
    from lssl.prepare.inspection import inspect_folder

    if chosen.list:
        _print_files(chosen.folder, [chosen.suffix], " ".join(chosen.select))
        return
    report = inspect_folder(
        chosen.folder, chosen.suffix, chosen.subjects, chosen.spacing, " ".join(chosen.select), chosen.all
    )
    if chosen.json:
        import json

        print(json.dumps(report.as_json(), indent=1, ensure_ascii=False))
    else:
        from rich.console import Console

        from lssl.prepare.sheet import show

        show(report, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    if chosen.sheet:
        from lssl.prepare.sheet import draw

        draw(report, chosen.sheet)
    if not chosen.json:
        if chosen.sheet:
            print(f"Sheet: {chosen.sheet}")
        say_next(None, *_after_inspection(report, chosen))


def _after_inspection(report: Any, chosen: argparse.Namespace) -> list[list[str]]:
    """Training on what is prepared; preparing what is not, a command for each kind of label map that may be meant."""
    if report.kind == "prepared":
        return [_fit(chosen.folder, len(report.channels), report.table)]
    given = [] if chosen.suffix == "T1w" else ["--suffix", chosen.suffix]
    given += ["--select", *chosen.select] if chosen.select else []
    given += ["--spacing", f"{report.spacing:g}"] if report.spacing != 1 else []
    place, number = chosen.folder.resolve(), 1
    while (out := Path(f"{place.stem}-prepared{'' if number == 1 else f'-{number}'}")).exists():
        number += 1
    labels = [["--labels", pattern] for pattern in report.choices.get("labels", [])] or [[]]
    return [["prepare", str(chosen.folder), str(out), *given, *pattern] for pattern in labels]
