"""What the regularisers of LongitudinalLocal do: each switched off alone, and all together.

    python benchmarks/bench_regularisers.py [OUT] [--table]

The claim of Ren et al. (NeurIPS 2022) is that variance, covariance and orthogonality avoid degenerate multi-scale
features. Both recipes with the published terms, ``paper/longitudinal_local`` and ``longitudinal_local``, are pretrained
with all terms, without each of the three, and without the three; similarity and reconstruction stay. Of each:

- **rank** of the features at each tap (RankMe on centred features, :class:`lssl.metrics.EffectiveRank`), on foreground
  voxels of whole test visits, one figure per label map.
- **one-shot Dice** of the test subjects after a short fine-tuning on one labelled visit.

Data, network and protocol are those of ``configs/benchmark/brains.yaml``, but for: the taps and the reflect padding,
as published, in every row; the steps; one number of labels. Published: views of 128³, one pair a step, heads 2048 wide,
220 epochs. Here: 32³, two pairs, 256 and 128, 100 steps. A difference is to the recipe's row with all terms, on the
same seeds and maps, with the interval of :mod:`lssl.benchmark.statistics`. Bold: p < .05 after Holm's correction over
the table.

The plan is ``OUT.yaml`` (OUT by default ``runs/regularisers``). Finished cells are kept: the same command goes on.
``--table`` runs nothing and prints what is there. One process, one thread; about an hour of a quiet
core.
"""

from __future__ import annotations

import copy
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from lssl.benchmark.fingerprints import cell_fingerprints, cell_inputs
from lssl.benchmark.output_folder import claimed, mark_done, read_done, reset
from lssl.benchmark.plan import SCRATCH, Cell, Plan, read_plan
from lssl.benchmark.results import Result, collect, entries
from lssl.benchmark.run import INPUTS
from lssl.benchmark.statistics import Difference, holm, paired
from lssl.cli.compose import load, merged
from lssl.datamodules.label_maps import LabelMapDataModule
from lssl.utils.files import read_json, write_json

ROOT = Path(__file__).parents[1]
MAPS = Path(os.environ.get("LSSL_REAL_DATA", ROOT.parent / "shared" / "data")) / "labelmaps"
RECIPES = {"paper": "paper_longitudinal_local", "shifted": "longitudinal_local"}  # name → row of the shipped plans
NARROW = "base/narrow_heads"
TERMS = ("variance", "covariance", "orthogonality")
OFF: dict[str, tuple[str, ...]] = {"all-terms": (), **{f"no-{term}": (term,) for term in TERMS}, "none": TERMS}
PAIRS, WIDTH = 2, 128  # pairs a step, of the projections
SEEDS, PRETRAINING, FINETUNING = [0, 1, 2], 100, 100
SIZE = (48, 48, 48)  # of the views that ranks are measured on; sources have 48×56×48
RANKS = "ranks.json"

_made: dict = {}


