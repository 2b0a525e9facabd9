"""Methods and sources that packages register by entry points, ours and third parties'."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points

__all__ = ["TASKS", "load_class", "registered", "registered_points", "task_class"]

#: Tasks that start from a pretrained network, and the recipe of each; ``lssl.NAME`` is their class path.
TASKS = {
    "Segmenter": "finetune",
    "ChangeSegmenter": "change_segmenter",
    "Classifier": "classifier",
    "Regressor": "regressor",
}


def registered_points(group: str) -> list[EntryPoint]:
    """The entry points of ``lssl.strategies`` or ``lssl.datamodules``, by name."""
    return sorted(entry_points(group=group), key=lambda point: point.name)


def load_class(point: EntryPoint) -> type | None:
    """The class of an entry point; ``None`` if it cannot be imported, which is said on standard error.

    A broken package must not stop the runs that do not use it.
    """
    try:
        return point.load()
    except Exception as error:  # whatever the package does when it is imported
        owner = f"the package {point.dist.name}" if point.dist else "a package"
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"Warning: {point.name} of {owner} cannot be imported ({reason}); it is left out.", file=sys.stderr)
        return None


def task_class(name: str) -> type:
    """The class of one of :data:`TASKS`."""
    import lssl

    return getattr(lssl, name)


def registered() -> list[type]:
    """Loads every registered method and source, and the tasks, so that their short names are known."""
    groups = ("lssl.strategies", "lssl.datamodules")
    found = (load_class(point) for group in groups for point in registered_points(group))
    return [*(each for each in found if each is not None), *map(task_class, TASKS)]
