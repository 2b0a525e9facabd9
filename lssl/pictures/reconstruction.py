"""What a method that reconstructs makes of an augmented or masked view."""

from __future__ import annotations

from pathlib import Path

import torch

from lssl.pictures.scene import Scene, index_of
from lssl.task import Task
from lssl.utils.canvas import figure, show

__all__ = ["draw_reconstruction"]


@torch.no_grad()
def draw_reconstruction(task: Task, shown: Scene, path: Path) -> bool:
    """Rows: both views; columns: what the network sees, what it makes of it, what it should, and the difference.

    Args:
        task: whose :meth:`lssl.task.Task.show_reconstruction` is shown.
        shown: the pair.
        path: PNG.

    Returns:
        Whether there was anything to draw: not every method reconstructs.
    """
    training = task.training
    task.eval()
    made = [task.show_reconstruction(view) for view in (shown.first, shown.second)]
    task.train(training)
    if any(pair is None for pair in made):
        return False
    with figure(path, 2, 4, "Reconstruction") as axes:
        for row, (view, (seen, image)) in enumerate(zip((shown.first, shown.second), made, strict=True)):  # type: ignore[misc]
            result = image[0, 0].float()
            point, affine = index_of(shown.place, view.affine), view.affine[0].cpu().numpy()
            error = (result - view.clean[0, 0]).abs()
            panels = {"as seen": seen[0, 0], "reconstructed": result, "before augmentation": view.clean[0, 0]}
            for axis, (name, volume) in zip(axes[row], panels.items(), strict=False):
                show(axis, volume.float().cpu().numpy(), affine, point, f"view {row + 1}, {name}")
            text = f"absolute difference, mean {float(error.mean()):.3f}"
            drawn = show(axes[row, 3], error.cpu().numpy(), affine, point, text, cmap="magma", vmax=0.5)
            axes[row, 3].figure.colorbar(drawn, ax=axes[row, 3], shrink=0.8)
    return True
