"""Every command and every Python block of README and docs runs, in a folder with small data; what does not is listed.

`tests/test_readme.py` looks at every command in seconds. Here they do their work: training commands with the settings
of SMALL on top, all others as they are typed.
"""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from test_readme import COMMANDS, DOCS, LONG, PAGES, README, blocks, of_pages, resolved, write_files

from lssl.cli.compose import compose
from lssl.cli.main import main
from lssl.datamodules import PhantomDataModule

BALL = (np.linalg.norm(np.mgrid[:40, :40, :40] - 19.5, axis=0) < 15).astype(np.float32)
#: What is not run here, by the beginning of the command, and why. Whatever is not run is in this list.
NOT_RUN = {
    "lssl benchmark": "minutes to a night; tests/benchmark runs it with small plans",
    "lssl tune": "minutes; tests/cli/test_tune.py runs a trial",
    "lssl export runs/demo --to nnunet": "needs nnU-Net's own environment; tests/export runs it where there is one",
    "lssl export runs/demo --to onnx": "needs the extra onnx; tests/export runs it where it is installed",
    "lssl fit --config longitudinal_infonce --data /data/prepared --trainer.accelerator gpu": "needs a GPU",
    "lssl fit --config longitudinal_infonce --data /data/prepared --trainer.devices 4": "needs four GPUs",
    "lssl fit --config base/one_shot --data NiftiDataModule": "needs real MRI, as in tests/segmentation",
    "srun": "needs a SLURM cluster",
    "torchrun": "needs several processes; tests/cli/test_cluster.py runs two",
    "make": "CI runs setup, demo, coverage and docs; tests/test_readme.py checks that the others exist",
    ".venv/bin/pip": "needs a package index; `make setup` does it in CI",
    "pip": "needs a package index",
    "python -m venv": "needs a package index to be of use; `make setup` does it in CI",
    ".venv/bin/python benchmarks/": "hours",
    "python examples/": "hours",
}
ELSEWHERE = {"nnunetv2": "tests/export/test_nnunet.py runs it in nnU-Net's own environment"}  # Python that imports it
SMALL = {
    "views": {"size": 32, "spacing": 2.0},  # that of the images; the demo has 3 mm
    "monitor": {"every": 0},
    "data": {"init_args": {"batch_size": 4, "num_workers": 0}},
    "trainer": {
        "max_steps": 1,
        "log_every_n_steps": 1,
        "max_epochs": None,
        "limit_val_batches": 1,
        "limit_test_batches": 1,
        "precision": "32-true",
        "accelerator": "cpu",
        "callbacks": None,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}
PROGRAMS = ("lssl", "srun", "torchrun", "make", "pip", "python", ".venv/bin/")


def not_run(command: str) -> str:
    """The reason why a command is not run here; empty if it is."""
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), "")


def lines_of(page: Path) -> list[str]:
    """Every line of the page's blocks that starts a program, without variables before it and remarks after it."""
    lines = "\n".join([*blocks(page), *blocks(page, "bash")]).replace("\\\n", " ").splitlines()
    stripped = [re.sub(r"^(\w+=\S+ )+", "", line.split(" #")[0].strip()) for line in lines]
    return [line for line in stripped if line.startswith(PROGRAMS)]


@of_pages(PAGES)
def test_every_command_is_run_or_listed_with_a_reason(page: Path):
    ours = {f"lssl {command}" for command in COMMANDS}
    for line in lines_of(page):
        typed = " ".join(line.split()).removeprefix(".venv/bin/") if "bin/lssl" in line else " ".join(line.split())
        run = " ".join(typed.replace('"', "").replace("'", "").split())
        known = {" ".join(command.replace('"', "").replace("'", "").split()) for command in ours}
        assert not_run(typed) or run in known, f"{typed}: neither run nor in NOT_RUN"


def test_every_reason_is_of_a_command_that_exists():
    lines = [" ".join(line.split()) for page in PAGES for line in lines_of(page)]
    assert [start for start in NOT_RUN if start != "pip" and not any(line.startswith(start) for line in lines)] == []


# --- a folder with small data -----------------------------------------------------------------------------------------


def write_bids(root: Path) -> None:
    """Five subjects with two visits and label maps."""
    for seed, subject in enumerate("abcde"):
        blocks_of = 1 + np.random.default_rng(seed).random((10, 10, 10)).astype(np.float32)  # a head of one's own
        pattern = blocks_of.repeat(4, 0).repeat(4, 1).repeat(4, 2)
        for session in ("M000", "M012"):
            name = f"sub-{subject}_ses-{session}"
            path = root / f"sub-{subject}/ses-{session}/anat/{name}_T1w.nii.gz"
            label = root / f"derivatives/labels/sub-{subject}/ses-{session}/anat/{name}_dseg.nii.gz"
            for file, voxels in ((path, BALL * pattern), (label, (17 * BALL).astype(np.int16))):
                file.parent.mkdir(parents=True)
                nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 2.0, 1.0])), file)


def write_participants(root: Path) -> None:
    """A diagnosis of every subject; of the four that a split of five leaves for training, two of each."""
    lines = [f"sub-{subject}\t{group}" for subject, group in zip("abcde", ("AD", "AD", "AD", "CN", "CN"), strict=True)]
    (root / "participants.tsv").write_text("\n".join(["participant_id\tdiagnosis", *lines]) + "\n")


