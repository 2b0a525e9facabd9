"""Composes a config from files, data and options, by one rule for every command and for benchmark plans.

**Precedence.** Later items override earlier ones, in any order of the arguments:

1. network and view size of the checkpoint that a run starts from, if no file or option names a network
2. the files of ``--config``, in their order; the ``base`` of a file comes before the file
3. ``--data``
4. all other options, in their order

**Merging.** Mappings merge key by key; everything else is replaced: lists, and a mapping that an option gives
(``--key {a: 1}``). A new class drops the arguments of the former class; for the model, a file of ``--config`` may not
do so to an earlier one. Arguments without a class (``init_args`` alone) apply to the current class. Data are the one
exception: options that the method needs of any data (:data:`OF_THE_RECIPE`) stay when the class of the data changes, so
that other data never change a recipe. A new network drops the taps and tokens of the former network.

**Files.** A config is a file, or a shipped one by its name: ``longitudinal_local``, ``network/unet``. ``base: [FILE,
…]`` names other configs, relative to the file or shipped. ``data: PATH`` means the same as ``--data PATH``. Values may
refer to other values, ``${views.size}``, to environment variables, ``${oc.env:NAME}``, and enlarge a size,
``${times:${views.size},1.3}``. A value from the environment is never saved; its reference is saved instead.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lssl.cli.references import resolved
from lssl.cli.settings import refuse_another_model
from lssl.data.recognise import Found, recognise
from lssl.utils.errors import InputError, nearest

__all__ = ["OF_THE_RECIPE", "Config", "compose", "find_config", "load", "merged", "sources_of", "without_data"]

#: Options of any datamodule that belong to the method; the others (paths, split, seed, …) belong to the data.
OF_THE_RECIPE = (
    "balance",
    "batch_size",
    "few_shot",
    "max_interval",
    "min_interval",
    "num_workers",
    "pairs",
    "pairs_per_subject",
    "single_visits",
    "source_size",
    "transform",
    "visits_per_item",
)
CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")

Key = tuple[str, ...]


@dataclass
class Config:
    """Settings, and the source of each.

    Attributes:
        values: nested, with references as they were written.
        sources: of each leaf, the file or option that gave it.
        found: the recognised kind of the data, if they were given by a path.
    """

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[Key, str] = field(default_factory=dict)
    found: Found | None = None

    def add(self, layer: Mapping[str, Any], source: str = "") -> Config:
        """Merges a layer over the settings."""
        self._merge(self.values, layer, (), source)
        return self

    def set(self, key: str, text: str) -> Config:
        """Merges an option, ``--key text``, over the settings.

        ``init_args`` may be left out of the key; ``key+`` appends to a list; a key below one that holds the name of a
        class is an argument of that class.
        """
        appended, parts = key.endswith("+"), key.rstrip("+").split(".")
        self._put(self.values, parts, _value(text), (), f"--{key}", appended)
        return self

    def _put(
        self, node: dict[str, Any], parts: Sequence[str], value: Any, path: Key, source: str, appended: bool
    ) -> None:
        if "class_path" in node and parts[0] not in CLASS_KEYS:
            node, path = node.setdefault("init_args", {}), (*path, "init_args")
        length = next((n for n in range(len(parts), 1, -1) if ".".join(parts[:n]) in node), 1)  # as tap names have dots
        name, rest = ".".join(parts[:length]), list(parts[length:])
        old = node.get(name)
        if rest == ["class_path"]:
            self._merge(node, {name: {"class_path": value}}, path, source)
        elif rest:
            if isinstance(old, list) and old:  # the last of several callbacks
                node, name, path = old, len(old) - 1, (*path, name)  # type: ignore[assignment]
                old = old[-1]
            if isinstance(old, str):
                old = {"class_path": old}
            node[name] = old if isinstance(old, dict) else {}
            self._put(node[name], rest, value, (*path, str(name)), source, appended)
        elif appended:
            items = old if isinstance(old, list) else [] if old is None else [old]
            self._merge(node, {name: [*items, *(value if isinstance(value, list) else [value])]}, path, source)
        else:
            if isinstance(value, Mapping) and not {*CLASS_KEYS} & {
                *value
            }:  # a mapping given as an option replaces the former one
                self._forget((*path, name))
                node.pop(name, None)
            self._merge(node, {name: value}, path, source)

    def _merge(self, node: dict[str, Any], layer: Mapping[str, Any], path: Key, source: str) -> None:
        for key, value in layer.items():
            here = (*path, str(key))
            if here == ("data",):
                value = self._data(value)
            old = node.get(key)
            if isinstance(old, str) and isinstance(value, Mapping) and "init_args" in value:
                old = node[key] = {"class_path": old}
                self.sources[(*here, "class_path")] = self.sources.pop(here, "")
            if isinstance(value, str) and isinstance(old, Mapping) and {*CLASS_KEYS} & {*old}:
                value = {"class_path": value}
            if not isinstance(value, Mapping):
                self._forget(here)
                node[key], self.sources[here] = copy.deepcopy(value), source
                continue
            if not isinstance(old, dict):
                self._forget(here)
                node[key] = {}
            elif here == ("backbone",) and _other_network(old, value):
                for name in ("taps", "tokens"):
                    self._forget((*here, name))
                    old.pop(name, None)
            elif _other_class(old, value):
                self._forget(here, OF_THE_RECIPE if here == ("data",) else ())
                node[key] = {"init_args": _of_the_recipe(old)} if here == ("data",) else {}
            if not value and not node[key]:
                self.sources[here] = source
            self._merge(node[key], value, here, source)

    def _data(self, value: Any) -> Any:
        """Settings of the data; a path becomes the datamodule that reads it."""
        if isinstance(value, Mapping):
            self.found = None if "class_path" in value else self.found
            return value
        self.found = None
        if not isinstance(value, str):
            return value
        if value in _datamodules() or (value.replace(".", "").isidentifier() and not Path(value).exists()):
            return {"class_path": value}
        self.found = recognise(resolved({"data": value})["data"])
        where = {key: value if at == self.found.path else at for key, at in self.found.init_args.items()}
        return {"class_path": self.found.class_path, "init_args": where}

    def _forget(self, path: Key, kept: Sequence[str] = ()) -> None:
        """Drops the sources below a key, except those of some arguments."""
        depth = len(path)
        for key in [key for key in self.sources if key[:depth] == path]:
            if key[depth + 1 : depth + 2] not in [(name,) for name in kept]:
                del self.sources[key]


def compose(
    files: Iterable[str],
    data: str | None = None,
    options: Iterable[tuple[str, str]] = (),
    lowest: Mapping[str, Any] | None = None,
    source: str = "",
) -> Config:
    """The config of files, data and options; this module's docstring has the rule.

    Args:
        files: of ``--config``.
        data: of ``--data``: a path, or the name of a class.
        options: keys and texts of all other options.
        lowest: a layer that all others override.
        source: name of that layer.
    """
    config = Config()
    if lowest:
        config.add(lowest, source)
    for name in files:
        before = copy.deepcopy(config.values.get("model"))
        for path, layer in load(name):
            config.add(layer, path)
        if isinstance(before, Mapping) and _other_class(before, after := config.values["model"]):
            refuse_another_model(before, after, name)
    if data is not None:
        config.set("data", data)
    for key, text in options:
        config.set(key, text)
    return config


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merges nested settings by the rule of this module; later ones override."""
    config = Config()
    for layer in layers:
        config.add(layer)
    return config.values


