"""`lssl benchmark` as a user types it: what is checked before anything runs, what is shown, one real miniature."""

import functools
import shutil
from collections import Counter

import pandas as pd
import pytest
import yaml
from helpers import ROOT, TINY_NET, VISIT_ORDER
from plans import PLAN, fake, ran, write_plan

import lssl.benchmark.command as command
from lssl.benchmark.checks import check_cells, check_leakage, resolve
from lssl.benchmark.plan import read_plan
from lssl.benchmark.run import run_cells
from lssl.cli.compose import load, merged
from lssl.cli.main import main
from lssl.utils.errors import InputError

DATA = {
    "class_path": "PhantomDataModule",
    "init_args": {"subjects": 8, "visits": 2, "size": 40, "spacing": 4.5, "split": [0.5, 0.25, 0.25], "batch_size": 4},
}
REAL = {
    "seeds": [0, 1],
    "data": DATA,
    "backbone": TINY_NET,
    "pretrain": {"trainer": {"max_steps": 3, "precision": "32-true", "check_val_every_n_epoch": 100}},
    "finetune": {
        "config": ["base/one_shot", "classes/freesurfer"],
        "learning_rates": [0.003],
        "budgets": {"short": {"trainer": {"max_steps": 3}}},
        "data": {"init_args": {"few_shot": {"visits": 1}}},
    },
    "strategies": {
        "visit_order": {"model": {"class_path": "my_methods.VisitOrder"}, "part": "encoder"},
    },
}


SMALL = {**PLAN["finetune"], "learning_rates": [0.01], "budgets": {"short": {"trainer": {"max_steps": 3}}}}


@pytest.fixture
def real(tmp_path, monkeypatch):
    """A plan that trains, beside a user's own strategy."""
    (tmp_path / "my_methods.py").write_text(VISIT_ORDER)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")  # the file lies beside the plan, not here

    def make(**groups):
        return write_plan(tmp_path, **{**REAL, **groups})

    return make


def test_configs_resolve_before_anything_runs(real):
    plan = read_plan(real())
    check_cells(plan, plan.cells)
    assert not plan.out.exists()


@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        (
            {"model": {"class_path": "LongitudinalLokal"}},
            "pretrain/wrong/seed-0 .*no class 'LongitudinalLokal'; did you",
        ),
        ({"model": {"class_path": "LongitudinalLocal", "init_args": {"sampels": 1}}}, "did you mean 'samples'"),
        ({"model": {"class_path": "LongitudinalLocal"}, "trainer": {"max_step": 1}}, "no key 'max_step'"),
    ],
)
def test_one_sentence_for_a_config_that_does_not_resolve(strategy, sentence, real):
    plan = read_plan(real(strategies={"wrong": strategy}))
    with pytest.raises(InputError, match=sentence):
        resolve([cell for cell in plan.cells if cell.seed == 0 and cell.stage == "pretrain"])


def test_the_guard_refuses_a_test_subject_that_any_cell_has_seen(real):
    check_leakage(read_plan(real()).cells)
    others = {**REAL["strategies"], "leaks": {"model": {"class_path": "LongitudinalLocal"}}}
    others["leaks"]["data"] = {"init_args": {"split": [1.0, 0.0, 0.0]}}
    with pytest.raises(
        InputError, match=r"Subject phantom-\d+ is tested on in finetune/.* trained .* in pretrain/leaks"
    ):
        check_leakage(read_plan(real(strategies=others)).cells)
    others["leaks"]["data"] = {"init_args": {"split": [0.5, 0.5, 0.0]}}  # validation counts as seen
    with pytest.raises(InputError, match="pretrain/leaks"):
        check_leakage(read_plan(real(strategies=others)).cells)
    others["leaks"]["data"] = {"init_args": {"seed": 5}}  # another split of the same subjects
    with pytest.raises(InputError, match="pretrain/leaks"):
        check_leakage(read_plan(real(strategies=others)).cells)


