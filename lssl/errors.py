"""The one exception that stands for a mistake of the user, not of the program."""

from __future__ import annotations

__all__ = ["InputError"]


class InputError(ValueError):
    """What was wrong, where, and what to do, in one sentence; the command line prints it without a traceback."""