class Cohort(LabelMapDataModule):
    """The cohort, whose visits are made once for all cells of this process."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.cache = _made


def write_plan(out: Path) -> Path:
    """The plan of the shipped benchmark, with rows of its own."""
    from lssl.networks.backbone import unet_taps

    text = merged(*(layer for _, layer in load("benchmark/brains", ROOT / "configs")))
    narrow = merged(*(layer for _, layer in load(NARROW, ROOT / "configs")))["model"]["init_args"]
    heads = {key: value for key, value in narrow.items() if not key.endswith("_taps")}
    rows = {}
    for recipe, name in RECIPES.items():
        for which, off in OFF.items():
            row = copy.deepcopy(text["strategies"][name])
            row["config"] = [config for config in row["config"] if config != NARROW]  # its taps are not published
            options = row.setdefault("model", {}).setdefault("init_args", {})
            options |= heads | {"projection": WIDTH, "loss_weights": dict.fromkeys(off, 0.0)}
            rows[f"{recipe}-{which}"] = row
    text |= {"out": str(out), "seeds": SEEDS, "labelled": [1], "strategies": rows}
    text["data"]["class_path"] = "bench_regularisers.Cohort"
    text["data"]["init_args"]["batch_size"] = PAIRS
    text["data"]["init_args"]["root"] = str(MAPS.resolve())
    text["backbone"] |= {"taps": unet_taps(), "padding": "reflect"}
    text["pretrain"]["trainer"] |= {"max_steps": PRETRAINING, "callbacks": []}
    text["finetune"]["budgets"] = {"short": {"trainer": {"max_steps": FINETUNING}}}
    path = out.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(text, sort_keys=False))
    return path


def run(plan: Plan, fingerprints: dict[str, str]) -> None:
    """All cells that are not finished, in this process, recipe by recipe; scratch on all labels is left out."""
    cells = [cell for cell in plan.cells if cell.stage == "pretrain" or cell.labelled is not None]
    order = {recipe: number for number, recipe in enumerate(RECIPES)}
    first = lambda cell: (order.get(cell.strategy.split("-")[0], 0), cell.seed, cell.stage != "pretrain")  # noqa: E731
    for cell in sorted(cells, key=first):
        if read_done(cell, fingerprints[cell.name]):
            continue
        reset(cell)
        write_json(cell.folder / INPUTS, cell_inputs(plan, cell))
        seconds = [_timed(command) for command in cell.commands()]
        if cell.stage == "pretrain":
            write_json(cell.folder / RANKS, ranks(cell.run / "checkpoints" / "last.ckpt"))
        mark_done(cell, fingerprints[cell.name], seconds)
        print(f"{cell.name}: {' + '.join(f'{value:.0f}' for value in seconds)} s", flush=True)


def _timed(command: list[str]) -> float:
    from lssl.cli.main import main

    start = time.perf_counter()
    main(command)
    return time.perf_counter() - start


def ranks(checkpoint: Path) -> dict[str, dict[str, dict[str, float]]]:
    """``{"trained" or "untrained": {tap: {map: rank}}}`` of the test visits' foreground."""
    from lssl.checkpoint import load_task, read_checkpoint

    task = load_task(checkpoint)
    config = yaml.safe_load(read_checkpoint(checkpoint)["lssl"]["config"])
    data = Cohort(**config["data"]["init_args"] | {"few_shot": None, "batch_size": 2, "transform": None})
    found = {"trained": _ranks(task, data)}
    for module in task.backbone.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return found | {"untrained": _ranks(task, data)}


def _ranks(task: Any, data: LabelMapDataModule) -> dict[str, dict[str, float]]:
    import torch
    import torch.nn.functional as F

    from lssl.data.clusters import subject_clusters
    from lssl.metrics import EffectiveRank

    data.setup()
    clusters, taps = subject_clusters(data.table), task.backbone.taps
    meters: dict[str, dict[str, Any]] = {tap: {} for tap in taps}
    views = copy.copy(task.views)
    views.size = SIZE
    with torch.no_grad():
        for batch in data.test_dataloader():
            for view in views.centred(batch):
                features = task.backbone(view.image, list(taps))
                for tap, values in features.items():
                    inside = F.adaptive_avg_pool3d(view.foreground, values.shape[2:])[:, 0] > 0.5
                    for row, subject in enumerate(batch.subject.tolist()):
                        cluster = clusters[data.subjects[subject]]
                        meter = meters[tap].setdefault(cluster, EffectiveRank(taps[tap].channels))
                        meter.update(values[row][:, inside[row]].T)
    return {tap: {name: float(meter.compute()) for name, meter in each.items()} for tap, each in meters.items()}


