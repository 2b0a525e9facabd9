"""Which image of a visit is taken, by the entities of its BIDS name (``run-02``, ``rec-norm``, ``space-MNI152``)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from lssl.data.pairs import count
from lssl.utils.errors import InputError

__all__ = ["Choice", "choose", "entities", "parse_select"]

#: Defaults. A visit without such an image keeps all its images, except those with contrast agent.
DEFAULTS = {"ce": ("none",), "space": ("native",), "part": ("mag", "none"), "desc": ("none",)}
#: Repetitions of one contrast: a visit without the entity in any image is not filtered by it.
REPEATED = ("run", "rec")
NATIVE = (None, "orig", "native", "individual", "scanner")
Criteria = dict[str, tuple[str, ...]]


def entities(name: str) -> dict[str, str]:
    """``sub-01_run-02_T1w.nii.gz`` → ``{"sub": "01", "run": "02"}``."""
    return dict(re.findall(r"(?:^|_)([A-Za-z]+)-([A-Za-z0-9+]+)", name))


def parse_select(text: str | Sequence[str]) -> Criteria:
    """``"run=last rec=norm,none space=native"`` → values by entity, the preferred first.

    A value is a value of the entity, ``none`` (an image without it; for space also ``native``), ``any``, ``first`` or
    ``last``.
    """
    parts = text.split() if isinstance(text, str) else [part for one in text for part in str(one).split()]
    found: Criteria = {}
    for part in parts:
        match = re.fullmatch(r"([a-z]+)=([\w+]+(?:,[\w+]+)*)", part)
        if not match or match[1] in ("sub", "ses"):
            raise InputError(
                f"select has {part!r}; write entity=value, such as run=last, rec=norm,none or space=native."
            )
        if match[1] in found:
            raise InputError(f"select names {match[1]} twice; write the values in order of preference, {match[1]}=a,b.")
        found[match[1]] = tuple(match[2].split(","))
    return found


@dataclass
class Choice:
    """What :func:`choose` found.

    Attributes:
        taken: one name per visit; empty where none is left.
        left: ``(visit, name, why)`` of all others.
        notes: which defaults decided something, with counts.
    """

    taken: list[str] = field(default_factory=list)
    left: list[tuple[int, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def choose(visits: Sequence[Sequence[str]], suffix: str, select: str | Sequence[str] = "") -> Choice:
    """One image for each visit.

    ``select`` is applied first, then the defaults: no contrast agent, native space, magnitude, no derivative. If
    several images are left, the last run is taken and, for any other entity, the value of most visits.

    Args:
        visits: names of the images of each visit that end in the suffix.
        suffix: entities in it (``ce-gad_T1w``) override the defaults.
        select: see :func:`parse_select`.
    """
    wanted = parse_select(select)
    named = set(entities(suffix)) | set(wanted)
    defaults = {entity: values for entity, values in DEFAULTS.items() if entity not in named}
    choice = Choice()
    kept = []
    for visit, names in enumerate(visits):
        here = list(names)
        for entity, values in (wanted | defaults).items():
            some = _matching(here, entity, values)
            if not some and entity in defaults and entity != "ce":
                continue
            why = f"{entity}={','.join(values)}" + ("" if entity in wanted else ", the default")
            choice.left += [(visit, name, why) for name in here if name not in some]
            here = some
        kept.append(here)
    for entity, values in wanted.items():
        known = {entities(name).get(entity) for names in visits for name in names}
        if known == {None} and not {"none", "any", "native", "first", "last"} & set(values):
            choice.notes.append(f"select has {entity}={','.join(values)}, but no {suffix} image has {entity}-")
    _settle(kept, choice)
    choice.taken = [names[0] if names else "" for names in kept]
    return choice


def _matching(names: list[str], entity: str, values: Sequence[str]) -> list[str]:
    """The names with the most preferred value that occurs."""
    have = [entities(name).get(entity) for name in names]
    if entity in REPEATED and not any(have):
        return names
    for value in values:
        if value in ("first", "last") and names:
            best = (min if value == "first" else max)(map(_size, have))
            some = [name for name, found in zip(names, have, strict=True) if _size(found) == best]
        else:
            some = [name for name, found in zip(names, have, strict=True) if _is(found, value)]
        if some:
            return some
    return []


def _size(value: str | None) -> tuple[int, int, str]:
    """Order of values: none, then numbers, then words."""
    return (0, 0, "") if value is None else (1, int(value), "") if value.isdecimal() else (2, 0, value)


def _is(found: str | None, value: str) -> bool:
    if value == "any":
        return True
    if value in ("none", "native"):
        return found is None or (value == "native" and found in NATIVE)
    return found is not None and (found.lower() == value.lower() or _size(found) == _size(value))


def _settle(kept: list[list[str]], choice: Choice) -> None:
    """Leaves one name per visit: the last run, the most common value of any other entity, and .nii.gz before .nii."""
    common: dict[str, Counter[str]] = {}
    for names in kept:
        for entity in {entity for name in names for entity in entities(name)}:
            common.setdefault(entity, Counter()).update({entities(name).get(entity, "") for name in names})
        for entity in common:
            if not any(entity in entities(name) for name in names):
                common[entity][""] += bool(names)
    decided: Counter[tuple[str, str]] = Counter()
    for visit, names in enumerate(kept):
        for entity in sorted(common, key=lambda key: (key == "run", key)):
            values = {entities(name).get(entity, "") for name in names}
            if len(values) < 2:
                continue
            best = (
                max(values, key=lambda value: _size(value or None))
                if entity == "run"
                else min(values, key=lambda value: (-common[entity][value], value))
            )
            text = f"{entity}-{best}" if best else f"the image without {entity}-"
            decided[entity, text] += 1
            choice.left += [
                (visit, name, f"{text} is taken, the default")
                for name in names
                if entities(name).get(entity, "") != best
            ]
            names[:] = [name for name in names if entities(name).get(entity, "") == best]
        if len(names) > 1:
            names.sort(key=lambda name: (not name.endswith(".nii.gz"), name))
            choice.left += [(visit, name, f"{names[0]} is taken") for name in names[1:]]
            decided["", "one of several files of the same name"] += 1
            del names[1:]
    for (entity, text), times in sorted(decided.items()):
        other = f" (select {entity}=… to choose)" if entity else ""
        choice.notes.append(f"{count(times, 'visit')} with several images, of which {text} is taken{other}")
