"""One subject from its files to its prepared visits, record and picture."""

from __future__ import annotations

from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from lssl.data.duplicates import voxel_hash
from lssl.data.nifti import (
    automatic_foreground,
    intensity_range,
    read_grid,
    read_image,
    read_label,
    read_mask,
    scale,
)
from lssl.data.store import write_stored
from lssl.prepare import quality
from lssl.prepare.cohort import AUTO, CohortSubject, Options, Session
from lssl.prepare.picture import draw_subject
from lssl.prepare.register import Match, mirror_gain, register
from lssl.prepare.transforms import closure, displacement, half_way, rotation_degrees
from lssl.prepare.volumes import FrameGrid, Volume, common_grid, resample, resample_label, resample_mask, thick
from lssl.utils.errors import InputError
from lssl.utils.files import digest, fingerprint, read_json, write_json

__all__ = ["VERSION", "current", "prepare_subject", "record_path", "settings"]

VERSION = 1  # raised when the same inputs and options would give other voxels
LOOK = 2.0  # mm of the grid on which figures are computed and pictures drawn
FARTHEST = 800.0  # mm that the picture before registration may span
NEIGHBOURS = 3  # visits further apart in the list are not registered with each other directly


def record_path(out: Path, subject: str) -> Path:
    """Where the record of a finished subject lies."""
    return out / "records" / f"{subject}.json"


def settings(options: Options) -> dict[str, Any]:
    """Everything besides the inputs that the outcome depends on, as JSON."""
    chosen = asdict(options)
    chosen["suffixes"] = list(options.suffixes)
    chosen["version"] = VERSION
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


def current(subject: CohortSubject, options: Options, out: Path) -> dict[str, Any] | None:
    """The record of a subject whose inputs and parameters have not changed since, and whose files are there."""
    record = read_json(record_path(out, subject.name))
    if not record or record.get("error"):
        return None
    try:
        inputs = {path: fingerprint(path, record["inputs"].get(path)) for path in subject.files()}
    except OSError:
        return None
    files = [out / row["image"] for row in record["visits"]]
    if _keys(subject, options, inputs)[1] != record["key"] or not all(path.is_file() for path in files):
        return None
    return record


def prepare_subject(subject: CohortSubject, options: Options, out: Path) -> dict[str, Any]:
    """Registers, resamples and writes the visits of one subject; its record is written last.

    Raises:
        InputError: with the reason, in one sentence; then nothing of the subject counts as finished.
    """
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    earlier = read_json(record_path(out, subject.name)) or {}
    known = earlier.get("inputs", {})
    _sweep(out, subject)
    inputs = {path: fingerprint(path, known.get(path)) for path in subject.files()}
    registration, key = _keys(subject, options, inputs)
    scans = [_scans(session, options) for session in subject.sessions]
    linear = thick(chain.from_iterable(scans), options.spacing)
    for volume in chain.from_iterable(scans):
        volume.linear = linear
    if earlier.get("registration_key") == registration:
        found = earlier["registration"]
    else:
        found = _registration(scans, options)
    frame = [np.array(matrix) for matrix in found["maps"]]
    to_frame = np.array(found["template"]) if found["template"] else np.eye(4)
    maps = [matrix @ to_frame for matrix in frame]
    firsts = [images[0] for images in scans]
    if options.template:
        grid = common_grid([_template(options.template)], [np.eye(4)], options.spacing, options.margin)
    else:
        grid = common_grid(firsts, maps, options.spacing, options.margin)
    rows = [
        _visit(subject.name, session, images, matrix, [np.array(m) for m in channels], grid, options, out)
        for session, images, matrix, channels in zip(subject.sessions, scans, maps, found["channels"], strict=True)
    ]
    for session, row in zip(subject.sessions, rows, strict=True):
        row["voxel_hash"] = voxel_hash(session.images[options.suffixes[0]])
        row["image_hash"] = inputs[session.images[options.suffixes[0]]]["hash"]
    _judge(subject, rows, firsts, maps, found, options, out)
    record = {
        "subject": subject.name,
        "key": key,
        "registration_key": registration,
        "settings": digest(settings(options)),
        "inputs": inputs,
        "registration": found,
        "visits": rows,
    }
    write_json(record_path(out, subject.name), record)
    return record


def _sweep(out: Path, subject: CohortSubject) -> None:
    """Removes what a killed run left half-written."""
    # The dot keeps sub-1 away from what another process is writing of sub-10.
    places = {out / "visits" / subject.name: ".*.part"}
    places |= dict.fromkeys((out / "pictures", out / "records"), f".{subject.name}.*.part")
    for folder, pattern in places.items():
        for part in folder.glob(pattern):
            part.unlink(missing_ok=True)


# --- reading ----------------------------------------------------------------------------------------------------------


