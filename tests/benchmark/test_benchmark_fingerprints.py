"""A key follows everything that a cell reads, and the cell's record lists it."""

import json
import os

import pytest
from plans import PLAN, fake, write_plan

from lssl.benchmark.fingerprints import SMALL, cell_fingerprints, cell_inputs
from lssl.benchmark.plan import read_plan
from lssl.benchmark.run import run_cells

SCRATCH, MINE = "finetune/scratch/seed-0/labelled-1/short/rate-0.01", "pretrain/mine/seed-0"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's folder, and the plan in it; ``keys(**groups)`` are those of its cells."""
    monkeypatch.chdir(tmp_path)

    def keys(strategy=None, **groups):
        strategies = {"mine": strategy or PLAN["strategies"]["good"]}
        return cell_fingerprints(read_plan(write_plan(tmp_path, seeds=[0], strategies=strategies, **groups)))

    return tmp_path, keys


def changed(before, after):
    return {name for name in before if before[name] != after[name]}


def test_a_checkpoint_that_a_cell_reads(project):
    folder, keys = project
    (folder / "matcher.ckpt").write_text("one")
    own = {"class_path": "AnatomicalInvariance", "init_args": {"matcher": {"init_args": {"embedding": "matcher.ckpt"}}}}
    before = keys({"model": own})
    (folder / "matcher.ckpt").write_text("two")
    after = changed(before, keys({"model": own}))
    assert after
    assert after == {name for name in before if "/mine/" in name}


def test_a_module_that_the_method_imports_from_far(project):
    folder, keys = project
    (folder / "helpers_of_mine").mkdir()
    (folder / "helpers_of_mine" / "__init__.py").write_text("")
    (folder / "helpers_of_mine" / "losses.py").write_text("from . import parts\n")
    (folder / "helpers_of_mine" / "parts.py").write_text("def late():\n    import deep_of_mine\n")
    (folder / "deep_of_mine.py").write_text("import torch, os\nvalue = 1\n")
    (folder / "unused_of_mine.py").write_text("value = 1\n")
    (folder / "method_of_mine.py").write_text("from helpers_of_mine.losses import loss\n")
    own = {"model": {"class_path": "method_of_mine.Mine"}}
    before = keys(own)
    plan = read_plan(folder / "plan.yaml")
    listed = cell_inputs(plan, next(cell for cell in plan.cells if cell.name == MINE))
    assert {*listed} == {
        "method_of_mine.py",
        "helpers_of_mine/__init__.py",
        "helpers_of_mine/losses.py",
        "helpers_of_mine/parts.py",
        "deep_of_mine.py",
    }
    (folder / "unused_of_mine.py").write_text("value = 2\n")
    assert keys(own) == before
    for name in ("deep_of_mine.py", "helpers_of_mine/parts.py", "method_of_mine.py"):
        (folder / name).write_text((folder / name).read_text() + "\nother = 2\n")
        after = keys(own)
        assert MINE in changed(before, after)
        assert SCRATCH not in changed(before, after)
        before = after


@pytest.mark.parametrize("size", [10, SMALL + 1])
def test_images_that_a_table_lists(project, size):
    folder, keys = project
    (folder / "images").mkdir()
    image = folder / "images" / "a.nii.gz"
    image.write_bytes(b"1" * size)
    (folder / "tables").mkdir()
    (folder / "tables" / "visits.csv").write_text("subject,session,image\na,1,../images/a.nii.gz\n")
    data = {"class_path": "NiftiDataModule", "init_args": {"table": "tables/visits.csv"}}
    before = keys(data=data)
    assert keys(data=data) == before
    time = image.stat().st_mtime_ns
    os.utime(image, ns=(time + 10**9, time + 10**9))
    assert (keys(data=data) == before) == (size <= SMALL)  # of a small one only the content counts
    image.write_bytes(b"2" * size)
    os.utime(image, ns=(time + 2 * 10**9, time + 2 * 10**9))
    assert changed(before, keys(data=data)) == {*before}


def test_fields_of_a_prepared_folder_that_are_made_again_under_the_same_tables(project):
    folder, keys = project
    (folder / "prepared").mkdir()
    (folder / "prepared" / "a_field.npz").write_bytes(b"1")
    (folder / "prepared" / "visits.csv").write_text("subject,session,field\na,1,a_field.npz\na,2,\n")
    (folder / "prepared" / "dataset.json").write_text("{}")
    data = {"class_path": "PreparedDataModule", "init_args": {"root": "prepared"}}
    before = keys(data=data)
    assert keys(data=data) == before
    (folder / "prepared" / "a_field.npz").write_bytes(b"22")
    assert changed(before, keys(data=data)) == {*before}


def test_images_relative_to_the_root_of_the_data(project):
    folder, keys = project
    (folder / "bids").mkdir()
    (folder / "bids" / "a.nii").write_text("1")
    (folder / "visits.csv").write_text("subject,session,image\na,1,a.nii\n")
    data = {"class_path": "NiftiDataModule", "init_args": {"root": "bids", "table": "visits.csv"}}
    keys(data=data)
    plan = read_plan(folder / "plan.yaml")
    assert "bids/a.nii" in cell_inputs(plan, plan.cells[0])


def test_what_the_cells_make_themselves_is_no_input_and_the_record_lists_what_was_hashed(project, monkeypatch):
    folder, keys = project
    (folder / "method_of_mine.py").write_text("one = 1\n")
    own = {"model": {"class_path": "method_of_mine.Mine"}}
    before = keys(own)
    plan = read_plan(folder / "plan.yaml")
    assert not run_cells(plan, before, program=fake(folder, monkeypatch)).failed
    assert keys(own) == before  # though the checkpoints are there now
    cell = next(cell for cell in plan.cells if cell.name == MINE)
    listed = json.loads((cell.folder / "inputs.json").read_text())
    assert listed == cell_inputs(plan, cell)
    assert {*listed} == {"method_of_mine.py"}
