"""Turns the config parser's messages on wrong keys and values into one sentence with the nearest valid name."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jsonargparse import ArgumentError

from lssl.cli.registered import TASKS
from lssl.utils.errors import InputError, nearest

__all__ = ["explain", "refuse_unknown"]


def refuse_unknown(values: Mapping[str, Any], known: Mapping[str, Any], groups: Iterable[str]) -> None:
    """Refuses a key that no group has.

    Args:
        values: nested settings.
        known: all top-level keys, and the keys of each group.
        groups: the groups whose keys are options of one class.
    """
    for key, value in values.items():
        if key not in known:
            raise InputError(f"There is no key '{key}'{_nearest_key(str(key), known)}")
        if key in groups and isinstance(value, Mapping):
            for name in value:
                if name not in known[key]:
                    raise InputError(f"'{key}' has no key '{name}'{nearest(str(name), known[key])}")


def _nearest_key(key: str, known: Mapping[str, Any]) -> str:
    """The nearest top-level key, or the full name of an option whose group was left out: ``trainer.max_steps``."""
    full = {name: f"{group}.{name}" for group, names in known.items() if isinstance(names, Mapping) for name in names}
    near = difflib.get_close_matches(key, [*known, *full], n=1, cutoff=0.6)
    return f"; did you mean '{full.get(near[0], near[0])}'?" if near else nearest(key, known)


# The wording of jsonargparse that we parse; tests/cli/test_messages.py fails when it changes.
NO_OPTION = (
    re.compile(r"Problem with given class_path '(?P<path>[\w.]+)': Option '(?P<option>[\w.]+)' is not accepted"),
    re.compile(r"Option '(?P<option>[\w.]+)' is not accepted. Got value: Namespace\(class_path='(?P<path>[\w.]+)'"),
)
NO_CLASS = re.compile(r"Expected a dot import path string: (?P<name>\S+)")
NO_SUBCLASS = re.compile(
    r"(?:Import path |Expected ')(?P<path>[\w.]+)(?: does not correspond to a subclass of |' to be .+? (?:of|returns) )"
    r"(?:<class ')?(?P<base>\w+)"
)
NO_PATH = re.compile(r"- Expected a path but \S+ either not accessible or invalid - ")
OF_A_UNION = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: \[(?P<types>.+?)\] Errors: - (?P<first>.+) "
    r"Given value type: .+? Given value: (?P<value>.+)$"
)


def explain(error: ArgumentError, classes: Iterable[type]) -> InputError:
    """One sentence for a parser's error.

    Args:
        error: as raised by jsonargparse.
        classes: the classes that ``class_path`` may give by their short names.
    """
    text = NO_PATH.sub("", " ".join(str(error).split()))
    classes = list(classes)
    if found := NO_OPTION[0].search(text) or NO_OPTION[1].search(text):
        name, option = found["path"].rpartition(".")[2], found["option"]
        cls = next((cls for cls in classes if cls.__name__ == name), None)
        by_name = {one.__name__: one for one in classes}
        owner = next((task for task in TASKS if option in _options(by_name.get(task))), "")
        if _pretrains(cls) and owner:
            return InputError(
                f"{name} pretrains and has no option '{option}', which the {owner} has; to fine-tune, give --config "
                f"{TASKS[owner]} instead of this recipe or run, and --model.init_args.pretrained "
                f"RUN/checkpoints/last.ckpt."
            )
        return InputError(f"{name} has no option '{option}'{nearest(option, _options(cls))}")
    if found := NO_CLASS.search(text):
        return InputError(f"There is no class '{found['name']}'{nearest(found['name'], (c.__name__ for c in classes))}")
    if found := NO_SUBCLASS.search(text):
        key = ("class_path", *re.findall(r'Parser key "([\w.]+)"', text[: found.start()]))[-1]
        return InputError(
            f"{key}: {found['path']} is no {found['base']}; give a class that is one, or a function that says in its "
            f"return annotation that it makes one."
        )
    text = re.sub(r"^Problem with given class_path '[\w.]+\.(\w+)': ", r"\1: ", _first_reason(text))
    text = re.sub(r"a typing\.Literal\[(.+?)\]\.?", r"one of \1.", text.replace('Parser key "', '"'))
    return InputError(re.sub(r"<class '([\w.]+)'>", r"\1", text))


def _first_reason(text: str) -> str:
    """Message for a type with alternatives: the first one's message for a class, or the list of plain types."""
    found = OF_A_UNION.search(text)
    if not found:
        return text
    first = found["first"].removesuffix(" - Expected a <class 'NoneType'>")
    if first.startswith(("Problem with", "Parser key")):
        return _first_reason(first)
    return f"{text[: found.start()]}Expected one of {found['types']}. Got value: {found['value']}"


def _pretrains(cls: type | None) -> bool:
    return cls is not None and any(base.__name__ == "Strategy" for base in inspect.getmro(cls))


def _options(cls: type | None) -> set[str]:
    """Keyword parameters of a class and, if it passes them on, of its parents."""
    names: set[str] = set()
    for base in inspect.getmro(cls) if cls else ():
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values() if "__init__" in vars(base) else ()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}
        if parameters and not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return names
