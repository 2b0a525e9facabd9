"""Turns what the config parser says of a wrong key or value into one sentence with the nearest valid name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping

from jsonargparse import ArgumentError

from lssl.utils.errors import InputError, nearest

__all__ = ["explain"]


def explain(error: ArgumentError, groups: Mapping[str, type], classes: Iterable[type]) -> InputError:
    """One sentence for a parser's error.

    Args:
        error: as raised by jsonargparse.
        groups: top-level key → class whose parameters are its keys.
        classes: those that a ``class_path`` may name shortly.
    """
    text = " ".join(str(error).split())
    classes = list(classes)
    if found := re.search(
        r"Problem with given class_path '(?P<path>[\w.]+)': Option '(?P<option>[\w.]+)' is not", text
    ) or (
        re.search(
            r"Option '(?P<option>[\w.]+)' is not accepted. Got value: Namespace\(class_path='(?P<path>[\w.]+)'", text
        )
    ):
        name, option = found["path"].rpartition(".")[2], found["option"]
        cls = next((cls for cls in classes if cls.__name__ == name), None)
        return InputError(f"{name} has no option '{option}'{nearest(option, _options(cls))}")
    if found := re.search(r"Expected a dot import path string: (\S+)", text):
        name = found.group(1)
        return InputError(f"There is no class '{name}'{nearest(name, (cls.__name__ for cls in classes))}")
    if found := re.search(r"(?:unrecognized arguments: --|does not accept option ')([\w.]+)", text, re.IGNORECASE):
        return _unknown_key(found.group(1), groups)
    if found := re.search(r"Option '([\w.]+)' is not accepted", text):
        return _unknown_key(found.group(1), groups)
    if found := re.search(r"Errors: - (.+?) - Expected a <class 'NoneType'>", text):
        text = re.sub(r"^Problem with given class_path '[\w.]+\.(\w+)': ", r"\1: ", found.group(1))
    text = re.sub(r"a typing\.Literal\[(.+?)\]\.?", r"one of \1.", text.replace('Parser key "', '"'))
    return InputError(re.sub(r"<class '([\w.]+)'>", r"\1", text))


def _options(cls: type | None) -> set[str]:
    """Keyword parameters of a class and, where it passes them on, of its parents."""
    names: set[str] = set()
    for base in inspect.getmro(cls) if cls else ():
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values() if "__init__" in vars(base) else ()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}
        if parameters and not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return names


def _unknown_key(key: str, groups: Mapping[str, type]) -> InputError:
    group, _, rest = key.partition(".")
    if group in groups and rest:
        name = rest.split(".")[0]
        return InputError(f"'{group}' has no key '{name}'{nearest(name, _options(groups[group]))}")
    return InputError(f"There is no key '{group}'{nearest(group, [*groups, 'data', 'model', 'ckpt_path', 'config'])}")