def test_rotation_tests_each_seed_on_what_it_has_not_seen_and_refuses_its_own_pretraining_on_them(real):
    from lssl.benchmark.checks import _data, _instantiate

    options = {key: value for key, value in DATA["init_args"].items() if key != "split"}
    data = {**DATA, "init_args": {**options, "subjects": 5}}
    finetune = {**REAL["finetune"], "learning_rates": [0.01]}
    scratch = read_plan(real(data=data, rotate=5, seeds=[*range(5)], labelled=[1, 2], strategies={}, finetune=finetune))
    check_leakage(scratch.cells, rotate=True)
    with pytest.raises(InputError, match="is tested on in"):
        check_leakage(scratch.cells)
    counts = {1: Counter(), 2: Counter(), None: Counter()}
    for cell in scratch.cells:
        table = _instantiate(_data(cell)).table.drop_duplicates("subject")
        many = table["split"].value_counts()
        assert (many["train"], many["val"]) == (cell.labelled or 3, 1)
        counts[cell.labelled].update(table["subject"][table["split"] == "train"])
    assert all(counts[many] == dict.fromkeys(table["subject"], times) for many, times in ((1, 1), (2, 2), (None, 3)))
    plan = read_plan(real(data=data, rotate=5, finetune=finetune))
    with pytest.raises(InputError, match=r"tested on in finetune/.* trained or validated on in pretrain/"):
        check_leakage(plan.cells, rotate=True)


def test_rates_need_validation_subjects_and_rows_test_subjects(real):
    for split, part in (([0.5, 0.0, 0.5], "val"), ([0.5, 0.5, 0.0], "test")):
        data = {**DATA, "init_args": {**DATA["init_args"], "split": split}}
        with pytest.raises(InputError, match=f"no {part} subjects"):
            check_leakage(read_plan(real(data=data)).cells)


def test_the_command_ends_in_tables_and_says_what_failed(tmp_path, monkeypatch, capsys):
    program = fake(tmp_path, monkeypatch)
    monkeypatch.setattr(command, "run_cells", functools.partial(run_cells, program=program))
    monkeypatch.setattr("lssl.benchmark.checks.check_cells", lambda *args: None)
    path = write_plan(tmp_path, seeds=[0], finetune=SMALL, strategies={"good": PLAN["strategies"]["good"]})
    monkeypatch.setenv("FAKE_FAIL", "pretrain")
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "--config", str(path)])
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert "1 failed, 1 skipped, as their pretraining failed" in said
    assert "missing: rows rest on what is there" in (tmp_path / "out" / "table.md").read_text()
    monkeypatch.delenv("FAKE_FAIL")
    main(["benchmark", "--config", str(path), "--jobs", "2", "--report"])
    said = capsys.readouterr().out
    assert "2 finished now" in said
    assert (tmp_path / "out" / "report.html").is_file()
    ran(tmp_path)
    main(["benchmark", "--config", str(path)])
    assert not ran(tmp_path)
    assert "0 finished now, 4 before" in capsys.readouterr().out


