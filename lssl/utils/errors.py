"""Mistakes of the user: one exception, one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["InputError", "input_error", "nearest", "positive"]


class InputError(ValueError):
    """One sentence: what is wrong, where, and what to do. The command line prints it without a traceback."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` or, if nothing is near, ``; there are …``, to end a sentence with."""
    known = sorted(known)
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else f"; there are {', '.join(known)}."


def input_error(error: BaseException | None) -> InputError | None:
    """Finds an InputError in an exception, its causes, or a worker's message; a place without permission makes one.

    An error that was raised while an InputError was handled is a separate bug and does not count.
    """
    while error is not None:
        if isinstance(error, InputError):
            _, quoted, sentence = str(error).rpartition("lssl.utils.errors.InputError: ")
            return InputError(sentence.strip()) if quoted else error
        if isinstance(error, PermissionError) and error.filename:
            return InputError(f"{error.filename} may not be used by this user (no permission); name another place.")
        error = error.__cause__
    return None


def positive(**values: float) -> None:
    """Refuses numbers that are not above 0, by their names."""
    for name, value in values.items():
        if not value > 0:  # NaN neither
            raise InputError(f"{name}: give a number above 0, not {value}.")
