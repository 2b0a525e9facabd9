"""Demonstration: one labelled visit, fine-tuned from scratch, from a pretrained network, and with consistency.

    python examples/demo_finetune.py sweep           # scratch's learning rate, on validation subjects
    python examples/demo_finetune.py run [SEEDS] [ARM …]
                                                              # the paired design; finished runs are not repeated, and
                                                              # several processes share the work
    python examples/demo_finetune.py table           # means, differences and their intervals
    python examples/demo_finetune.py compare BASE RESULT …
                                                              # across settings: "3200 steps/0.01/scratch" …

COHORT (phantom, or brains), STEPS (600), LR (0.01) and PRETRAINING (400 steps) in the environment set another cohort,
budget, rate and pretraining, whose results lie apart.

phantom: procedural heads of 3 mm; 24 subjects to train on, 2 to validate, 10 to test. brains: made from label maps, at
3 mm; 14 subjects of 7 maps to train on, 4 of 2 to validate, 12 of 6 to test. Two visits each, about 4 years apart. A
seed draws the labelled visit, the initial weights and the crops of all arms alike. One process, one thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import sys
import time
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import torch
import yaml
from monai.networks.nets import BasicUNet

from lssl import Backbone, Segmenter, ViewSampler
from lssl.benchmark.statistics import two_way
from lssl.cli.compose import compose
from lssl.cli.main import _hush, main
from lssl.data.few_shot import FewShot
from lssl.datamodules.label_maps import LabelMapDataModule
from lssl.datamodules.phantom import PhantomDataModule
from lssl.utils.allocator import keep_freed_memory

ROOT = Path(__file__).parents[1]
COHORT = os.environ.get("COHORT", "phantom")
OUT = ROOT / "runs" / ("demonstration" if COHORT == "phantom" else f"demonstration-{COHORT}")
RECIPE = compose(["demo_finetune"]).values
STEPS, LR = int(os.environ.get("STEPS", "600")), float(os.environ.get("LR", "0.01"))
PRETRAINING = int(os.environ.get("PRETRAINING", "400"))
AFTER = "" if PRETRAINING == 400 else f" after {PRETRAINING}"  # names results and pretrainings of another length
RESULTS = OUT / f"{STEPS} steps{AFTER}"
MAPS = Path(os.environ.get("LSSL_REAL_DATA", ROOT.parent / "shared" / "data")) / "labelmaps"
KIND, DATA = {
    "phantom": (
        PhantomDataModule,
        {"subjects": 36, "split": [24 / 36, 2 / 36, 10 / 36], "size": 64, "spacing": 3.0},
    ),
    "brains": (
        LabelMapDataModule,
        {"subjects": 30, "split": [7 / 15, 2 / 15, 6 / 15], "size": [56, 72, 64], "spacing": 3.0, "root": str(MAPS)},
    ),
}[COHORT]
DATA |= {"visits": 2, "interval": 4.0}
BATCH = 1 if COHORT == "phantom" else 2  # labelled visits in a step, two crops each
CLASSES = RECIPE["model"]["init_args"]["classes"] if COHORT == "phantom" else None
ARMS = {
    "scratch": {},
    "pretrained": {"pretrained": True},
    "pretrained + consistency": {
        "pretrained": True,
        "loss_weights": {"consistency": 1.0},
        "absent": False,
        "ramp": 0.5,
    },
    "scratch + consistency": {"loss_weights": {"consistency": 1.0}, "absent": False, "ramp": 0.5},
}
PAIRS = (
    ("pretrained", "scratch"),
    ("pretrained + consistency", "pretrained"),
    ("pretrained + consistency", "scratch"),
    ("scratch + consistency", "scratch"),
    ("pretrained + consistency", "scratch + consistency"),
)
SHOWN = ("dice", "aspc", "true_aspc", "stcs", "true_stcs", "trajectory_error", "reversal_rate", "missed")
_cache: dict = {}


def pretrained() -> str:
    """LongitudinalLocal as recommended, on the training subjects' visits without labels."""
    path = OUT / f"pretraining{AFTER}" / "checkpoints" / "last.ckpt"
    if not path.is_file():
        network = {**RECIPE["backbone"], "padding": "zeros", "channels_last": True}
        small = {
            "data": {"class_path": KIND.__name__, "init_args": {**DATA, "source_size": None, "num_workers": 0}},
            "views": {"size": 32},
            "backbone": network,
            "model": {"class_path": "LongitudinalLocal", "init_args": {"optimizer": {"init_args": {"lr": 1e-3}}}},
            "trainer": {
                "max_steps": PRETRAINING,
                "precision": "32-true",
                "accelerator": "cpu",
                "default_root_dir": str(path.parents[1]),
                "enable_progress_bar": False,
                "check_val_every_n_epoch": 1000,
            },
        }
        changes = OUT / f"pretraining{AFTER}.yaml"
        changes.write_text(yaml.safe_dump(small))
        main(["fit", "--config", str(ROOT / "configs/longitudinal_infonce.yaml"), "--config", str(changes)])
    return str(path)