def test_a_dry_run_shows_cells_commands_and_an_estimate_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    import lssl.benchmark.estimate as estimate

    program = fake(tmp_path, monkeypatch)
    monkeypatch.setattr(estimate, "time_cells", functools.partial(estimate.time_cells, program=program))
    monkeypatch.setattr("lssl.benchmark.checks.check_cells", lambda *args: None)
    path = write_plan(tmp_path, seeds=[0])
    main(["benchmark", "--config", str(path), "--dry-run", "--jobs", "2"])
    said = capsys.readouterr().out
    assert "pretrain/good/seed-0  (5 steps)" in said
    assert f"lssl fit --config {tmp_path}/out/cells/pretrain/good/seed-0/config.yaml" in said
    assert "lssl test --config" in said
    assert "good: 20 ms/step" in said
    assert "1.0 GB of memory with --jobs 2" in said
    assert not (tmp_path / "out").exists()
    commands = ran(tmp_path)
    assert len(commands) == 4  # a fit of each strategy; fit and test once for all fine-tuning
    assert not any(str(tmp_path / "out") in line for line in commands)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--config", "nowhere.yaml"], "There is no config nowhere.yaml"),
        (["--config", "configs/benchmark/demo.yaml", "--jobs", "0"], "--jobs is 0"),
        (["--config", "configs/benchmark/demo.yaml", "--dryrun"], "no option --dryrun; did you mean '--dry-run'"),
        (["--config", "configs/demo.yaml"], "no key 'model'"),
    ],
)
def test_one_sentence_for_a_wrong_option(args, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", *args])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ["demo.yaml", "brains.yaml", "tasks.yaml"])
def test_shipped_plans(name, tmp_path, monkeypatch, capsys):
    """Shown by the command, few labels, and read by the parser; slow tests and `make benchmark` train."""
    import lssl.benchmark.estimate as estimate

    program = fake(tmp_path, monkeypatch)
    monkeypatch.setattr(estimate, "time_cells", functools.partial(estimate.time_cells, program=program))
    monkeypatch.setattr("lssl.benchmark.checks.check_cells", lambda *args: None)
    path = ROOT / "configs/benchmark" / name
    main(["benchmark", "--config", str(path), "--dry-run", "--out", str(tmp_path / "out")])
    own = merged(*(layer for _, layer in load(str(path))))["strategies"]
    said = capsys.readouterr().out
    assert all(f"{strategy}: 20 ms/step" in said for strategy in own)
    plan = read_plan(path)
    assert {cell.strategy for cell in plan.cells} == {"scratch", *own}
    narrow = yaml.safe_load((ROOT / "configs/base/narrow_heads.yaml").read_text())["model"]["init_args"]
    rows = [cell for cell in plan.cells if cell.name.startswith(("pretrain/longitudinal_local", "pretrain/paper"))]
    assert rows or name == "tasks.yaml"
    assert all(cell.config["model"]["init_args"][name] == value for cell in rows for name, value in narrow.items())
    few = [cell.config["data"]["init_args"]["few_shot"] for cell in plan.cells if cell.labelled]
    assert {(part["subjects"], part["visits"]) for part in few} == {(1, 1)}
    assert all(f"fine-tuning{f', {task}' if task else ''}: 20 ms/step" in said for task in plan.tasks)
    first = [cell for cell in plan.cells if cell.seed == 0 and (cell.stage == "pretrain" or cell.strategy == "scratch")]
    tasks = [cell for cell in first if cell.budget == "frozen"]
    resolve({"demo.yaml": first, "brains.yaml": first[-1:], "tasks.yaml": tasks}[name])
    if name == "demo.yaml":
        check_leakage(first)


def test_slurm_says_what_it_needs_and_runs_what_it_is_given(tmp_path, monkeypatch):
    import sys
    import types

    import lssl.benchmark.slurm as slurm

    program = fake(tmp_path, monkeypatch)
    plan = read_plan(write_plan(tmp_path, seeds=[0], finetune=SMALL, slurm={"timeout_min": 7}))
    fingerprints = dict.fromkeys((cell.name for cell in plan.cells), "key")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"pip install 'lssl\[slurm\]'"):
        slurm.run_on_slurm(plan, fingerprints, 3, print)

    class Job:
        def __init__(self, result):
            self.result = result
            self.cancelled = False

        def cancel(self):
            self.cancelled = True

    given, jobs = {}, []

    class Executor:
        def __init__(self, folder):
            pass

        def update_parameters(self, **parameters):
            given.update(parameters)

        def map_array(self, function, tasks):
            jobs.extend(Job(functools.partial(function, task)) for task in tasks)
            return jobs[-len(tasks) :]

    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=Executor))
    monkeypatch.setattr(slurm, "run_cells", functools.partial(run_cells, program=program))
    monkeypatch.setenv("FAKE_FAIL", "pretrain/bad")
    outcome = slurm.run_on_slurm(plan, fingerprints, 3, lambda *event: None)
    assert given == {"name": "lssl-benchmark", "slurm_array_parallelism": 3, "timeout_min": 7}
    assert outcome.failed == {"pretrain/bad/seed-0": "it was told to fail"}
    assert len(outcome.skipped) == 1
    assert len(outcome.finished) == len(plan.cells) - 2

    def interrupt(*event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slurm.run_on_slurm(plan, dict.fromkeys(fingerprints, "another key"), 3, interrupt)
    assert jobs[-1].cancelled


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "Job failed with trace:\n-----\nTraceback\n  f()\nOSError: no space\n-----\nSee\n  - a.err",
            "OSError: no space",
        ),
        ("Job 7_1 (task: 0) with path /x\nhas not produced any output", "Job 7_1 (task: 0) with path /x"),
        ("", "RuntimeError"),
    ],
)
def test_a_lost_job_is_reported_in_one_line(text, line):
    from lssl.benchmark.slurm import _reason

    assert _reason(RuntimeError(text)) == line


