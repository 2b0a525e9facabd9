"""``lssl tune``: which settings make a run faster on this machine, and what to type to have them; without torch."""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from lssl.cli.trials import Trial, try_settings
from lssl.prepare.commands import Parser
from lssl.utils.errors import InputError

__all__ = ["Tuner", "tune_command", "tune_parser"]

GAIN = 1.05  # a ratio below it is noise
TIMED = 4.0  # seconds of steps in a trial
LONGEST = 600.0  # seconds of a trial, compiling included
PRECISION, BATCH = "trainer.precision", "data.init_args.batch_size"
CHECKPOINTING = "backbone.checkpointing"
CHANGES_METHOD = (PRECISION, BATCH)


def tune_parser() -> argparse.ArgumentParser:
    """The options of ``lssl tune``; those of ``lssl fit`` come beside them."""
    parser = Parser(
        prog="lssl tune",
        usage="lssl tune --config NAME [--data PATH] [--minutes 2] [--key value …]",
        description="Tries settings on this machine, on one device, a few steps each: memory format, workers, fused "
        "optimizer, precision, batch size, torch.compile and activation checkpointing. Prints pairs a second, memory "
        "and the ratio to the present settings, and the options to add. Each setting is tried on top of those that "
        f"helped before, and kept if it is at least {GAIN} times as fast. Batch size and precision change what is "
        "learned and are told apart. No file is written.",
        allow_abbrev=False,
    )
    parser.add_argument("--minutes", type=float, default=2.0, metavar="M", help="begin no trial later than this (2)")
    return parser


def tune_command(args: Sequence[str]) -> None:
    """Runs ``lssl tune``.

    Args:
        args: its options, and those of ``lssl fit``.
    """
    chosen, others = tune_parser().parse_known_args(list(args))
    if not 0 <= chosen.minutes < 10_000:
        raise InputError(f"--minutes is {chosen.minutes}; give a number of minutes.")
    tuner = Tuner(others, 60 * chosen.minutes)
    print(f"{'setting':<32}{'pairs/s':>9}{'ratio':>8}{'GB':>8}", flush=True)
    for line in tuner.lines():
        print(line, flush=True)
    print(f"\n{tuner.advice()}", flush=True)


@dataclass
class Tuner:
    """One setting at a time, each on top of those that helped.

    Args:
        args: options of ``lssl fit``: the present settings.
        seconds: no trial begins later than this.
        attempt: runs a trial.
        now: a clock.

    Attributes:
        kept: settings that helped, by key.
        untried: settings for which there was no time.
    """

    args: Sequence[str]
    seconds: float
    attempt: Callable[[Sequence[str], float, float], Trial] = try_settings
    now: Callable[[], float] = time.monotonic
    kept: dict[str, Any] = field(default_factory=dict)
    untried: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """A line of the table for each trial, as it ends."""
        began = self.now()
        self.present = self.best = self._try({})
        if self.present.why:
            raise InputError(f"The present settings do not work: {self.present.why}")
        yield self._line("present settings", self.present)
        for key, candidates in _factors(self.present):
            for value in candidates:
                name = f"{_short(key)} {_text(value)}"
                if self.now() - began > self.seconds:
                    self.untried.append(name)
                    continue
                trial = self._try({**self.kept, key: value})
                better = self._beats(trial)
                yield self._line(name, trial, key, better)
                if better:
                    self.kept[key], self.best = value, trial
                elif key == BATCH:
                    break

    def advice(self) -> str:
        """What to type, and what was not tried."""
        same = {key: value for key, value in self.kept.items() if key not in CHANGES_METHOD}
        other = {key: value for key, value in self.kept.items() if key in CHANGES_METHOD}
        lines = []
        if not self.kept:
            lines.append(f"No other setting that was tried is {GAIN} times as fast as the present ones.")
        if same:
            lines += ["The method stays the same with:", *_to_type(same)]
        if other:
            lines += [
                "Faster, but another method: another precision rounds otherwise, and another batch size needs another "
                "learning rate and has other negatives. Compare results before you adopt:",
                *_to_type(other),
            ]
        if self.untried:
            lines.append(f"No time for {', '.join(self.untried)}: raise --minutes.")
        return "\n".join(lines)

    def _beats(self, trial: Trial) -> bool:
        """Whether it is faster than the best so far, also when that one is timed again, as the machine may change."""
        if trial.pairs_per_second < GAIN * self.best.pairs_per_second:
            return False
        again = self._try(self.kept)
        self.best = max(self.best, again, key=lambda one: one.pairs_per_second)
        return trial.pairs_per_second >= GAIN * self.best.pairs_per_second

    def _try(self, settings: Mapping[str, Any]) -> Trial:
        options = [f"--{key}={_text(value)}" for key, value in settings.items()]
        return self.attempt([*self.args, *options], TIMED, LONGEST)

    def _line(self, name: str, trial: Trial, key: str = "", better: bool = False) -> str:
        if trial.why:
            return f"{name:<32}{'-':>9}{'-':>8}{'-':>8}  {trial.why}"
        ratio = trial.pairs_per_second / self.present.pairs_per_second
        notes = ["kept" if better else "", "changes the method" if key in CHANGES_METHOD else ""]
        notes.append("for memory, not for speed" if key == CHECKPOINTING and not better else "")
        told = ", ".join(filter(None, notes))
        return f"{name:<32}{trial.pairs_per_second:>9.3g}{ratio:>8.2f}{trial.memory:>8.2f}  {told}".rstrip()


def _factors(present: Trial) -> Iterator[tuple[str, list[Any]]]:
    """Key of a setting → the values to try, in their order."""
    options, backbone = present.config["data"]["init_args"], present.config["backbone"]
    yield "backbone.channels_last", [not backbone["channels_last"]]
    workers, cores = options.get("num_workers", 0), _cores()
    wanted = sorted({0, cores // 2, cores - 1, min(2 * workers, cores)} - {workers})
    yield "data.init_args.num_workers", [number for number in wanted if number <= 16]
    optimizer = present.config["model"]["init_args"].get("optimizer")
    arguments = optimizer.get("init_args", {}) if isinstance(optimizer, Mapping) else {}
    yield "model.init_args.optimizer.init_args.fused", [] if arguments.get("fused") else [True]
    precision = str(present.config["trainer"]["precision"] or "32-true")
    kinds = ["32-true", "bf16-mixed", *(["16-mixed"] if present.cuda else [])]
    yield PRECISION, [kind for kind in kinds if kind.partition("-")[0] != precision.partition("-")[0]]
    if isinstance(batch := options.get("batch_size"), int):
        yield BATCH, [batch * 2**power for power in range(1, 7)]
    compiler = any(map(shutil.which, ("g++", "clang++", "cl")))
    yield "backbone.compile", [True] if compiler and not backbone["compile"] else []
    yield CHECKPOINTING, [] if backbone["checkpointing"] else [True]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _to_type(settings: Mapping[str, Any]) -> list[str]:
    """The options of the command, and the same as YAML."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *groups, name = key.split(".")
        node = nested
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    flow = yaml.safe_dump(nested, default_flow_style=None, sort_keys=False, width=110).splitlines()
    typed = " ".join(f"--{key} {_text(value)}" for key, value in settings.items())
    return [f"  {typed}", "  or in the config:", *(f"    {line}" for line in flow)]