def _scans(session: Session, options: Options) -> list[Volume]:
    """The visit's images with their foregrounds, one per suffix."""
    found = []
    for number, path in enumerate(session.images.values()):
        _check_orientation(path)
        grid = read_grid(path)
        voxels, affine = read_image(path)
        foreground = None
        if session.mask and number == 0:
            if read_grid(session.mask).same(grid):
                foreground = read_mask(session.mask)
            elif options.masks != AUTO:
                raise InputError(
                    f"The mask {session.mask} does not lie on the grid of {path}; resample it to the image."
                )
        volume = Volume(
            voxels,
            affine,
            automatic_foreground(voxels) if foreground is None else foreground,
            brain=foreground is not None,
        )
        if options.n4:
            volume.voxels = _without_bias(volume)
        found.append(volume)
    return found


def _check_orientation(path: str) -> None:
    header: Any = nib.load(path).header
    if hasattr(header, "get_sform") and int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        raise InputError(
            f"{path} says nothing of its orientation (sform and qform codes are 0), so left and right cannot be told "
            f"apart; restore the header, for example by converting the scan again."
        )


def _without_bias(volume: Volume) -> np.ndarray:
    """The image divided by N4's bias field, which is estimated at about 4 mm."""
    from lssl.prepare.volumes import to_itk

    image, mask = (
        to_itk(volume.voxels - volume.voxels.min() + 1, volume.affine),
        to_itk(volume.foreground, volume.affine),
    )
    factors = [max(1, round(4 / spacing)) for spacing in image.GetSpacing()]
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations([30, 30, 30])
    small_mask = sitk.Cast(sitk.BinShrink(sitk.Cast(mask, sitk.sitkFloat32), factors) > 0.5, sitk.sitkUInt8)
    n4.Execute(sitk.BinShrink(image, factors), small_mask)
    field = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(image)).T
    return (volume.voxels / np.exp(field)).astype(np.float32)


def _template(path: str) -> Volume:
    voxels, affine = read_image(path)
    return Volume(voxels, affine, automatic_foreground(voxels))


# --- registration -----------------------------------------------------------------------------------------------------


def _registration(scans: list[list[Volume]], options: Options) -> dict[str, Any]:
    """All maps of a subject, as JSON.

    ``maps``: half-way frame → each visit; ``channels``: per visit, its first image → each of its images; ``template``:
    template → half-way frame, if one was asked for. Then figures: ``disagreement``, ``closure`` and ``mirror`` by
    visit.
    """
    firsts, number = [images[0] for images in scans], len(scans)
    kind: Any = options.transform
    matches = {
        (i, j): register(firsts[i], firsts[j], kind)
        for i in range(number)
        for j in range(i + 1, min(i + NEIGHBOURS, number - 1) + 1)
    }
    measured = {pair: match.matrix for pair, match in matches.items()}
    maps = half_way(number, measured)
    channels = [[np.eye(4), *(register(images[0], other).matrix for other in images[1:])] for images in scans]
    template = _to_template(firsts, maps, options)
    return {
        "maps": [matrix.tolist() for matrix in maps],
        "channels": [[matrix.tolist() for matrix in visit] for visit in channels],
        "template": None if template is None else template.tolist(),
        "disagreement": _worst(number, {pair: match.disagreement for pair, match in matches.items()}),
        "closure": closure(measured, firsts[0].points()),
        "mirror": _mirrored(firsts, matches),
    }


def _worst(number: int, figures: dict[tuple[int, int], float]) -> list[float]:
    """Of each visit the mean figure of its pairs; NaN for a single visit."""
    own = [[value for pair, value in figures.items() if visit in pair] for visit in range(number)]
    return [float(np.mean(values)) if values else float("nan") for values in own]


def _mirrored(firsts: list[Volume], matches: dict[tuple[int, int], Match]) -> list[float]:
    """Of each visit, by how much its mirror image fits every other one better; of two visits, both are suspected."""
    gains = {(i, j): mirror_gain(firsts[i], firsts[j], match.matrix) for (i, j), match in matches.items()}
    own = [[value for pair, value in gains.items() if visit in pair] for visit in range(len(firsts))]
    return [min(values, default=float("nan")) for values in own]


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


# --- writing ----------------------------------------------------------------------------------------------------------