def write_sources(place: Path) -> None:
    """A table, files of other programs, label maps, weights, and the files that pages ask the reader to write."""
    scans = sorted((place / "my_bids").glob("sub-*/ses-*/anat/*_T1w.nii.gz"))
    rows = [",".join((*path.name.split("_")[:2], str(path))) for path in scans]
    (place / "TABLE.csv").write_text("\n".join(["subject,session,image", *rows]))
    image = {"name": "x", "image_path": str(scans[0]), "modality": "T1w"}
    subjects = {"a": {"sessions": {"ses-1": {"images": [image]}}}}
    (place / "pretrain_data.json").write_text(json.dumps({"datasets": {"ds": {"subjects": subjects}}}))
    (place / "MAPS").mkdir()
    heads = PhantomDataModule(subjects=4)
    for number in range(4):
        scan = heads.scan(number, 0)
        nib.save(
            nib.Nifti1Image(scan.label.numpy().astype(np.int16), scan.affine.numpy()), place / f"MAPS/{number}.nii.gz"
        )
    for name in ("sub-01_T1w", "first", "second"):
        nib.save(nib.load(scans[0]), place / f"{name}.nii.gz")
    write_files(place)
    node = compose(["network/dynunet"]).values["backbone"]["network"]["init_args"]
    from monai.networks.nets import DynUNet

    torch.save(DynUNet(**node).state_dict(), place / "FILE.pt")
    if find_spec("h5py"):
        import h5py

        with h5py.File(place / "train_long.hdf5", "w") as file:
            file["s/t1"] = np.stack([BALL, BALL])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Data, files and runs under the names that the pages use."""
    place = tmp_path_factory.mktemp("pages")
    write_bids(place / "my_bids")
    write_participants(place / "my_bids")
    write_sources(place)
    (place / "small.yaml").write_text(yaml.safe_dump(SMALL))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        main(["prepare", "my_bids", "prepared", "--suffix", "T1w", "--spacing", "2"])
        main(["fit", "--config", "demo", "--config", "small.yaml"])
        main(["export", "runs/demo", "exported"])
        shutil.copytree("runs/demo", "runs/longitudinal_infonce")
        shutil.copytree("runs/demo", "runs/demo-2")
        tuned = ["--data", "prepared", "--model.init_args.pretrained", "runs/demo/checkpoints/last.ckpt"]
        main(["fit", "--config", "finetune", *tuned, "--config", "small.yaml"])
        shutil.copy("runs/finetune/checkpoints/last.ckpt", "runs/finetune/checkpoints/best.ckpt")  # one step has none
        shutil.copytree("runs/finetune", "runs/tissue")
        main(["fit", "--config", "anatomical_embedding", "--data", "prepared", "--config", "small.yaml"])
        wanted = ["--data.init_args.targets", "{diagnosis: participants}", "--model.init_args.target", "diagnosis"]
        wanted += ["--model.init_args.visits", "pair", "--data.init_args.split", "[0.8,0.0,0.2]"]
        main(["fit", "--config", "classifier", "--data", "my_bids", *wanted, "--config", "small.yaml"])
        shutil.copy("runs/classifier/checkpoints/last.ckpt", "runs/classifier/checkpoints/best.ckpt")
        main(["fit", "--config", "change_segmenter", "--data", "prepared", "--config", "small.yaml"])
        shutil.copy("runs/change_segmenter/checkpoints/last.ckpt", "runs/change_segmenter/checkpoints/best.ckpt")
    return place


def words_of(command: str, place: Path) -> list[str]:
    """A command's words with the small data in place of the page's, and a new folder for what it writes."""
    known = {"TABLE": "TABLE.csv", "FILE": "FILE.pt", "OUT/visits.csv": "TABLE.csv"}
    words = [str(place / known[word]) if word in known else word for word in resolved(command, place)]
    if words[0] in ("prepare", "import", "export") and "--list" not in words:
        words[2 if words[0] != "export" else words.index("exported")] = str(place / f"out-{abs(hash(command))}")
    if "--workers" in words:
        words[words.index("--workers") + 1] = "1"
    if words[0] in ("fit", "profile") and not any(word.startswith(("--print_config", "--help")) for word in words):
        words += ["--config", str(place / "small.yaml"), "--trainer.max_steps", "1"]
        words += (
            ["--model.init_args.min_points", "1"] if "prior_guided" in command else []
        )  # views of 32 share few voxels
    return words


def exit_status(words: list[str]) -> int | str | None:
    try:
        main(words)
    except SystemExit as end:
        return end.code
    return None


TO_RUN = [command for command in COMMANDS if not not_run(f"lssl {command}")]


@pytest.mark.slow
@pytest.mark.parametrize("command", TO_RUN, ids=lambda command: command[:80])
def test_a_command_does_its_work(command: str, place: Path, monkeypatch, capsys):
    if "hdf5" in command:
        pytest.importorskip("h5py")
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not exit_status(words_of(command, place)), capsys.readouterr().err[-600:]


@pytest.mark.slow
@of_pages([page for page in [README, *DOCS] if blocks(page, "python")])
def test_the_python_of_a_page_runs(page: Path, place: Path, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    scans = sorted((place / "my_bids").glob("sub-*/ses-*/anat/*_T1w.nii.gz"))
    labels = sorted((place / "my_bids/derivatives").rglob("*_dseg.nii.gz"))
    cohort = [(*files, *files[0].name.split("_")[:2], 60.0) for files in zip(scans, labels, strict=True)]
    names: dict = {"__name__": "page", "cohort": cohort}
    for text in blocks(page, "python"):
        if any(f"from {package}" in text for package in ELSEWHERE):
            continue
        exec(compile(text, str(page), "exec"), names)


def test_long_commands_are_run_too():
    """The fast look at commands that work for minutes is only at their options."""
    assert {command.split()[0] for command in TO_RUN} >= set(LONG) - {"benchmark", "tune"}
