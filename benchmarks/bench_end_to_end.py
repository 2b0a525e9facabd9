"""Whole runs of recipes beside their network: `lssl fit` with its data, views, terms, update and logging.

After every step of the run, two others take their turn in the same process, and only they and the step are timed:

* network: forward and backward pass of the recipe's whole network over both images of each pair, and the update;
* with heads: network as far as the recipe needs it, heads and losses, backward pass and update, on two views made once.

On a CPU, where data are made by the process itself, time is the processor's. With ``--syncs`` every recipe makes 20
more steps in which CUDA refuses any wait of the host for the GPU.

python benchmarks/bench_end_to_end.py [--size 64] [--steps 4] [--pairs N] [--data PATH] [--syncs] [recipe …]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import yaml
from torch import Tensor, nn

from lssl.cli.start import BRIEF, train

RECIPES = (
    *("longitudinal_infonce", "longitudinal_local", "prior_guided_local", "global_contrastive"),
    *("anatomical_invariance", "anatomical_embedding", "masked_autoencoder"),
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WARM = 1  # steps that choose kernels


def now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Beside(L.Callback):
    """Times each step of the run, and after it a step of the network alone and of network, heads and losses."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {"run": [], "network": [], "with heads": []}
        self.others: dict[str, Callable[[], None]] = {}
        self._from = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Takes turns."""
        if self.others:
            self.times["run"].append(now() - self._from)
        else:
            self.others = self._steps(trainer, pl_module, batch)
            for _ in trainer.datamodule.train_dataloader():  # phantoms are drawn once and kept
                pass
        for name, step in self.others.items():
            start = now()
            step()
            self.times[name].append(now() - start)
        self._from = now()

    @staticmethod
    def _steps(trainer: L.Trainer, task: Any, batch: Any) -> dict[str, Callable[[], None]]:
        half = "bf16" in str(trainer.precision)
        first, second = task.draw_views(batch)
        images = torch.cat([first.image, second.image])
        network = copy.deepcopy(task.backbone).requires_grad_(True)

        def whole(module: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
            optimizer = torch.optim.AdamW(module.parameters(), 1e-5)

            def step() -> None:
                optimizer.zero_grad()
                with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
                    value = loss()
                value.backward()
                optimizer.step()

            return step

        return {
            "network": whole(network, lambda: network(images, output=True)["output"].square().mean()),
            "with heads": whole(task, lambda: task.total(task.terms(first, second, batch))),
        }


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


def run(recipe: str, options: list[str], callback: type[L.Callback], steps: int) -> L.Trainer:
    """A run of some steps with one callback."""
    own = ["--trainer.callbacks", f"{{class_path: bench_end_to_end.{callback.__name__}}}"]
    with tempfile.TemporaryDirectory() as folder:
        length = ["--trainer.max_steps", str(steps), "--trainer.default_root_dir", folder]
        return train("fit", ["--config", recipe, *options, *BRIEF, *own, *length])


def row(recipe: str, options: list[str], steps: int) -> str:
    """Milliseconds, and what share of a step the network, and network with heads, take."""
    trainer = run(recipe, options, Beside, steps + WARM + 1)
    (found,) = (callback for callback in trainer.callbacks if type(callback).__name__ == Beside.__name__)
    middle = {name: statistics.median(values[WARM:]) for name, values in found.times.items()}
    told = "".join(f"{1000 * value:>12.0f}" for value in middle.values())
    shares = "".join(f"{middle[name] / middle['run']:>14.2f}" for name in ("network", "with heads"))
    return told + shares


def check_waits(recipe: str, options: list[str]) -> str:
    """What a recipe waits for in 20 steps; empty for nothing."""
    try:
        run(recipe, options, NoWait, 23)
    except Exception as error:  # what it waits for is the result
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, help="a batch; the recipe's own by default")
    parser.add_argument("--data", default="PhantomDataModule")
    parser.add_argument("--syncs", action="store_true")
    chosen = parser.parse_args()
    half = "bf16-mixed" if DEVICE.type == "cuda" else "32-true"
    options = ["--data", chosen.data, "--views.size", str(chosen.size), "--trainer.precision", half]
    if chosen.data == "PhantomDataModule":
        small = {"size": chosen.size + 16, "subjects": 2, "visits": 2, "split": [1.0, 0.0, 0.0], "num_workers": 0}
        for name, value in small.items():
            options += [f"--data.init_args.{name}", yaml.safe_dump(value, default_flow_style=True).split("\n")[0]]
    if chosen.pairs:
        options += ["--data.init_args.batch_size", str(chosen.pairs)]
    print(f"{chosen.size}³ views, {half}, {DEVICE.type}, {torch.get_num_threads()} thread(s), median of {chosen.steps}")
    heads = "".join(f"{name + ', ms':>12}" for name in ("run", "network", "heads"))
    print(f"{'recipe':<26}{heads}{'network/run':>14}{'+ heads/run':>14}")
    for recipe in chosen.recipes:
        try:
            told = row(recipe, options, chosen.steps)
        except Exception as error:  # a recipe that fails is a row, and the others still run
            told = f"  {type(error).__name__}: {str(error)[:160]}"
        print(f"{recipe:<26}{told}", flush=True)
        if chosen.syncs and (why := check_waits(recipe, options)):
            print(f"{'':<26}waits in a step: {why}", flush=True)


if __name__ == "__main__":
    main()