@pytest.mark.slow
def test_a_miniature_runs_to_its_tables_and_again_in_no_time(real, capsys):
    path = real()
    main(["benchmark", "--config", str(path), "--jobs", "2", "--report"])
    out = path.parent / "out"
    table = pd.read_csv(out / "results.csv")
    names = {"scratch", "visit_order"}
    assert set(table["strategy"]) == names
    assert {"dice", "stcs", "aspc", "trajectory_error", "val_dice", "rank/bottleneck", "parameters"} <= {
        *table["metric"]
    }
    dice = table[(table["metric"] == "dice") & table["chosen"].astype(bool)]
    assert dice.groupby(["strategy", "labelled", "seed"])["subject"].nunique().eq(2).all()
    assert table[table["metric"] == "val_dice"]["value"].between(0, 1).all()
    text = (out / "table.md").read_text()
    assert all(name in text for name in names)
    page = (out / "report.html").read_text()
    # results and curves; the report of the pretraining; a test subject of each row
    assert page.count("data:image/png") == 2 + 1 + 2
    capsys.readouterr()
    main(["benchmark", "--config", str(path)])
    assert "0 finished now" in capsys.readouterr().out
    assert (out / "table.md").read_text() == text
    shutil.rmtree(out / "cells" / "finetune" / "visit_order" / "seed-1" / "labelled-1" / "short" / "rate-0.003")
    main(["benchmark", "--config", str(path)])
    assert "1 finished now" in capsys.readouterr().out
    again = pd.read_csv(out / "results.csv")
    scores = [t[t["subject"].notna()].reset_index(drop=True) for t in (table, again)]
    pd.testing.assert_frame_equal(*scores)  # the same to the bit


@pytest.mark.slow
def test_a_miniature_of_two_tasks_runs_to_its_tables(real):
    groups = {"slow": {"ventricles": 0.0}, "fast": {"ventricles": 0.1}}
    options = {"rate_groups": groups, "targets": {"age": "visits"}, "num_workers": 0}
    data = {**DATA, "init_args": {**DATA["init_args"], **options}}
    tasks = {"segmentation": {}, "age": {"config": "regressor", "model": {"init_args": {"target": "age"}}}}
    path = real(seeds=[0], data=data, finetune={**REAL["finetune"], "tasks": tasks})
    main(["benchmark", "--config", str(path), "--jobs", "2"])
    out = path.parent / "out"
    table = pd.read_csv(out / "results.csv", dtype={"subject": str})
    for task, score, figure in (("segmentation", "dice", "val_dice"), ("age", "absolute_error", "val_mae")):
        own = table[(table["task"] == task) & table["chosen"].astype(bool)]
        assert own[own["metric"] == score].groupby(["strategy", "labelled"])["subject"].nunique().eq(2).all()
        cells = table[(table["task"] == task) & (table["metric"] == figure)]
        assert cells["value"].notna().all()
        logs = (out / "cells" / "finetune" / task).glob("**/run/metrics.csv")
        for log in logs:  # validated once, after the last step
            assert pd.read_csv(log).dropna(subset=[figure.replace("_", "/")])["step"].tolist() == [2]
    age = table[(table["task"] == "age") & (table["metric"] == "mae")]
    assert set(age["labelled"]) == {"all"}
    assert age["subject"].isna().all()
    text = (out / "table.md").read_text()
    assert "### Fine-tuned for segmentation" in text
    assert "↓ absolute error" in text
