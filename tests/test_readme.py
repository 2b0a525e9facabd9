"""What README and docs show is what runs: files, links, targets, the method, and every command."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers import ROOT, VISIT_ORDER, tiny

from lssl.cli.arguments import read_arguments
from lssl.cli.complete import complete
from lssl.cli.main import main
from lssl.cli.training import TrainingCLI

README = ROOT / "README.md"
CITIZENS = [README, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", ROOT / "examples/README.md"]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*CITIZENS, *DOCS]
WORDS = 700
RUN_FOR_REAL = ("show", "inspect", "strategies", "datamodules", "--version")
TRAINER = ("fit", "validate", "test", "predict", "profile")
BALL = (np.linalg.norm(np.mgrid[:24, :24, :24] - 11.5, axis=0) < 9).astype(np.float32)
PATTERN = 1 + np.random.default_rng(0).random((6, 6, 6)).repeat(4, 0).repeat(4, 1).repeat(4, 2).astype(np.float32)
LONG = (
    "prepare",
    "import",
    "benchmark",
    "export",
    "segment",
    "tune",
    "trajectories",
)  # they would work for minutes: their options are looked up


def of_pages(pages: list[Path]):
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str = "") -> list[str]:
    """Fenced blocks of one language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def commands(page: Path) -> list[str]:
    """Every `lssl …` of the page's blocks, and those in its lines that name a config; an ellipsis is no command."""
    lines = "\n".join(blocks(page)).replace("\\\n", " ").splitlines()
    inline = [code for code in re.findall(r"`(lssl [^`]+)`", page.read_text()) if "--config" in code]
    found = []
    for line in [*lines, *inline]:
        words = shlex.split(line.split(" #")[0].strip())
        while words and re.fullmatch(r"\w+=\S*", words[0]):
            words.pop(0)
        if words and words[0] in ("lssl", ".venv/bin/lssl") and "…" not in line:
            found.append(shlex.join(words[1:]))
    return found


def write_files(place: Path) -> None:
    """The files that pages ask the reader to write: blocks whose first line is a name, such as ``# my_methods.py``."""
    for page in PAGES:
        for text in [*blocks(page, "python"), *blocks(page, "yaml")]:
            if named := re.match(r"# (my\w*\.(?:py|yaml))\n", text):
                (place / named[1]).write_text(text)


COMMANDS = {command: page.stem for page in PAGES for command in commands(page)}


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= WORDS


def test_the_readmes_method_is_the_one_that_is_tested():
    (shown,) = blocks(README, "python")
    assert shown.removeprefix("# my_methods.py\n").strip() == VISIT_ORDER.strip()


@of_pages(PAGES)
def test_every_file_named_exists(page: Path):
    rooms = "configs|docs|lssl|strategies|datamodules|benchmarks|examples|tests"
    for path in set(re.findall(rf"(?<![\w/.(])(?:{rooms})/[\w/]+\.(?:yaml|png|py|md)", page.read_text())):
        assert (
            path.endswith("/my_method.py")
            or "/my_" in path
            or path.endswith("/test_my_method.py")
            or (ROOT / path).is_file()
        ), path


@of_pages(PAGES)
def test_every_script_of_a_folder_is_named(page: Path):
    if page.parent.name in ("benchmarks", "examples"):
        assert {path.name for path in page.parent.glob("*.py")} <= set(re.findall(r"`(\w+\.py)`", page.read_text()))


@of_pages(PAGES)
def test_every_link_leads_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        headers = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE) if anchor else []
        anchors = {re.sub(r"[^\w\- ]", "", header.lower()).replace(" ", "-") for header in headers}
        assert not anchor or anchor in anchors, target


def test_the_index_names_every_page():
    index = ROOT / "docs/index.md"
    named = {(index.parent / path).resolve() for path in re.findall(r"\]\(([\w/]+\.md)\)", index.read_text())}
    assert named | {index} == {page.resolve() for page in DOCS}


@of_pages(PAGES)
def test_make_targets_named_exist(page: Path):
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^|\n)make (\w+)", page.read_text())):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_map_of_rooms_is_the_one_that_is_checked():
    from test_imports import FLOORS

    rows = re.findall(r"^\| (\d+) \| (.+?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    shown: dict[str, int] = {}
    for floor, names in rows:
        shown |= {Path(name).stem: int(floor) for name in re.findall(r"`([\w/.]+?)/?`", names)}
    assert shown == {room: number for number, rooms in enumerate(FLOORS) for room in rooms if room != "__main__"}


# --- commands ---------------------------------------------------------------------------------------------------------


def write_bids(root: Path) -> None:
    """Two subjects with two visits each."""
    for subject in "ab":
        for session in ("M000", "M012"):
            path = root / f"sub-{subject}/ses-{session}/anat/sub-{subject}_ses-{session}_T1w.nii.gz"
            path.parent.mkdir(parents=True)
            nib.save(nib.Nifti1Image(BALL * PATTERN, np.diag([4.0, 4.0, 4.0, 1.0])), path)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder in which the commands make sense: data, a method, and the run folders that they name."""
    place = tmp_path_factory.mktemp("place")
    write_bids(place / "my_bids")
    main(["prepare", str(place / "my_bids"), str(place / "prepared"), "--suffix", "T1w", "--spacing", "4"])
    (place / "MAPS").mkdir()
    nib.save(nib.Nifti1Image((17 * (BALL > 0)).astype(np.int16), np.eye(4)), place / "MAPS/a.nii.gz")
    write_files(place)
    run = place / "runs/demo"
    options = ["--trainer.default_root_dir", str(run), "--trainer.callbacks", "null", "--monitor.every", "0"]
    main(["fit", "--config", "demo", *tiny(place), *options, "--trainer.max_steps", "1"])
    for name in (
        "demo-2",
        "longitudinal_infonce",
        "anatomical_embedding",
        "finetune",
        "tissue",
        "classifier",
        "change_segmenter",
    ):
        shutil.copytree(run, run.with_name(name))
    return place


def resolved(command: str, place: Path) -> list[str]:
    """The command's words, with the data of the page replaced by the fixture's."""
    known = {"/data/my_bids": "my_bids", "../shared/data/mri": "my_bids", "DIR": "my_bids", "BIDS": "my_bids"}
    known |= {"/data/prepared": "prepared", "PATH": "prepared", "MAPS": "MAPS"}
    known |= {"OUT/visits.csv": "prepared/visits.csv"}
    return [str(place / known[word]) if word in known else word for word in shlex.split(command)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[:60])
def test_commands_resolve(command: str, place: Path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    words = resolved(command, place)
    if words[0] in RUN_FOR_REAL:
        main(words)
        return
    if words[0] in LONG:
        with pytest.raises(SystemExit) as end:
            main([words[0], "--help"])
        assert not end.value.code
        shown = capsys.readouterr().out
        assert [word for word in words if word.startswith("--") and word not in shown] == []
        return
    assert words[0] in TRAINER
    if words[0] == "fit" and not any(word.startswith(("--print_config", "--help")) for word in words):
        read = read_arguments(words[1:])
        monkeypatch.syspath_prepend(place)
        TrainingCLI.check(complete(read.files, read.data, read.options))  # half of what printing the config takes
        return
    if not any(word.startswith("--print_config") for word in words):
        words.append("--print_config")
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code, capsys.readouterr().err
    assert "trainer" in capsys.readouterr().out


def test_a_wrong_option_would_be_seen(place: Path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "configs/demo.yaml", "--views.sise", "64", "--print_config"])
    assert end.value.code