def _visit(
    subject: str,
    session: Session,
    images: list[Volume],
    matrix: np.ndarray,
    channels: list[np.ndarray],
    grid: FrameGrid,
    options: Options,
    out: Path,
) -> dict[str, Any]:
    """Resamples every image of a visit once, scales and writes them; the visit's row of the table."""
    first = images[0]
    foreground = resample_mask(first.foreground, first.affine, grid, matrix)
    scaled, limits = [], []
    for volume, channel in zip(images, channels, strict=True):
        outside = 0.0 if volume.voxels.min() >= 0 else float(volume.voxels.min())
        voxels = resample(volume, grid, channel @ matrix, outside)
        limits.append(intensity_range(voxels, foreground))
        scaled.append(scale(voxels, foreground, limits[-1]))
        if volume.voxels.min() < 0 and (volume.voxels == 0).mean() > 0.25:  # normalised inside a mask
            scaled[-1][~foreground] = 0  # around the mask, interpolation left other values than the exact zero
    label = None
    if session.label and (
        options.labels != AUTO or read_grid(session.label).same(read_grid(session.images[options.suffixes[0]]))
    ):
        place = read_grid(session.label)
        label = resample_label(read_label(session.label), place.affine, grid, matrix)
    name = f"{subject}_{session.name}" if session.name else subject
    path = Path("visits") / subject / f"{name}.b2nd"
    written = write_stored(
        out / path,
        np.stack(scaled),
        foreground,
        label,
        grid.affine,
        options.suffixes,
        limits,
        {"subject": subject, "session": session.name},
    )
    native = np.abs(first.spacing())
    return {
        "session": session.name,
        "image": path.as_posix(),
        "size_d": grid.size[0],
        "size_h": grid.size[1],
        "size_w": grid.size[2],
        "spacing": grid.spacing,
        "channels": "+".join(options.suffixes),
        "labelled": label is not None,
        "bytes": written,
        "native_size": "x".join(map(str, first.voxels.shape)),
        "native_spacing": "x".join(f"{value:.3g}" for value in native),
        "foreground": "mask" if first.brain else "found",
        "raw_low": limits[0][0],
        "raw_high": limits[0][1],
        "foreground_ml": float(foreground.sum()) * grid.spacing**3 / 1000,
        "matrix": _text(matrix),
    }


def _text(matrix: np.ndarray) -> str:
    return " ".join(f"{value:.9g}" for value in matrix[:3].ravel())


def _judge(
    subject: CohortSubject,
    rows: list[dict[str, Any]],
    firsts: list[Volume],
    maps: list[np.ndarray],
    found: dict[str, Any],
    options: Options,
    out: Path,
) -> None:
    """Adds quality figures and flags to the rows, and draws the picture."""
    after_grid = common_grid(firsts, maps, LOOK, 4.0)
    apart = [np.eye(4) for _ in firsts]
    before_grid = common_grid(firsts, apart, LOOK, 4.0)
    if max(before_grid.size) > FARTHEST / LOOK:  # scanner coordinates that have nothing to do with each other
        before_grid = common_grid(firsts[:1], apart[:1], LOOK, 4.0)
    after, masks = _looks(firsts, maps, after_grid)
    before, masks_before = _looks(firsts, apart, before_grid)
    now, then = quality.pairwise(after, masks), quality.pairwise(before, masks_before)
    views = [
        resample_mask(np.ones(volume.voxels.shape, bool), volume.affine, after_grid, matrix)
        for volume, matrix in zip(firsts, maps, strict=True)
    ]
    head = np.any(masks, 0)
    centre = firsts[0].points()
    for number, row in enumerate(rows):
        matrix = np.array(found["maps"][number])
        row |= {
            "ncc_before": then[number]["ncc"],
            "ncc_after": now[number]["ncc"],
            "mi_before": then[number]["mi"],
            "mi_after": now[number]["mi"],
            "overlap": now[number]["overlap"],
            "coverage": float((views[number] & head).sum() / max(1, head.sum())),
            "rotation_deg": rotation_degrees(matrix),
            "moved_mm": displacement(matrix, np.eye(4), centre),
            "disagreement_mm": found["disagreement"][number],
            "closure_mm": found["closure"],
            "mirror_gain": found["mirror"][number],
        }
        row["flags"] = quality.flags(row, firsts[number].spacing(), options.floor)
    names = [session.name or subject.name for session in subject.sessions]
    notes = [
        "" if np.isnan(row["ncc_after"]) else f"NCC {row['ncc_before']:.2f} → {row['ncc_after']:.2f}" for row in rows
    ]
    what = "before and after registration" if len(names) > 1 else "seen once"
    title = f"{subject.name}, {options.suffixes[0]}: {what}"
    picture = out / "pictures" / f"{subject.name}.png"
    draw_subject(picture, title, names, (before, LOOK), (after, LOOK), notes)


def _looks(volumes: list[Volume], maps: list[np.ndarray], grid: FrameGrid) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Scaled images and foregrounds on a coarse grid."""
    images, masks = [], []
    for volume, matrix in zip(volumes, maps, strict=True):
        mask = resample_mask(volume.foreground, volume.affine, grid, matrix)
        images.append(scale(resample(volume, grid, matrix), mask))
        masks.append(mask)
    return images, masks