def fine_tune(seed: int, lr: float = LR, steps: int = STEPS, held_out: str = "test", **options: object) -> list[dict]:
    """One run; the rows of all subjects of the split."""
    L.seed_everything(seed, verbose=False)
    if options.pop("pretrained", False):
        options["pretrained"] = pretrained()
    network = BasicUNet(**RECIPE["backbone"]["network"]["init_args"])
    backbone = Backbone(network, RECIPE["backbone"]["taps"], channels_last=True)
    few = FewShot(subjects=1, visits=1, seed=seed, batch_size=BATCH, steps=100)
    data = KIND(**DATA, batch_size=1, few_shot=few)
    data.cache = _cache
    segmenter = Segmenter(
        backbone,
        views=ViewSampler(**RECIPE["views"]),
        classes=CLASSES,
        window_overlap=0.25,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=lr, weight_decay=0.01),
        **options,
    )
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        gradient_clip_val=5.0,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        default_root_dir=OUT / "last",
        **quiet,
    )
    trainer.fit(segmenter, datamodule=data)
    if held_out == "val":  # tested on the validation subjects instead
        data.table["split"] = data.table["split"].cat.rename_categories({"val": "test", "test": "val"})
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.test(segmenter, datamodule=data, verbose=False)
    report = next(c for c in trainer.callbacks if type(c).__name__ == "SegmentationReport")
    return [dataclasses.asdict(row) for row in report.rows]