def table(plan: Plan, fingerprints: dict[str, str]) -> Iterator[str]:
    """Markdown: Dice, then ranks, then the differences of ranks."""
    found = {e.strategy: e for e in entries(collect(plan, fingerprints), list(plan.parts)) if e.labelled == "1"}
    measured = _measured(plan, fingerprints)
    done = [name for name in plan.parts if name in found and name in measured]
    yield from _dice_table(found, done)
    full = {name: f"{name.split('-')[0]}-all-terms" for name in done}
    taps = list(measured[done[0]]["trained"])
    pairs = {
        (name, tap): paired(measured[name]["trained"][tap], measured[full[name]]["trained"][tap])
        for name in done
        for tap in taps
        if name != full[name] and full[name] in done
    }
    known = [key for key, value in pairs.items() if value is not None]
    corrected = dict(zip(known, holm([pairs[key].p for key in known]), strict=True))  # type: ignore[union-attr]
    yield f"\n| rank | {' | '.join(taps)} |\n| --- |{' --: |' * len(taps)}"
    yield _rank_row("untrained", [float(measured[done[0]]["untrained"][tap].mean().mean()) for tap in taps], {})
    for name in done:
        bold = {number for number, tap in enumerate(taps) if corrected.get((name, tap), 1.0) < 0.05}
        yield _rank_row(name, [float(measured[name]["trained"][tap].mean().mean()) for tap in taps], bold)
    yield f"\n| rank − all terms | {' | '.join(taps)} |\n| --- |{' --: |' * len(taps)}"
    for name in done:
        if name != full[name]:
            yield f"| {name} | {' | '.join(_short(pairs.get((name, tap))) for tap in taps)} |"


def _dice_table(found: dict[str, Result], done: list[str]) -> Iterator[str]:
    scratch, rows = found.get(SCRATCH), []
    for name in done:
        full = found.get(f"{name.split('-')[0]}-all-terms")
        own = full and full is not found[name] and paired(found[name].scores, full.scores, found[name].clusters)
        rows.append((name, own or None, found[name].difference))
    corrected = holm([own.p if own else float("nan") for _, own, _ in rows])
    if scratch is not None:
        subjects = f"{scratch.scores.shape[1]} subjects of {len({*scratch.clusters.values()})} maps"
        yield f"{len(scratch.scores)} seeds, {subjects}, {PRETRAINING} and {FINETUNING} steps"
    yield "\n| terms | ↑ Dice | − all terms | − scratch |\n| --- | --: | --: | --: |"
    if scratch is not None:
        yield f"| scratch | {scratch.mean:.3f} | – | – |"
    for (name, own, difference), p in zip(rows, corrected, strict=True):
        shown = f"**{own}**" if p < 0.05 else str(own or "–")
        yield f"| {name} | {found[name].mean:.3f} | {shown} | {difference or '–'} |"


def _measured(plan: Plan, fingerprints: dict[str, str]) -> dict[str, dict[str, dict[str, pd.DataFrame]]]:
    """Strategy → trained or untrained → tap → seeds × maps."""
    cells: dict[str, list[Cell]] = {}
    for cell in plan.cells:
        if cell.stage == "pretrain" and read_done(cell, fingerprints[cell.name]):
            cells.setdefault(cell.strategy, []).append(cell)
    found: dict[str, dict[str, dict[str, pd.DataFrame]]] = {}
    for name, each in cells.items():
        read = {cell.seed: read_json(cell.folder / RANKS) for cell in each}
        kinds: Any = next(iter(read.values()))
        found[name] = {
            kind: {tap: pd.DataFrame({seed: one[kind][tap] for seed, one in read.items()}).T for tap in kinds[kind]}
            for kind in kinds
        }
    return found


def _rank_row(name: str, values: list[float], bold: Any) -> str:
    cells = [f"**{value:.1f}**" if number in bold else f"{value:.1f}" for number, value in enumerate(values)]
    return f"| {name} | {' | '.join(cells)} |"


def _short(difference: Difference | None) -> str:
    if difference is None:
        return "–"
    interval = f" [{difference.low:+.1f}, {difference.high:+.1f}]" if difference.low == difference.low else ""
    return f"{difference.mean:+.1f}{interval}"


if __name__ == "__main__":
    import bench_regularisers as this  # the configs name this module, whose visits are shared
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    folder = Path(next((word for word in sys.argv[1:] if not word.startswith("-")), ROOT / "runs" / "regularisers"))
    plan = read_plan(this.write_plan(folder))
    keys = cell_fingerprints(plan)
    if "--table" not in sys.argv:
        with claimed(plan):
            this.run(plan, keys)
    print("\n".join(this.table(plan, keys)))
