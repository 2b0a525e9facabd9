"""``lssl profile``: some steps of a run, their account, a trace, and the operations that take most."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from lssl.prepare.commands import Parser
from lssl.utils.errors import InputError

__all__ = ["profile_command", "profile_parser"]

WARM_UP, TRACED = 10, 3  # steps; the account leaves the first ten out


def profile_parser() -> argparse.ArgumentParser:
    """The options of ``lssl profile``; those of ``lssl fit`` come beside them."""
    parser = Parser(
        prog="lssl profile",
        usage="lssl profile --config NAME [--data PATH] [--steps N] [--key value …]",
        description="Runs some steps of `lssl fit` with the same options, and says where their time goes: data, views, "
        "forward and backward, optimizer, rest, and the ten operations that take most. The run folder (runs/profile) "
        "gets cost.json and a trace for https://ui.perfetto.dev. Validation, monitors, callbacks and checkpoints are "
        "left out.",
        allow_abbrev=False,
    )
    steps = f"steps in the account, after {WARM_UP} that warm up (20); {TRACED} more are traced"
    parser.add_argument("--steps", type=int, default=20, metavar="N", help=steps)
    return parser


def profile_command(args: Sequence[str]) -> None:
    """Runs ``lssl profile``.

    Args:
        args: its options, and those of ``lssl fit``.
    """
    from lssl.cli.start import BRIEF, train

    chosen, others = profile_parser().parse_known_args(list(args))
    if chosen.steps < 1:
        raise InputError(f"--steps is {chosen.steps}; at least one step is needed.")
    after = WARM_UP + chosen.steps
    trace = {"class_path": "lssl.callbacks.Trace", "init_args": {"after": after, "steps": TRACED}}
    length = f"--trainer.max_steps={after + TRACED}"
    folder = "--trainer.default_root_dir=runs/profile"
    train("fit", [folder, *others, *BRIEF, length, f"--trainer.callbacks={json.dumps(trace)}"])
