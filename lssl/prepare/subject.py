"""One subject from its files to its prepared visits, record and picture."""

from __future__ import annotations

from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from lssl.data.duplicates import voxel_hash
from lssl.data.nifti import automatic_foreground, read_image, scale
from lssl.prepare.change import measure_change
from lssl.prepare.cohort import CohortSubject, Options
from lssl.prepare.outputs import LOOK, comparable, judge, write_visit
from lssl.prepare.people import by_visit, same_person
from lssl.prepare.register import register
from lssl.prepare.scans import Scans, read_scans, shared_image
from lssl.prepare.transforms import closure, half_way
from lssl.prepare.volumes import FrameGrid, Volume, common_grid, resample, resample_mask, thick
from lssl.utils.files import digest, fingerprint, read_json, write_json
from lssl.utils.memory import refuse_larger_than_memory

__all__ = ["VERSION", "current", "prepare_subject", "read_record", "record_path", "settings"]

VERSION = 5  # raised when the same inputs and options would give other voxels
NEIGHBOURS = 3  # visits further apart in the list are not registered with each other directly


def record_path(out: Path, subject: str) -> Path:
    """Where the record of a finished subject lies."""
    return out / "records" / f"{subject}.json"


def settings(options: Options) -> dict[str, Any]:
    """Everything besides the inputs that the outcome depends on, as JSON."""
    chosen = asdict(options)
    chosen["suffixes"] = list(options.suffixes)
    del chosen["exclude"]  # which visits there are is no setting
    chosen["version"] = VERSION
    if not options.nonrigid:  # folders that were prepared before there were fields stay finished
        del chosen["nonrigid"]
    if options.missing_channels == "drop":
        del chosen["missing_channels"]
    if options.template:
        chosen["template"] = fingerprint(options.template)["hash"]
    return chosen


