"""Cells in processes of their own: resumed, failed, killed, refused. A light program stands for `lssl`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from plans import PLAN, fake, ran, write_plan

from lssl.benchmark.fingerprints import cell_fingerprints
from lssl.benchmark.output_folder import claimed, read_done
from lssl.benchmark.plan import read_plan
from lssl.benchmark.report import write_results
from lssl.benchmark.run import run_cells
from lssl.utils.errors import InputError

SMALL = {
    "seeds": [0, 1],
    "finetune": {**PLAN["finetune"], "learning_rates": [0.01], "budgets": {"short": {"trainer": {"max_steps": 3}}}},
    "strategies": {"good": PLAN["strategies"]["good"]},
}


def test_a_second_run_does_nothing_and_a_deleted_cell_runs_alone(tmp_path, monkeypatch):
    program = fake(tmp_path, monkeypatch)
    plan = read_plan(write_plan(tmp_path, **SMALL))
    fingerprints = cell_fingerprints(plan)
    events = []
    first = run_cells(
        plan, fingerprints, 2, tell=lambda event, running, outcome: events.append((event, *running)), program=program
    )
    assert sorted(first.finished) == sorted(cell.name for cell in plan.cells)
    assert max(map(len, events)) == 3  # two at a time
    commands = ran(tmp_path)
    assert len(commands) == 2 + 2 * (2 + 2 + 2)  # two pretrainings; twice scratch, ceiling and tuned: fit and test
    assert all("pretrain" in line for line in commands[:2])
    write_results(plan, fingerprints, page=False)
    table = (plan.out / "table.md").read_text(), (plan.out / "results.csv").read_text()

    again = run_cells(plan, fingerprints, program=program)
    assert not again.finished
    assert not ran(tmp_path)
    write_results(plan, fingerprints, page=False)
    assert table == ((plan.out / "table.md").read_text(), (plan.out / "results.csv").read_text())

    for name in ("pretrain/good/seed-1", "finetune/good/seed-0/labelled-1/short/rate-0.01"):
        cell = next(cell for cell in plan.cells if cell.name == name)
        subprocess.run(["rm", "-r", str(cell.folder)], check=True)
        assert run_cells(plan, fingerprints, program=program).finished == [name]
        assert all(str(cell.run) in line for line in ran(tmp_path))


def test_a_failed_cell_stops_only_what_starts_from_it_and_is_tried_again(tmp_path, monkeypatch):
    program = fake(tmp_path, monkeypatch)
    monkeypatch.setenv("FAKE_FAIL", "pretrain/good/seed-0")
    plan = read_plan(write_plan(tmp_path, **SMALL))
    fingerprints = cell_fingerprints(plan)
    events = []
    outcome = run_cells(plan, fingerprints, tell=lambda event, *rest: events.append(event), program=program)
    assert outcome.failed == {"pretrain/good/seed-0": "it was told to fail"}
    assert outcome.skipped == {"finetune/good/seed-0/labelled-1/short/rate-0.01": "pretrain/good/seed-0"}
    assert len(outcome.finished) == len(plan.cells) - 2
    log = plan.cells[0].folder / "log.txt"
    assert any("FAILED" in event and str(log) in event for event in events)
    assert log.read_text().startswith("$ lssl fit --config")
    monkeypatch.setenv("FAKE_FAIL", "no cell")
    assert sorted(run_cells(plan, fingerprints, program=program).finished) == sorted(
        [*outcome.failed, *outcome.skipped]
    )


def test_another_config_runs_again_what_depends_on_it(tmp_path, monkeypatch):
    program = fake(tmp_path, monkeypatch)
    plan = read_plan(write_plan(tmp_path, **SMALL))
    run_cells(plan, cell_fingerprints(plan), program=program)
    plan = read_plan(write_plan(tmp_path, **{**SMALL, "pretrain": {"trainer": {"max_steps": 6}}}))
    outcome = run_cells(plan, cell_fingerprints(plan), program=program)
    assert all("good" in name for name in outcome.finished)
    assert all("scratch" in name for name in outcome.kept)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_killed_in_the_middle_it_ends_its_cells_and_goes_on_to_the_same_table(how, tmp_path, monkeypatch):
    program = fake(tmp_path, monkeypatch)
    path = write_plan(tmp_path, **SMALL)
    plan = read_plan(path)
    fingerprints = cell_fingerprints(plan)
    code = (
        "import functools; import lssl.benchmark.command as c, lssl.benchmark.checks as k\n"
        "from lssl.cli.main import main\n"
        f"c.run_cells = functools.partial(c.run_cells, program={program!r}); k.check_cells = lambda *a: None\n"
        f"main(['benchmark', '--config', {str(path)!r}])"
    )
    env = {**os.environ, "FAKE_SLEEP": "0.8"}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while len((tmp_path / "fake.log").read_text().splitlines()) < 3 and time.monotonic() < end:  # the third cell runs
        time.sleep(0.02)
    slept = (tmp_path / "fake.log.slept").read_text()
    process.send_signal(how)
    _, said = process.communicate(timeout=30)
    finished = {cell.name for cell in plan.cells if read_done(cell, fingerprints[cell.name])}
    assert 2 <= len(finished) < len(plan.cells)
    if how != signal.SIGKILL:
        assert process.returncode == 128 + how
        assert said.decode().strip().endswith("the same command goes on.")
    time.sleep(1.5)
    assert (tmp_path / "fake.log.slept").read_text() == slept  # nothing runs on
    with claimed(plan) as lock:
        outcome = run_cells(plan, fingerprints, 2, lock, program=program)
    assert {*outcome.kept} == finished
    write_results(plan, fingerprints, page=False)

    whole = read_plan(path, tmp_path / "whole")
    run_cells(whole, cell_fingerprints(whole), 2, program=program)
    write_results(whole, cell_fingerprints(whole), page=False)
    tables = [(out / "table.md").read_text().replace(" + 0.000", "") for out in (plan.out, whole.out)]
    assert tables[0] == tables[1]


def test_two_processes_on_one_folder(tmp_path):
    plan = read_plan(write_plan(tmp_path, **SMALL))
    with claimed(plan):
        code = (
            "from pathlib import Path; from lssl.benchmark.output_folder import claimed\n"
            "from lssl.benchmark.plan import read_plan\n"
            f"with claimed(read_plan(Path({str(plan.path)!r}))): pass"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert f"in use by process {os.getpid()}" in other.stderr
    with claimed(plan):  # nothing is left of a lock
        pass


def test_a_cell_that_outlives_its_benchmark_keeps_the_folder(tmp_path):
    plan = read_plan(write_plan(tmp_path, **SMALL))
    with claimed(plan) as lock:
        cell = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    with pytest.raises(InputError, match="in use"), claimed(plan):
        pass
    cell.communicate(b"\n")
    with claimed(plan):
        pass


def test_a_folder_of_another_plan_or_of_something_else(tmp_path):
    plan = read_plan(write_plan(tmp_path, **SMALL))
    with claimed(plan):
        pass
    with claimed(read_plan(write_plan(tmp_path, **{**SMALL, "seeds": [5]}))):  # more of the same
        pass
    other = read_plan(write_plan(tmp_path, **SMALL, data={"class_path": "NiftiDataModule"}))
    with pytest.raises(InputError, match="other settings of data, whose rows"), claimed(other):
        pass
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(InputError, match="something else than a benchmark"),
        claimed(read_plan(plan.path, tmp_path / "papers")),
    ):
        pass
    assert [path.name for path in (tmp_path / "papers").iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_written_and_a_full_disk(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    plan = read_plan(write_plan(tmp_path, **SMALL), tmp_path / "file" / "out")
    with pytest.raises(InputError, match="cannot be written"), claimed(plan):
        pass
    program = fake(tmp_path, monkeypatch)
    plan = read_plan(write_plan(tmp_path, **SMALL))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lssl.benchmark.run.mark_done", full)
    with pytest.raises(InputError, match=r"No space left on device.*what is finished stays"):
        run_cells(plan, cell_fingerprints(plan), program=program)
    assert not any(read_done(cell, key) for cell, key in zip(plan.cells, cell_fingerprints(plan).values(), strict=True))


def test_threads_are_shared_and_the_plans_folder_is_on_the_path(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    program = fake(tmp_path, monkeypatch)
    script = Path(program[1])
    script.write_text("import beside\n" + script.read_text())
    (tmp_path / "beside.py").write_text("")
    plan = read_plan(write_plan(tmp_path, **{**SMALL, "seeds": [0]}))
    fingerprints = cell_fingerprints(plan)
    assert not run_cells(plan, fingerprints, 3, program=program).failed
    assert "threads 2" in (plan.cells[0].folder / "log.txt").read_text()
    note = json.loads((plan.cells[0].folder / "done.json").read_text())
    assert note["key"] == fingerprints[plan.cells[0].name]
    assert 0 < note["seconds"][0] < 60
