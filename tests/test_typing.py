"""A user's own method, source of data and transform pass `mypy --strict`, against the editable install and a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("git") is None, reason="no git")]
ROOT = Path(__file__).parents[1]

USERS_FILE = '''
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lssl import Backbone, IntensityTransform, PairBatch, PairDataModule, Projector, Strategy, View, Visit
from lssl.strategies.prior_guided_local import Cosine, Directions


class VisitOrder(Strategy):
    """Predict which of two visits came first."""

    LOSS_WEIGHTS = {"order": 1.0}

    def __init__(self, backbone: Backbone, tap: str = "bottleneck", **common: Any) -> None:
        super().__init__(backbone, **common)
        self.head = Projector(2 * backbone.taps[tap].channels, 128, 1)
        self.tap = tap

    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        a, b = (self.backbone(view.image, [self.tap])[self.tap].mean((2, 3, 4)) for view in (first, second))
        self.log_metric("size", a.norm())
        return {"order": torch.nn.functional.softplus(-self.head(torch.cat([a, b], 1))).mean()}


class Folder(PairDataModule):
    """Two visits."""

    def visit_table(self) -> pd.DataFrame:
        return pd.DataFrame({"subject": ["a", "a"], "session": ["1", "2"], "age": [60.0, 62.0]})

    def read(self, row: int) -> Visit:
        return Visit(torch.zeros(1, 8, 8, 8), torch.eye(4).double(), torch.ones(8, 8, 8, dtype=torch.bool))


class Invert(IntensityTransform):
    """One minus the image."""

    def apply(self, images: Tensor, generator: torch.Generator, *parameters: Tensor) -> Tensor:
        return 1 - images


class Doubled(Cosine):
    """Twice the published loss."""

    def forward(self, sides: Directions) -> Tensor:
        return 2 * super().forward(sides)
'''
WRONG = """
from lssl import Strategy, View, PairBatch, Strateggy
from torch import Tensor


class Wrong(Strategy):
    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, float]:
        return {"order": first.no_such_thing}
"""


def check(folder: Path, python: str) -> tuple[list[str], list[str]]:
    """What mypy says of the right and of the wrong file."""
    said = []
    for name, text in (("right", USERS_FILE), ("wrong", WRONG)):
        (folder / f"{name}.py").write_text(text)
        command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, f"{name}.py"]
        done = subprocess.run(
            [*command, "--cache-dir", str(folder / "cache")], capture_output=True, text=True, cwd=folder, check=False
        )
        said.append([line for line in done.stdout.splitlines() if "error:" in line] + done.stderr.splitlines())
    return said[0], said[1]


def expect(said: tuple[list[str], list[str]]) -> None:
    """Nothing of the right file; of the wrong one its three mistakes, so that nothing is Any."""
    right, wrong = said
    assert right == []
    for words in ('no attribute "Strateggy"', 'incompatible with return type "dict[str, Tensor]"', "no_such_thing"):
        assert any(words in line for line in wrong), (words, wrong)


def test_from_the_editable_install(tmp_path):
    expect(check(tmp_path, sys.executable))


def test_from_a_wheel(tmp_path):
    """In an environment of its own, whose other packages are those of this one."""
    copy = tmp_path / "source"
    names = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split("\n")
    for name in filter(None, names):
        if (ROOT / name).is_symlink() or name.startswith(("tests/", "docs/")):
            continue
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    for link in ("strategies", "datamodules", "configs"):
        os.symlink(f"../{link}", copy / "lssl" / link)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*pip, str(copy)], check=True)
    venv.create(tmp_path / "own", with_pip=False)
    (site,) = (tmp_path / "own" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(next(tmp_path.glob("lssl-*.whl"))) as wheel:
        wheel.extractall(site)
    folders = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(folders) + "\n")
    python = str(tmp_path / "own" / "bin" / "python")
    ask = [python, "-c", "import lssl; print(lssl.__file__)"]
    where = subprocess.run(ask, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert where.stdout.startswith(str(site))
    expect(check(tmp_path, python))
