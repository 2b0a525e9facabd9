"""Peaks: what the hardware can do and has used, for the account of a run."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

__all__ = ["peak_flops", "peak_memory", "power"]

#: Part of a GPU's name → dense (not sparse) tensor-core peaks in 10¹² operations a second: 16 bit, TF32; by NVIDIA's
#: data sheets. Longer names come first. Where a column is 0, that format has no tensor cores.
PEAKS: dict[str, tuple[float, float]] = {
    "h100 pcie": (756.0, 378.0),
    "h100 nvl": (835.0, 417.5),
    "h100": (989.4, 494.7),
    "h200": (989.4, 494.7),
    "gh200": (989.4, 494.7),
    "a100": (312.0, 156.0),
    "a40": (149.7, 74.8),
    "rtx a6000": (154.8, 77.4),
    "l40s": (362.0, 183.0),
    "l4": (121.0, 60.0),
    "v100": (125.0, 0.0),
    "t4": (65.0, 0.0),
}


def peak_flops(device: torch.device, precision: str) -> float:
    """Peak operations per second of a device at a precision of the trainer; 0 where none is known.

    Args:
        device: of the run.
        precision: ``32-true``, ``bf16-mixed`` and so on. Convolutions of float32 count as TF32 if cuDNN may use it.
    """
    if device.type != "cuda":
        return 0.0
    words = set(torch.cuda.get_device_name(device).lower().replace("-", " ").split())
    found = next((peaks for part, peaks in PEAKS.items() if words.issuperset(part.split())), None)
    if found is None or precision.startswith("64"):
        return 0.0
    if "16" in precision:
        return 1e12 * found[0]
    return 1e12 * found[1] if torch.backends.cudnn.allow_tf32 else 0.0


def peak_memory() -> float:
    """GB that this process has held at most.

    ``ru_maxrss`` alone is wrong: Linux starts it at the parent's memory when this process was started.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / 1e9


def power(device: torch.device) -> float | None:
    """Watts that a GPU draws now; ``None`` where the system does not tell (no GPU, or no package nvidia-ml-py)."""
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.power_draw(device) / 1000
    except Exception:  # the driver's library raises its own kinds
        return None
