"""References in configs: ``${views.size}``, ``${oc.env:NAME}``, ``${times:${views.size},1.3}``, and others."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lssl.utils.errors import InputError

__all__ = ["from_environment", "resolved"]

Key = tuple[str, ...]


def resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with every reference replaced by its value."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _resolver("times", _times)
    _resolver("mixed_on_gpu", _mixed_on_gpu)
    try:
        return OmegaConf.to_container(OmegaConf.create(dict(values)), resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        reason = " ".join(str(error).split("\n")[0].split())
        where = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise InputError(f"A reference in the config has no value: {where}{reason}.") from None


def from_environment(values: Mapping[str, Any]) -> dict[Key, str]:
    """References of the leaves whose value depends on the environment; they are saved instead of the values."""
    from omegaconf.resolvers import oc

    references = {key: text for key, text in _leaves(values) if isinstance(text, str) and "${" in text}
    _resolver("oc.env", lambda *_: "?")
    try:
        elsewhere = dict(_leaves(resolved(values)))
    except InputError:  # for example, a value that must be a number; then no reference is known to be harmless
        elsewhere = {}
    finally:
        _resolver("oc.env", oc.env)
    here = dict(_leaves(resolved(values)))
    return {key: text for key, text in references.items() if key not in elsewhere or here.get(key) != elsewhere[key]}


def _resolver(name: str, function: Callable[..., Any]) -> None:
    from omegaconf import OmegaConf

    with warnings.catch_warnings():  # renamed in newer versions
        warnings.simplefilter("ignore")
        OmegaConf.register_new_resolver(name, function, replace=True)


def _leaves(values: Any, path: Key = ()) -> Iterable[tuple[Key, Any]]:
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(values, Mapping):
        items = values.items()
    elif isinstance(values, list):
        items = enumerate(values)
    else:
        yield path, values
    for key, value in items:
        yield from _leaves(value, (*path, str(key)))


def _times(value: Any, factor: float) -> Any:
    """Voxels (one number, or one per axis) times a factor, rounded up to a multiple of 8."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_times(one, factor) for one in value]
    return 8 * math.ceil(float(value) * float(factor) / 8)


def _mixed_on_gpu(accelerator: Any) -> str:
    """``bf16-mixed`` where the trainer will take a GPU, and ``32-true`` elsewhere.

    CPUs without instructions for bfloat16 take some hundred times as long for it as for float32.
    """
    import torch

    asked = str(accelerator).lower() in ("auto", "gpu", "cuda", "none")
    return "bf16-mixed" if asked and torch.cuda.is_available() else "32-true"