def _keys(subject: CohortSubject, options: Options, inputs: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """Hashes of what the registration depends on, and of what the voxels depend on."""
    chosen = settings(options)
    hashes = {path: entry["hash"] for path, entry in inputs.items()}
    registered = [
        {
            "session": session.name,
            "images": {suffix: hashes[path] for suffix, path in session.images.items()},
            "mask": hashes.get(session.mask),
        }
        for session in subject.sessions
    ]
    registration = digest(
        [registered, [chosen[name] for name in ("suffixes", "transform", "n4", "masks", "template", "version")]]
    )
    labels = [hashes.get(session.label) for session in subject.sessions]
    return registration, digest([registration, labels, chosen])


def read_record(out: Path, name: str) -> dict[str, Any] | None:
    """What is recorded of a subject; ``None`` if nothing is, or it is damaged: the subject is prepared again."""
    record = read_json(record_path(out, name))
    kinds = {"inputs": dict, "visits": list, "left": dict, "key": str, "settings": str}
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
        return None
    cells = [visit.get(key) for visit in record["visits"] if isinstance(visit, dict) for key in ("session", "image")]
    whole = len(cells) == 2 * len(record["visits"]) and all(isinstance(cell, str) for cell in cells)
    return record if whole else None


def current(subject: CohortSubject, options: Options, out: Path) -> dict[str, Any] | None:
    """The record of a subject whose inputs and parameters have not changed since, and whose files are there."""
    record = read_record(out, subject.name)
    if not record or record.get("error"):
        return None
    inputs = _inputs(subject, record["inputs"])
    files = [out / row[key] for row in record["visits"] for key in ("image", "field") if row.get(key)]
    if _keys(subject, options, inputs)[1] != record["key"] or not all(path.is_file() for path in files):
        return None
    return record


def _inputs(subject: CohortSubject, known: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Fingerprints of all files; one that is not there has an empty hash."""
    found = {}
    for path in subject.files():
        try:
            found[path] = fingerprint(path, known.get(path))
        except OSError:
            found[path] = {"hash": ""}
    return found


def prepare_subject(subject: CohortSubject, options: Options, out: Path) -> dict[str, Any]:
    """Registers, resamples and writes the visits of one subject; its record is written last.

    A visit, mask or label map that cannot be used is left out, with the reason in the record.

    Raises:
        InputError: with the reason, in one sentence, if no visit is left; then nothing of the subject is finished.
    """
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    earlier = read_record(out, subject.name) or {}
    _sweep(out, subject)
    inputs = _inputs(subject, earlier.get("inputs", {}))
    registration, key = _keys(subject, options, inputs)
    scans = read_scans(subject, options)
    linear = thick(chain.from_iterable(scans.images), options.spacing)
    for volume in chain.from_iterable(scans.images):
        volume.linear = linear
    if earlier.get("registration_key") == registration:
        found = earlier["registration"]
    else:
        found = _registration(scans, options)
    to_frame = np.array(found["template"]) if found["template"] else np.eye(4)
    maps = [np.array(matrix) @ to_frame for matrix in found["maps"]]
    firsts = [images[0] for images in scans.images]
    grid = _grid(subject.name, firsts, maps, options)
    channels = [[np.array(matrix) for matrix in matrices] for matrices in found["channels"]]
    rows = [
        write_visit(subject.name, scans, number, maps, channels[number], grid, options, out)
        for number in range(len(scans.sessions))
    ]
    for session, row in zip(scans.sessions, rows, strict=True):
        first = next(iter(session.images.values()))
        row["voxel_hash"], row["image_hash"] = voxel_hash(first), inputs[first]["hash"]
    judge(subject.name, *comparable(scans, maps, channels), rows, found, options, out)
    change = measure_change(scans, rows, maps, options, out) if options.nonrigid else []
    record = {
        "subject": subject.name,
        "key": key,
        "registration_key": registration,
        "settings": digest(settings(options)),
        "inputs": inputs,
        "registration": found,
        "visits": rows,
        "change": change,
        "left": scans.left,
        "overlays_left": scans.overlays_left,
    }
    write_json(record_path(out, subject.name), record)
    return record


def _grid(subject: str, firsts: list[Volume], maps: list[np.ndarray], options: Options) -> FrameGrid:
    """The grid of a subject, if there is memory for it."""
    if options.template:
        grid = common_grid([_template(options.template)], [np.eye(4)], options.spacing, options.margin)
    else:
        grid = common_grid(firsts, maps, options.spacing, options.margin)
    voxels = int(np.prod(grid.size, dtype=np.float64))
    size = "×".join(map(str, grid.size))
    refuse_larger_than_memory(
        voxels * (8 * len(options.suffixes) + 8),
        f"The grid of {subject} ({size} voxels of {options.spacing:g} mm)",
        "choose a larger --spacing, or correct the voxel sizes in its headers",
    )
    return grid


def _sweep(out: Path, subject: CohortSubject) -> None:
    """Removes what a killed run left half-written."""
    # The dot keeps sub-1 away from what another process is writing of sub-10.
    places = {out / "visits" / subject.name: ".*.part"}
    places |= dict.fromkeys((out / "pictures", out / "records"), f".{subject.name}.*.part")
    for folder, pattern in places.items():
        for part in folder.glob(pattern):
            part.unlink(missing_ok=True)


def _template(path: str) -> Volume:
    voxels, affine = read_image(path)
    return Volume(voxels, affine, automatic_foreground(voxels))


def _registration(scans: Scans, options: Options) -> dict[str, Any]:
    """All maps of a subject, as JSON.

    ``maps``: half-way frame → each visit; ``channels``: per visit, its first image → each of its images; ``template``:
    template → half-way frame, if one was asked for. Then figures: ``disagreement``, ``closure`` and
    ``same_person`` by visit. Two visits are registered by the first suffix that both have; without one, by the first
    image of each.
    """
    firsts, number = [images[0] for images in scans.images], len(scans.images)
    kind: Any = options.transform
    channels = [[np.eye(4), *(register(images[0], other).matrix for other in images[1:])] for images in scans.images]
    matches, persons = {}, {}
    for i in range(number):
        for j in range(i + 1, min(i + NEIGHBOURS, number - 1) + 1):
            one, two = shared_image(scans.sessions[i], scans.sessions[j])
            images = scans.images[i][one], scans.images[j][two]
            match = register(*images, kind)
            persons[i, j] = same_person(*images, match.matrix)
            match.matrix = np.linalg.inv(channels[j][two]) @ match.matrix @ channels[i][one]
            matches[i, j] = match
    measured = {pair: match.matrix for pair, match in matches.items()}
    maps = half_way(number, measured)
    template = _to_template(firsts, maps, options)
    return {
        "maps": [matrix.tolist() for matrix in maps],
        "channels": [[matrix.tolist() for matrix in visit] for visit in channels],
        "template": None if template is None else template.tolist(),
        "disagreement": _worst(number, {pair: match.disagreement for pair, match in matches.items()}),
        "closure": closure(measured, firsts[0].points()),
        "same_person": by_visit(number, persons),
    }


def _worst(number: int, figures: dict[tuple[int, int], float]) -> list[float]:
    """Mean figure of each visit's pairs; NaN for a single visit."""
    own = [[value for pair, value in figures.items() if visit in pair] for visit in range(number)]
    return [float(np.mean(values)) if values else float("nan") for values in own]


def _to_template(firsts: list[Volume], maps: list[np.ndarray], options: Options) -> np.ndarray | None:
    """Affine map of template points into the half-way frame, from the mean of the registered visits."""
    if not options.template:
        return None
    grid = common_grid(firsts, maps, LOOK, 12.0)
    images = [resample(volume, grid, matrix) for volume, matrix in zip(firsts, maps, strict=True)]
    masks = [
        resample_mask(volume.foreground, volume.affine, grid, matrix)
        for volume, matrix in zip(firsts, maps, strict=True)
    ]
    scaled = [scale(image, mask) for image, mask in zip(images, masks, strict=True)]
    mean = Volume(np.mean(scaled, 0).astype(np.float32), grid.affine, np.mean(masks, 0) >= 0.5, firsts[0].brain)
    return np.linalg.inv(register(mean, _template(options.template), "affine").matrix)