def by_subject(rows: list[dict], metric: str) -> np.ndarray:
    """``(subjects,)`` mean over structures, visits and pairs, structures first; subjects of one map are one."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["metric"] == metric:
            unit = row["subject"] if COHORT == "phantom" else row["subject"].rpartition("-")[0]
            values.setdefault(unit, {}).setdefault(row["structure"], []).append(row["value"])
    return np.array([np.mean([np.mean(part) for part in each.values()]) for _, each in sorted(values.items())])


def slope(rows: list[dict]) -> float:
    """Seen change of volumes per true change, least squares through 0 over subjects and structures.

    1 where change is seen as it is, 0 where it is flattened away: what a trajectory error cannot tell from noise.
    """
    volumes: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in sorted(rows, key=lambda row: row["session"]):
        if row["metric"] in ("volume", "true_volume"):
            volumes.setdefault((row["subject"], row["structure"]), {}).setdefault(row["metric"], []).append(
                row["value"]
            )
    both = np.array([[each["volume"], each["true_volume"]] for each in volumes.values()])  # (N, 2, visits)
    both = both[(both.sum(2) > 0).all(1)]
    seen, true = ((both[..., 1] - both[..., 0]) / both.mean(2)).T
    return float((seen * true).sum() / (true * true).sum())


def sweep() -> None:
    """Scratch on labelled subject 0, scored on the validation subjects."""
    rates = [{"lr": lr, "balance": 0.5} for lr in (1e-2, 3e-2, 3e-3)]
    trials = [*rates, {"lr": 1e-2, "balance": 0.0}]
    for trial in trials:
        path = RESULTS / "sweep" / ("-".join(f"{key}={value}" for key, value in trial.items()) + ".json")
        if not path.is_file():
            start = time.perf_counter()
            rows = fine_tune(0, held_out="val", **trial)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows))
            print(f"{time.perf_counter() - start:.0f} s", end="  ")
        print(trial, f"validation Dice {by_subject(json.loads(path.read_text()), 'dice').mean():.3f}", flush=True)


def run(seeds: int, arms: list[str]) -> None:
    """All arms of a seed before the next seed; what another process is at is left to it."""
    folder = RESULTS / f"{LR}"
    folder.mkdir(parents=True, exist_ok=True)
    with (OUT / "pretraining.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if any("pretrained" in ARMS[arm] for arm in arms):
            pretrained()
    for seed in range(seeds):
        for arm in arms:
            path = folder / f"{arm} {seed}.json"
            with path.with_suffix(".lock").open("w") as lock, contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.is_file():
                    continue
                start = time.perf_counter()
                rows = fine_tune(seed, **ARMS[arm])
                path.write_text(json.dumps(rows))
                shown = ", ".join(f"{metric} {by_subject(rows, metric).mean():.3f}" for metric in SHOWN)
                print(f"{arm}, seed {seed}: {shown} ({time.perf_counter() - start:.0f} s)", flush=True)


def table() -> None:
    """Means, and differences with intervals over seeds and subjects, of the arms that all seeds have."""
    folder = RESULTS / f"{LR}"
    seeds = [seed for seed in range(100) if (folder / f"scratch {seed}.json").is_file()]
    results = {
        arm: [json.loads((folder / f"{arm} {seed}.json").read_text()) for seed in seeds]
        for arm in ARMS
        if all((folder / f"{arm} {seed}.json").is_file() for seed in seeds)
    }
    print(f"{len(seeds)} seeds, {STEPS} steps, learning rate {LR}, {PRETRAINING} steps of pretraining")
    for metric in SHOWN:
        scores = {arm: np.stack([by_subject(rows, metric) for rows in runs]) for arm, runs in results.items()}
        for arm, values in scores.items():
            print(f"{metric:<18}{arm:<26}{values.mean():8.3f}  per seed {np.round(values.mean(1), 3)}")
        for arm, base in PAIRS:
            if arm in scores and base in scores:
                _print_difference(f"{arm} - {base}", scores[arm] - scores[base])
    for arm, runs in results.items():
        if all(any(row["metric"] == "volume" for row in rows) for rows in runs):
            seen = np.array([slope(rows) for rows in runs])
            print(f"{'slope':<18}{arm:<26}{seen.mean():8.3f}  per seed {np.round(seen, 3)}")


def compare(names: list[str]) -> None:
    """Differences to the first of results (folder of ``OUT``, arm), over the seeds that all have."""
    seeds = [seed for seed in range(100) if all((OUT / f"{name} {seed}.json").is_file() for name in names)]
    results = {name: [json.loads((OUT / f"{name} {seed}.json").read_text()) for seed in seeds] for name in names}
    print(f"seeds {seeds}; differences to {names[0]}")
    for metric in SHOWN if seeds else ():
        scores = {name: np.stack([by_subject(rows, metric) for rows in runs]) for name, runs in results.items()}
        for name, values in scores.items():
            print(f"{metric:<18}{name:<50}{values.mean():8.3f}")
            if name != names[0]:
                _print_difference("", values - scores[names[0]])


def _print_difference(title: str, difference: np.ndarray) -> None:
    low, high, _ = two_way(difference)
    interval = f" [{low:+.3f}, {high:+.3f}]" if low == low else ""  # one seed gives none
    print(f"{'':<18}{title}: {difference.mean():+.3f}{interval}", end="")
    print(f"  per seed {np.round(difference.mean(1), 3)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep_freed_memory()
    _hush()
    warnings.filterwarnings("ignore")
    command = sys.argv[1] if len(sys.argv) > 1 else "table"
    if command == "sweep":
        sweep()
    elif command == "run":
        run(int(sys.argv[2]) if len(sys.argv) > 2 else 5, sys.argv[3:] or list(ARMS)[:3])
    elif command == "compare":
        compare(sys.argv[2:])
    else:
        table()
