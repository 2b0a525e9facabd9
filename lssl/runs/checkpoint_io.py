"""AtomicCheckpointIO: a checkpoint on disk is always whole, or known to be damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lssl.utils.errors import InputError
from lssl.utils.files import refuse_damaged
from lssl.utils.torch_file import write_torch

__all__ = ["AtomicCheckpointIO"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, waits until it is on disk, and renames it; checks it before loading.

    Lightning writes into TMPDIR and moves the file. Between file systems, moving is copying: a process that is killed
    meanwhile leaves a damaged file in place of the only copy. Here the earlier file stays until the new one is whole.
    ``lssl fit`` uses this class; from Python, give ``Trainer(plugins=[AtomicCheckpointIO()])``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a checkpoint; a full disk and the like are one sentence, and leave the earlier file.

        Args:
            checkpoint: its content.
            path: its file. An address such as ``s3://…`` is left to Lightning.
            storage_options: not supported.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            write_torch(Path(path), checkpoint, sync=True)
        except InputError as error:
            kept = " The one before it is intact." if Path(path).is_file() else ""
            raise InputError(f"{error}{kept}") from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint; a damaged one is refused.

        Args:
            path: its file.
            map_location: as in ``torch.load``.
            weights_only: as in ``torch.load``.
        """
        if "://" not in str(path):
            refuse_damaged(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)
