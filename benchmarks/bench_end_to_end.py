"""Whole runs of recipes beside their bare network: `lssl fit` with its data, views, terms and update, pairs a second.

The bare network does forward and backward over both images of each pair, and the update; nothing else. With ``--syncs``
every recipe makes 20 more steps in which CUDA refuses any wait of the host for the GPU.

python benchmarks/bench_end_to_end.py [--size 64] [--data PATH] [--syncs] [recipe …]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import lightning as L
import torch
import yaml

from lssl.cli.compose import compose
from lssl.cli.references import resolved
from lssl.cli.start import BRIEF, train
from lssl.cli.trials import Trial, measure
from lssl.networks.backbone import Backbone

RECIPES = (
    *("longitudinal_infonce", "longitudinal_local", "prior_guided_local", "global_contrastive"),
    *("anatomical_invariance", "anatomical_embedding", "masked_autoencoder"),
)
SECONDS = 5.0
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class NoWait(L.Callback):
    """After three steps, CUDA raises where the host would wait for the GPU within a step."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if torch.cuda.is_available() and trainer.global_step >= 3:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")


def bare(pairs: int, size: int, half: bool, channels_last: bool) -> float:
    """Pairs a second of the default network alone."""
    network = Backbone(channels_last=channels_last).to(DEVICE)
    optimizer = torch.optim.AdamW(network.parameters())
    images = torch.rand(2 * pairs, 1, size, size, size, device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
            loss = network(images, output=True)["output"].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    start, number = time.perf_counter(), 0
    while number < 3 or time.perf_counter() - start < SECONDS:
        step()
        number += 1
    return pairs * number / (time.perf_counter() - start)


def run(recipe: str, options: list[str]) -> Trial:
    with tempfile.TemporaryDirectory() as folder:
        measure(["--config", recipe, *options], folder, SECONDS)
        return Trial(**json.loads(Path(folder, "trial.json").read_text()))


def check_waits(recipe: str, options: list[str]) -> str:
    """What a recipe waits for in 20 steps; empty for nothing."""
    callback = ["--trainer.callbacks", "{class_path: bench_end_to_end.NoWait}", "--trainer.max_steps", "23"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            train("fit", ["--config", recipe, *options, *BRIEF, *callback, "--trainer.default_root_dir", folder])
        except Exception as error:  # what it waits for is the result
            return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--data", default="PhantomDataModule")
    parser.add_argument("--syncs", action="store_true")
    chosen = parser.parse_args()
    half = "bf16-mixed" if DEVICE.type == "cuda" else "32-true"
    options = ["--data", chosen.data, "--views.size", str(chosen.size), "--trainer.precision", half]
    if chosen.data == "PhantomDataModule":
        small = {"size": chosen.size + 16, "subjects": 4, "split": [1.0, 0.0, 0.0], "num_workers": 0}
        for name, value in small.items():
            options += [f"--data.init_args.{name}", yaml.safe_dump(value, default_flow_style=True).split("\n")[0]]
    print(f"{chosen.size}³ views, {half}, {DEVICE.type}, {torch.get_num_threads()} thread(s)")
    print(f"{'recipe':<26}{'pairs/s':>9}{'bare':>9}{'ratio':>7}{'GB':>7}")
    for recipe in chosen.recipes:
        values = resolved(compose([recipe]).values)
        pairs, last = values["data"]["init_args"].get("batch_size", 2), values["backbone"].get("channels_last", False)
        before = bare(pairs, chosen.size, half.startswith("bf16"), last)
        trial = run(recipe, options)
        alone = (
            before + bare(pairs, chosen.size, half.startswith("bf16"), last)
        ) / 2  # the machine may change meanwhile
        told = (
            trial.why
            or f"{trial.pairs_per_second:>9.3g}{alone:>9.3g}{trial.pairs_per_second / alone:>7.2f}{trial.memory:>7.2f}"
        )
        print(f"{recipe:<26}{told}", flush=True)
        if chosen.syncs and (why := check_waits(recipe, options)):
            print(f"{'':<26}waits in a step: {why}", flush=True)


if __name__ == "__main__":
    main()
