"""Writes the results: CSV, Markdown, figure, and one HTML page that needs no other file; without torch."""

from __future__ import annotations

import html
import sys
from pathlib import Path

import pandas as pd

from lssl.benchmark.figure import draw_curves, draw_results
from lssl.benchmark.fingerprints import code_version
from lssl.benchmark.output_folder import read_done, writing
from lssl.benchmark.plan import Cell, Plan
from lssl.benchmark.results import Result, collect, differences, entries
from lssl.benchmark.tables import as_html, as_markdown, ceiling_warnings, sheets
from lssl.utils.files import atomic_write
from lssl.utils.page import image_tag, write_page

__all__ = ["write_results"]


def write_results(plan: Plan, fingerprints: dict[str, str], page: bool) -> list[Path]:
    """Files of all finished cells, below the output folder; warns of ceilings below a row.

    Args:
        plan: the cells.
        fingerprints: by cell.
        page: also writes ``report.html``.
    """
    table = collect(plan, fingerprints)
    found = entries(table, list(plan.parts), plan.tasks)
    tables = sheets(plan, table, found)
    intro = _intro(plan, fingerprints)
    written = [plan.out / name for name in ("results.csv", "table.md", "figure.png")]
    with writing(plan.out):
        with atomic_write(written[0]) as part:
            listed = pd.concat([table, differences(found)], ignore_index=True)
            unnamed = ["task"] if [*plan.tasks] == [""] else []
            listed.drop(columns=unnamed).to_csv(part, index=False)
        _write(written[1], f"{intro}\n\n{as_markdown(tables)}")
        draw_results(found, list(plan.parts), written[2])
        if page:
            written.append(plan.out / "report.html")
            finished = [cell for cell in plan.cells if read_done(cell, fingerprints[cell.name])]
            shown = _shown(finished, found)
            draw_curves(shown, list(plan.parts), plan.out / "curves.png")
            pictures = [("Losses", plan.out / "curves.png"), *_pictures(shown)]
            body = [f"<p>{html.escape(intro)}</p>", _image("Results", written[2]), *map(as_html, tables)]
            body += [_image(title, path) for title, path in pictures]
            write_page(written[-1], plan.out.name, body, f"Benchmark: {plan.out.name}")
    for text in ceiling_warnings(found):
        print(f"Warning: {text}", file=sys.stderr)
    return written


def _intro(plan: Plan, fingerprints: dict[str, str]) -> str:
    """Command, seeds, code version, and the finished part of the plan."""
    finished = sum(read_done(cell, fingerprints[cell.name]) is not None for cell in plan.cells)
    seeds = ", ".join(map(str, sorted({cell.seed for cell in plan.cells})))
    steps = {cell.budget or "pretraining": cell.steps for cell in plan.cells}
    text = (
        f"Demonstration, not evidence: `lssl benchmark --config {plan.path}`; seeds {seeds}; steps "
        f"{', '.join(f'{name} {number}' for name, number in steps.items())}; code {code_version()[:8]}."
    )
    missing = len(plan.cells) - finished
    return text + (f" {missing} of {len(plan.cells)} cells are missing: rows rest on what is there." if missing else "")


def _shown(finished: list[Cell], found: list[Result]) -> list[Cell]:
    """Cells of the first seed: every pretraining, and each strategy's first row of a task at its chosen rate."""
    first = [cell for cell in finished if cell.seed == finished[0].seed]
    rows: dict[tuple[str, str], Result] = {}
    for entry in found:
        rows.setdefault((entry.task.name, entry.strategy), entry)
    wanted = {(e.task.name, e.strategy, e.labelled, e.budget, e.rate) for e in rows.values()}

    def row(cell: Cell) -> tuple[str, str, str, str, float | None]:
        return cell.task, cell.strategy, "all" if cell.labelled is None else str(cell.labelled), cell.budget, cell.rate

    return [cell for cell in first if cell.stage == "pretrain" or row(cell) in wanted]


def _pictures(cells: list[Cell]) -> list[tuple[str, Path]]:
    """The report of each pretraining, and the first test subject of each fine-tuning."""
    shown = []
    for cell in cells:
        paths = [cell.run / "report.png", *sorted((cell.run / "test").glob("**/pictures/*.png"))[:1]]
        shown += [(cell.name, path) for path in paths if path.is_file()]
    return shown


def _image(title: str, path: Path) -> str:
    return f"<h2>{html.escape(title)}</h2>{image_tag(path, title)}"


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as part:
        part.write_text(text)
