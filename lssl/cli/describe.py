"""``lssl strategies [NAME]`` and ``lssl datamodules [NAME]``: what a class does, its options, paper and recipes."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from lssl.cli.registered import TASKS, load_class, registered_points, task_class
from lssl.utils.errors import InputError, nearest

__all__ = ["describe_class", "list_classes", "recipes", "registered_names"]

GROUPS = {"strategies": "lssl.strategies", "datamodules": "lssl.datamodules"}
KEYS = {"strategies": "model", "datamodules": "data"}
CITED = re.compile(r"arXiv|\bdoi\b|https?://")
YEAR = re.compile(r"\b(?:19|20)\d\d\b")
PASSED = ("self", "backbone", "views")  # groups of their own in a config
WIDTH = 110


def registered_names(group: str) -> list[str]:
    """Names of the registered classes of ``strategies`` or ``datamodules``, third parties' too; imports none."""
    return sorted({point.name for point in entry_points(group=GROUPS[group])})


def list_classes(group: str) -> None:
    """Prints every class of a group with the first line of its docstring."""
    names = registered_names(group)
    for point in registered_points(GROUPS[group]):
        cls = load_class(point)
        if cls is None:
            continue
        line = (cls.__doc__ or "").strip().splitlines()
        print(f"{point.name:<24}{line[0] if line else ''}")
    if names:
        print(f"Next: lssl {group} {names[0]}")


def describe_class(group: str, name: str) -> None:
    """Prints a class: its docstring, its options with defaults, what it is based on, and the recipes that use it.

    Args:
        group: ``strategies`` or ``datamodules``.
        name: of the class; the tasks (:data:`.registered.TASKS`), which no group lists, are known as well.
    """
    found = next((point for point in registered_points(GROUPS[group]) if point.name == name), None)
    if found is None and not (group == "strategies" and name in TASKS):
        raise InputError(f"There is no {group[:-1].replace('strategie', 'strategy')} {name}{_near(group, name)}")
    cls = load_class(found) if found else task_class(name)
    if cls is None:
        raise InputError(f"{name} cannot be imported; mend or remove the package that registers it.")
    text = inspect.getdoc(cls) or ""
    print(f"{name} ({cls.__module__})\n")
    print(_plain(text.split("\nArgs:")[0].split("\nAttributes:")[0].strip()))
    for home, options in _options(cls):
        own = home is cls
        print(f"\nOptions{'' if own else f' of every {home.__name__}'}, --{KEYS[group]}.init_args.NAME:")
        for parameter, description in options:
            print(_option(parameter, description))
    if papers := _papers(cls):
        print("\nPaper:")
        print("\n".join(textwrap.fill(paper, WIDTH, initial_indent="  ", subsequent_indent="  ") for paper in papers))
    print(_recipe_lines(group, name))


def recipes(group: str, name: str) -> dict[str, str]:
    """Shipped configs that use a class: name → the first sentence of their comment."""
    return {recipe: words for recipe, used, words in _shipped(KEYS[group]) if used == name}


@cache
def _shipped(key: str) -> list[tuple[str, str, str]]:
    """Name, class of ``model`` or ``data``, and first sentence of every shipped config."""
    from lssl.cli.compose import load, shipped_folder

    found = []
    for path in sorted(shipped_folder().rglob("*.yaml")):
        used = ""
        for _, layer in load(str(path)):
            node = layer.get(key)
            used = str((node.get("class_path") if isinstance(node, dict) else node) or used)
        found.append((str(path.relative_to(shipped_folder()).with_suffix("")), used.rpartition(".")[2], _comment(path)))
    return found


def _recipe_lines(group: str, name: str) -> str:
    found = recipes(group, name)
    lines = [f"  {recipe:<34}{sentence}".rstrip() for recipe, sentence in found.items()]
    if group == "datamodules":
        start = f"lssl fit --config longitudinal_infonce --data {name} --print_config"
    else:
        data = "--data PhantomDataModule --print_config"
        start = f"lssl fit --config {shlex.quote(next(iter(found)))} {data}" if found else ""
    shipped = "\n".join(["\nRecipes (--config NAME):", *lines]) if lines else "\nNo shipped recipe uses it."
    return f"{shipped}\n\nNext: {start}" if start else shipped


def _near(group: str, name: str) -> str:
    return nearest(name, [*registered_names(group), *(TASKS if group == "strategies" else ())])


def _options(cls: type) -> Iterator[tuple[type, list[tuple[inspect.Parameter, str]]]]:
    """Options by the class whose constructor has them: the class first, then those that it passes others on to."""
    seen = {*PASSED}
    for base in inspect.getmro(cls):
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())
        documented = _documented(base)
        rows = [
            (parameter, documented.get(parameter.name, ""))
            for parameter in parameters
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and parameter.name not in seen
        ]
        seen |= {parameter.name for parameter, _ in rows}
        if rows:
            yield base, rows
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
            return


def _documented(cls: type) -> dict[str, str]:
    from docstring_parser import DocstringStyle, parse

    parsed = parse(inspect.getdoc(cls) or "", DocstringStyle.GOOGLE)
    return {entry.arg_name: " ".join((entry.description or "").split()) for entry in parsed.params}


def _option(parameter: inspect.Parameter, description: str) -> str:
    default = "must be given" if parameter.default is parameter.empty else f"default {_value(parameter.default)}"
    words = f"{_type(parameter.annotation)}, {default}: {_null(_plain(description))}".removeprefix(", ").rstrip(": ")
    head = f"  {parameter.name:<24}"
    return textwrap.fill(
        words, WIDTH, initial_indent=head if len(head) < 28 else f"{head} ", subsequent_indent=" " * 26
    )


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    if value == "":
        return "''"
    return value.__name__ if inspect.isclass(value) or inspect.isfunction(value) else str(value)


def _type(annotation: Any) -> str:
    """An annotation in the words of a config."""
    if annotation is inspect.Parameter.empty:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(
        r"Literal\[(.+?)\]", lambda found: found[1].replace(", ", " | ").replace("'", "").replace('"', ""), text
    )
    return _null(re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text))


def _null(text: str) -> str:
    """None as YAML writes it."""
    return re.sub(r"\bNone\b", "null", text)


def _plain(text: str) -> str:
    """Without reStructuredText's marks."""
    return re.sub(r":\w+:`[~!.]*([^`]+)`", r"\1", text).replace("``", "")


def _papers(cls: type) -> list[str]:
    """Paragraphs of the module's docstring that cite a publication, or sentences of the class's that name a year."""
    module = inspect.getdoc(sys.modules[cls.__module__]) or ""
    found = [" ".join(part.split()) for part in module.split("\n\n")[:6] if CITED.search(part)]
    if not found:
        first = (inspect.getdoc(cls) or "").split("\nArgs:")[0]
        found = [" ".join(part.split()) for part in re.split(r"(?<=[.])\s", first) if YEAR.search(part)]
    return [_plain(part) for part in found]


def _comment(path: Path) -> str:
    """The first sentence of a config's leading comment."""
    lines: Sequence[str] = path.read_text(encoding="utf-8").splitlines()
    text = ""
    for line in lines:
        if not line.startswith("#"):
            break
        text += f" {line.strip('# ')}"
    return textwrap.shorten(re.split(r"(?<=[.])\s", text.strip())[0], 76, placeholder=" …")
