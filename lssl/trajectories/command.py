"""``lssl trajectories``: volumes and embeddings of a cohort over age, by subject and group."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lssl.benchmark.statistics import holm
from lssl.data.pairs import count
from lssl.prepare.commands import Parser
from lssl.utils.closing import say_next
from lssl.utils.errors import InputError
from lssl.utils.files import atomic_write, read_json

__all__ = ["trajectories", "trajectories_command", "trajectories_parser"]

ALL = "all"
VISITS = "visits.tsv"  # lssl.runs.visit_log has the same; importing it imports torch
PAGE, PLOT, TABLE, SLOPES = "trajectories.html", "measures.png", "trajectories.tsv", "slopes.tsv"


def trajectories_parser() -> argparse.ArgumentParser:
    """The options of ``lssl trajectories``."""
    parser = Parser(
        prog="lssl trajectories",
        description="Draws what a run finds of a cohort over age: volumes of a Segmenter, principal components of a "
        "strategy's embeddings. A mixed model gives the mean course and the yearly slope of each group; outliers are "
        f"named. Writes {PAGE}, {TABLE} and {SLOPES}. Predicts first if the run has not seen these data.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run folder, or a folder of its predictions (RUN/predict/COHORT)")
    add("data", type=Path, nargs="?", metavar="DATA", help="the cohort: a folder or a table, as for lssl predict")
    add("--group", metavar="COLUMN", help="compare groups: a column of participants.tsv, such as diagnosis")
    adjust = "hold constant: site, motion, interval, or a column of participants.tsv"
    add("--adjust", nargs="+", default=[], metavar="COLUMN", help=adjust)
    participants = "the table that has these columns (DATA/participants.tsv, or DATA itself if it is a table)"
    add("--participants", type=Path, metavar="FILE", help=participants)
    return parser


def trajectories_command(args: Sequence[str]) -> None:
    """Runs ``lssl trajectories``."""
    chosen = trajectories_parser().parse_args(list(args))
    _needs_statsmodels()
    folder = _predictions(chosen.run, chosen.data)
    source = chosen.participants or _participants(chosen.data or _cohort(folder))
    for line in trajectories(folder, chosen.group, chosen.adjust, source):
        print(line)
    say_next(folder)


def trajectories(
    folder: Path, group: str | None = None, adjust: Sequence[str] = (), source: Path | None = None
) -> list[str]:
    """Writes page, tables and picture beside the predictions.

    Args:
        folder: of the predictions of one cohort.
        group: column whose values are compared; ``None`` takes all subjects together.
        adjust: columns that are held constant.
        source: the table that has these columns.

    Returns:
        Sentences on what was found.
    """
    from lssl.runs.folder import back_up
    from lssl.trajectories import model
    from lssl.trajectories.outliers import outliers
    from lssl.trajectories.page import draw_spaghetti, write_report
    from lssl.trajectories.table import measures_of, read_visits

    visits, notes = _grouped(read_visits(folder), group, adjust, source)
    groups = list(visits["group"].value_counts().index)
    measures = measures_of(visits)
    held = visits.rename(columns={name: f"held:{name}" for name in adjust})
    courses = {
        name: model.fit_course(held.rename(columns={name: "value"}), groups, [f"held:{one}" for one in adjust])
        for name in measures
    }
    fitted = [course.slopes.assign(measure=name) for name, course in courses.items() if course]
    slopes = pd.concat(fitted, ignore_index=True) if fitted else pd.DataFrame(columns=[*model.SLOPES, "p_holm"])
    far = pd.concat([outliers(visits, name) for name in measures], ignore_index=True)
    if not fitted:
        notes.append(
            f"No slope: it takes {model.LEAST} subjects with two visits at different times, and values that differ."
        )
    else:
        slopes["p_holm"] = holm(slopes["p"].tolist())
        slopes = slopes[["measure", *(name for name in slopes if name != "measure")]]
    label = "age, years" if visits.attrs["over"] == "age" else "years since the first visit"
    for name, table in ((TABLE, visits.drop(columns="at")), (SLOPES, slopes)):
        back_up(folder / name)
        with atomic_write(folder / name) as part:
            table.to_csv(part, sep="\t", index=False, float_format="%.8g", na_rep="n/a")
    draw_spaghetti(visits, courses, groups, label, folder / PLOT)
    title = f"{folder.name}: {count(visits['subject'].nunique(), 'subject')} over {visits.attrs['over']}"
    write_report(folder / PAGE, title, notes, folder / PLOT, slopes, far, folder / "pictures")
    return [*notes, *_said(slopes, far), f"Page: {folder / PAGE}"]


def _grouped(
    visits: pd.DataFrame, group: str | None, adjust: Sequence[str], source: Path | None
) -> tuple[pd.DataFrame, list[str]]:
    """Visits with ``group`` and ``at``; and notes on what was left out."""
    from lssl.trajectories.table import add_columns

    visits = add_columns(visits, [*([group] if group else []), *adjust], source)
    notes = []
    for name in adjust:
        numbers = pd.to_numeric(visits[name], errors="coerce")
        if numbers.notna().sum() == visits[name].notna().sum():
            visits[name] = numbers
        if visits[name].nunique() < 2:
            raise InputError(
                f"--adjust {name}: all visits have the same value or none, so nothing can be held constant."
            )
    visits["group"] = visits[group].astype(object) if group else ALL
    if group and (without := visits["group"].isna().sum()):
        notes.append(f"{count(int(without), 'visit')} without a value of {group} left out.")
    visits = visits[visits["group"].notna()].copy()
    if visits.empty:
        raise InputError(f"No visit has a value of {group}.")
    if group and (mixed := visits.groupby("subject")["group"].nunique()).max() > 1:
        raise InputError(
            f"{group} changes between the visits of {mixed.index[mixed > 1][0]}; a group is one of the subject. Take "
            "its value at baseline."
        )
    visits["group"] = visits["group"].astype(str)
    over = "age" if visits["age"].notna().all() else "time"
    visits["at"] = visits["age" if over == "age" else "years"]
    if unknown := int(visits["at"].isna().sum()):
        notes.append(f"{count(unknown, 'visit')} without a time left out.")
    visits.attrs["over"] = over
    return visits.reset_index(drop=True), notes


def _said(slopes: pd.DataFrame, far: pd.DataFrame) -> list[str]:
    """The slopes of each measure in a line, and who is far from the others."""
    lines = []
    first: dict[str, str] = dict(slopes.groupby("measure")["group"].first()) if len(slopes) else {}
    for _, row in slopes.iterrows():
        group = "" if row["group"] == ALL else f" {row['group']}"
        percent = "" if pd.isna(row["percent_per_year"]) else f" ({row['percent_per_year']:+.2f} %)"
        p = "" if pd.isna(row["p_holm"]) else f"; against {first[row['measure']]}: p {row['p_holm']:.2g} (Holm)"
        interval = f"{row['slope_per_year']:+.3g} [{row['low']:+.3g}, {row['high']:+.3g}]"
        lines.append(f"{row['measure']}{group}: {interval} a year{percent}{p}")
    named = list(dict.fromkeys(far["subject"]))
    if named:
        some = ", ".join(map(str, named[:5])) + (", …" if len(named) > 5 else "")
        lines.append(f"{count(len(named), 'subject')} with an outlier: {some}.")
    return lines


def _needs_statsmodels() -> None:
    try:
        import statsmodels.regression.mixed_linear_model  # noqa: F401
    except ImportError:
        raise InputError(
            "lssl trajectories fits mixed models with statsmodels, which is not installed: pip install "
            '"lssl[trajectories]".'
        ) from None


def _predictions(run: Path, data: Path | None) -> Path:
    """The folder of predictions; predicts first if there is none of these data."""
    if (run / VISITS).is_file():
        return run
    if not (run / "config.yaml").is_file():
        raise InputError(
            f"{run} is neither a run folder (it has no config.yaml) nor a folder of predictions ({VISITS})."
        )
    found = _known(run)
    if data is None:
        if len(found) == 1:
            return found[0]
        names = ", ".join(map(str, found)) or "none yet"
        raise InputError(f"Of which cohort? Give DATA, or one folder of predictions ({names}).")
    if not data.exists():
        raise InputError(f"{data} does not exist; give the folder or the table of the cohort.")
    mine = [folder for folder in found if _cohort(folder) == Path(os.path.realpath(data))]
    if not mine:
        from lssl.cli.main import main

        saved = next((name for name in ("best", "last") if (run / "checkpoints" / f"{name}.ckpt").is_file()), None)
        if saved is None:
            raise InputError(f"{run} holds no checkpoint to predict with.")
        main(["predict", "--config", str(run / "config.yaml"), "--ckpt_path", saved, "--data", str(data)])
        mine = [folder for folder in _known(run) if _cohort(folder) == Path(os.path.realpath(data))]
    return max(mine, key=lambda folder: (folder / VISITS).stat().st_mtime)


def _known(run: Path) -> list[Path]:
    return sorted(path.parent for path in (run / "predict").glob(f"*/{VISITS}"))


def _cohort(folder: Path) -> Path:
    about = read_json(folder / "dataset_description.json")
    known = about.get("lssl", {}) if isinstance(about, dict) else {}
    return Path(known.get("cohort", "") if isinstance(known, dict) else "")


def _participants(data: Path) -> Path:
    return data if data.is_file() else data / "participants.tsv"
