"""What ``lssl --version`` prints: what a bug report needs."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import lssl

__all__ = ["print_versions"]

PACKAGES = ("lightning", "monai", "jsonargparse", "numpy", "nibabel", "SimpleITK", "blosc2", "torchio", "wandb")


def print_versions() -> None:
    """Versions of lssl, Python and the libraries, and the devices that torch finds."""
    import torch

    print(f"lssl {lssl.__version__}")
    print(f"python {platform.python_version()}, {platform.platform()}")
    print(", ".join([f"torch {torch.__version__}", *map(_named, PACKAGES)]))
    devices = [f"CPU, {os.cpu_count()} cores"]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        devices.append(f"CUDA {torch.version.cuda}: {', '.join(names)}")
    if torch.backends.mps.is_available():
        devices.append("Apple MPS")
    print(f"devices: {'; '.join(devices)}")


def _named(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} absent"
