"""A run's network for programs that do not know lssl: MONAI, nnU-Net, ONNX, or plain safetensors."""

from __future__ import annotations

__all__: list[str] = []
