"""Runs the network by ONNX Runtime alone. `python rebuild.py` compares its answers with the stored ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent


def load() -> Any:
    """The network: ``load().run(None, {"image": array})`` gives its output, then its taps."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(HERE / "model.onnx"), providers=["CPUExecutionProvider"])


def compare() -> float:
    """Largest difference to the stored answers, as a share of the largest value of each."""
    sample = np.load(HERE / "sample.npz")
    session = load()
    answers = dict(
        zip([one.name for one in session.get_outputs()], session.run(None, {"image": sample["image"]}), strict=True)
    )
    answers |= {name: value[..., value.shape[-1] // 2] for name, value in answers.items() if name != "output"}
    return max(
        float(np.abs(answers[name] - sample[name]).max() / np.abs(sample[name]).max())
        for name in sample.files
        if name != "image"
    )


if __name__ == "__main__":
    print(compare())