def without_data(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config without its data, but with the data options that belong to the method."""
    return {**values, "data": {"init_args": _of_the_recipe(values.get("data") or {})}}


def sources_of(values: Any, sources: Mapping[tuple[str, ...], str], path: tuple[str, ...] = ()) -> Iterator[str]:
    """A line for each value: key, value, and its file or option."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from sources_of(value, sources, (*path, str(key)))
        return
    known = next((sources[path[:n]] for n in range(len(path), 0, -1) if path[:n] in sources), "default")
    text = yaml.safe_dump(values, default_flow_style=True, width=10**6, allow_unicode=True).splitlines()[0]
    yield f"{'.'.join(path)}: {text}  # {known}"


# --- files ------------------------------------------------------------------------------------------------------------


def find_config(name: str, beside: Path | None = None) -> Path:
    """Finds a config beside another one, in the working directory, or among the shipped ones; ``.yaml`` is optional.

    Args:
        name: a path, or the name of a shipped config.
        beside: the folder of the file that names it.
    """
    for folder in (Path() if beside is None else beside, Path()):
        for path in (folder / name, folder / f"{name}.yaml"):
            if path.is_file():
                return Path(os.path.normpath(path))
    ours = shipped_folder().joinpath(*[part for part in Path(name).parts if part != "configs"])
    ours = ours if ours.suffix == ".yaml" else ours.with_name(f"{ours.name}.yaml")
    if ours.is_file():
        return ours
    names = [str(path.relative_to(shipped_folder()).with_suffix("")) for path in shipped_folder().rglob("*.yaml")]
    raise InputError(f"There is no config {name}{nearest(name.removeprefix('configs/').removesuffix('.yaml'), names)}")


def shipped_folder() -> Path:
    """The folder of shipped configs: within the package, or beside it in an editable install."""
    package = Path(__file__).parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def load(name: str, beside: Path | None = None, within: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The layers of a file, each with its path: first those of its bases, then its own.

    Args:
        name: see :func:`find_config`.
        beside: see :func:`find_config`.
        within: the files that led here.
    """
    path = find_config(name, beside)
    if path.resolve() in within:
        circle = " → ".join(str(one) for one in (*within[within.index(path.resolve()) :], path.resolve()))
        raise InputError(f"The base of a config leads back to itself: {circle}.")
    content = _read(path)
    bases = content.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise InputError(f"base in {path} is a file or a list of files, not {bases!r}.")
    layers = []
    for base in bases:
        try:
            layers += load(base, path.parent, (*within, path.resolve()))
        except InputError as error:
            if str(error).startswith(f"There is no config {base}"):
                raise InputError(f"{path} names a base that does not exist. {error}") from None
            raise
    return [*layers, (_label(path), content)]


def _label(path: Path) -> str:
    """The name of a shipped config, valid from any folder."""
    ours = shipped_folder()
    return f"configs/{path.relative_to(ours)}" if path.is_relative_to(ours) else str(path)


def _read(path: Path) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        node = OmegaConf.load(path)
        content = OmegaConf.to_container(node, resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no settings.")
    return {str(key): value for key, value in content.items()}


# --- values -----------------------------------------------------------------------------------------------------------


def _value(text: str) -> Any:
    """The value of an option's text if it is not a plain value; the parser reads plain ones, as it knows types."""
    import yaml

    if text.strip()[:1] in ("{", "[") or text.strip() in ("null", "~"):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return text


def _other_class(old: Any, new: Any) -> bool:
    named = [part.get("class_path") if isinstance(part, Mapping) else None for part in (old, new)]
    names = [str(name or "").rpartition(".")[2] for name in named]
    return all(names) and names[0] != names[1]


def _other_network(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a layer names another network; taps belong to their network and are dropped with it."""
    before, named = (part.get("network") or {} for part in (old, new))
    return isinstance(named, Mapping) and bool(named.get("class_path")) and (not before or _other_class(before, named))


def _of_the_recipe(node: Mapping[str, Any]) -> dict[str, Any]:
    given = node.get("init_args")
    return {key: value for key, value in given.items() if key in OF_THE_RECIPE} if isinstance(given, Mapping) else {}


@cache
def _datamodules() -> set[str]:
    from importlib.metadata import entry_points

    return {point.name for point in entry_points(group="lssl.datamodules")}
