"""Several tasks in one plan: cells of each, scores that are compared the right way round, and one family of tests."""

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
from plans import PLAN, finish, write_plan

import lssl.benchmark.report as report
from lssl.benchmark.fingerprints import cell_fingerprints
from lssl.benchmark.plan import read_plan
from lssl.benchmark.results import _compared, _with_signs, choose, collect, differences, entries
from lssl.benchmark.statistics import holm
from lssl.benchmark.tables import _best, ceiling_warnings, sheets
from lssl.utils.errors import InputError

TASKS = {
    "segmentation": {},
    "lesions": {"config": "change_segmenter", "data": {"init_args": {"labels": "change"}}},
    "age": {"config": "regressor", "model": {"init_args": {"target": "age"}}},
    "diagnosis": {"model": {"class_path": "lssl.Classifier", "init_args": {"target": "group"}}},
}
FINETUNE = {
    **PLAN["finetune"],
    "budgets": {"short": {"trainer": {"max_steps": 3}}},
    "model": {"class_path": "lssl.Segmenter", "init_args": {"window_overlap": 0.25}},
}


def plan_with(folder, tasks=TASKS, **groups):
    return read_plan(write_plan(folder, **{"seeds": [0, 1], "finetune": {**FINETUNE, "tasks": tasks}, **groups}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        plan = plan_with(tmp_path_factory.mktemp("tasks"))
        fingerprints = cell_fingerprints(plan)
        finish(plan, fingerprints, patch)
        return plan, fingerprints, collect(plan, fingerprints)


def rows(finished):
    plan, _, table = finished
    return {(e.task.name, e.strategy, e.labelled): e for e in entries(table, list(plan.parts), plan.tasks)}


def test_every_task_has_its_cells_and_they_share_the_pretraining(tmp_path):
    plan, before = plan_with(tmp_path), read_plan(write_plan(tmp_path, seeds=[0, 1], finetune=FINETUNE))
    starts = [[cell.name for cell in each.cells if cell.stage == "pretrain"] for each in (plan, before)]
    assert starts[0] == starts[1]
    tuned = [cell for cell in plan.cells if cell.stage == "finetune"]
    for name in TASKS:
        own = [cell for cell in tuned if cell.task == name]
        few = name in ("segmentation", "lesions")
        assert len(own) == 2 * 2 * (3 + few)  # seeds, rates, strategies; of few labels a ceiling
        assert {cell.labelled for cell in own} == ({1, None} if few else {None})
        assert all(cell.name.startswith(f"finetune/{name}/{cell.strategy}/seed-") for cell in own)
    assert len({cell.name for cell in plan.cells}) == len(plan.cells)
    for cell in tuned:  # validated once, at the end, however long an epoch is
        trainer = cell.config["trainer"]
        assert (trainer["check_val_every_n_epoch"], trainer["val_check_interval"]) == (None, cell.steps)


def test_a_tasks_own_groups_come_last_and_another_model_leaves_arguments_behind(tmp_path):
    data = {**PLAN["data"], "init_args": {**PLAN["data"]["init_args"], "num_workers": 0}}
    plan = plan_with(tmp_path, data=data)
    config = {cell.task: cell.config for cell in reversed(plan.cells)}
    assert config["segmentation"]["model"]["init_args"]["window_overlap"] == 0.25
    assert config["lesions"]["data"]["init_args"]["labels"] == "change"
    assert "labels" not in config["segmentation"]["data"]["init_args"]
    assert config["lesions"]["views"] == {"same_visit": 0.0, "geometry": "aligned", "size": 32}
    for name, model in (
        ("lesions", "lssl.ChangeSegmenter"),
        ("age", "lssl.Regressor"),
        ("diagnosis", "lssl.Classifier"),
    ):
        assert config[name]["model"]["class_path"] == model
        assert "window_overlap" not in config[name]["model"]["init_args"]
    age = config["age"]["model"]["init_args"]
    assert (age["target"], age["tap"], age["optimizer"]["class_path"]) == ("age", "bottleneck", "torch.optim.AdamW")
    assert config["age"]["data"]["init_args"]["num_workers"] == 0  # data of all come after the task's file


def test_differences_have_the_sign_of_the_score_and_bold_that_of_the_gain(finished):
    found = rows(finished)
    for task, labelled, sign in (
        ("segmentation", "1", 1),
        ("lesions", "1", 1),
        ("age", "all", -1),
        ("diagnosis", "all", -1),
    ):
        good, bad = (found[task, name, labelled] for name in ("good", "bad"))
        assert good.difference.mean == pytest.approx(sign * 0.1)
        assert bad.difference.mean == pytest.approx(sign * (0.05 - 0.1))  # at the other rate
        assert _best([found[task, name, labelled] for name in ("scratch", "good", "bad")]) == {id(good)}
        worse = dataclasses.replace(good, scores=good.scores - sign * 0.2, p=0.001)
        worse = _compared(worse, [found[task, "scratch", labelled]])
        assert _best([worse]) == set()  # sure, and the wrong way
    assert found["lesions", "good", "1"].scores.shape == (2, 3)  # a subject without new lesions has no F1
    assert found["lesions", "good", "1"].means["false_lesions"] == 2
    assert found["diagnosis", "good", "all"].means["auc"] == pytest.approx(0.85)


def test_rates_are_chosen_by_each_tasks_own_figure(finished):
    plan, _, table = finished
    for (strategy, *_), rate in choose(table, plan.tasks).items():
        assert rate == (0.01 if strategy == "bad" else 0.001)  # of age, the lower error
    figures = {name: set(part["metric"]) for name, part in table.groupby("task")}
    assert "val_mae" in figures["age"]
    assert "val_brier" in figures["diagnosis"]
    assert "val_dice" in figures["lesions"] & figures["segmentation"]


def test_all_tasks_are_one_family(finished):
    plan, _, table = finished
    listed = entries(table, list(plan.parts), plan.tasks)
    assert [*dict.fromkeys(entry.task.name for entry in listed)] == [*TASKS]
    compared = [entry for entry in listed if entry.difference is not None]
    assert len(compared) == 2 * len(TASKS)
    assert [entry.p for entry in compared] == holm([entry.difference.p for entry in compared])
    csv = differences(listed)
    assert set(csv["metric"]) == {f"{score}_minus_scratch" for score in ("dice", "f1", "absolute_error", "brier")}
    assert csv["task"].tolist() == [entry.task.name for entry in compared]


def test_each_task_has_a_table_in_its_own_words(finished, tmp_path):
    plan, fingerprints, table = finished
    named = {sheet.title: sheet for sheet in sheets(plan, table, [*rows(finished).values()])}
    age, diagnosis = named["Fine-tuned for age"], named["Fine-tuned for diagnosis"]
    assert age.head[4] == "↓ absolute error, mean ± sd over seeds"
    assert [row[2] for row in age.rows if "**" in row[4]] == ["good"]
    assert {row[0] for row in age.rows} == {"all"}  # no ceiling: nobody learns from fewer
    assert dict(zip(diagnosis.head, diagnosis.rows[1], strict=True))["↑ AUC"] == "0.85"
    assert "STCS (true)" in named["Fine-tuned for segmentation"].head
    notes = [note for sheet in named.values() for note in sheet.notes]
    assert sum("Holm-corrected over the rows of all tasks" in note for note in notes) == 2  # above 0, below 0
    assert any("difference to scratch is below 0" in note for note in age.notes)
    assert {"segmentation: Dice per structure", "lesions: F1 by lesion per structure"} <= {*named}
    assert not any(title.startswith("age:") for title in named)
    report.write_results(plan, fingerprints, page=False)
    written = pd.read_csv(plan.out / "results.csv")
    assert list(written)[:3] == ["stage", "task", "strategy"]
    assert set(written["task"].dropna()) == {*TASKS}


def test_doubts_follow_the_direction(finished):
    found = rows(finished)
    good = found["age", "good", "all"]
    short = dataclasses.replace(good, means={**good.means, "steps": 1.0}, budget="one")
    lower, higher = (dataclasses.replace(good, scores=good.scores + change) for change in (-0.1, 0.1))
    assert "short is better by +0.1" in _with_signs(short, [short, lower]).rising
    assert _with_signs(short, [short, higher]).rising == ""
    scratch = found["age", "scratch", "all"]
    longer = dataclasses.replace(scratch, budget="long", compute=2 * scratch.compute)
    rich = dataclasses.replace(good, pretraining_compute=9 * good.compute)
    for change, taken in ((0.1, "short"), (-0.1, "long")):  # the lower validation error is taken
        other = dataclasses.replace(longer, means={**longer.means, "val_mae": longer.means["val_mae"] + change})
        assert _compared(rich, [scratch, other]).equal[0] == taken
    assert _compared(rich, [found["diagnosis", "scratch", "all"]]).difference is None  # of another task
    few = dataclasses.replace(found["segmentation", "good", "1"].task, score="hd95", higher=False)
    ceiling, row = (
        dataclasses.replace(found["segmentation", name, labelled], task=few)
        for name, labelled in (("scratch", "all"), ("good", "1"))
    )
    assert "lies above 1 of the rows" in ceiling_warnings([ceiling, row])[0]  # fewer labels, a lower distance
    far = dataclasses.replace(row, scores=row.scores + 1)
    assert ceiling_warnings([ceiling, far]) == []


def test_a_score_and_a_model_of_ones_own(tmp_path):
    own = {"model": {"class_path": "mine.Counter"}, "score": "miscounts", "better": "lower"}
    distance = {"score": "hd95", "better": "lower"}
    tasks = plan_with(tmp_path, tasks={"count": own, "surface": distance}).tasks
    assert (tasks["count"].score, tasks["count"].higher, tasks["count"].validation) == ("miscounts", False, "val/loss")
    assert (tasks["surface"].score, tasks["surface"].higher) == ("hd95", False)
    assert (tasks["surface"].validation, tasks["surface"].validation_higher) == ("val/dice", True)


def test_a_score_that_no_test_wrote_is_one_sentence(finished):
    plan, _, table = finished
    with pytest.raises(InputError, match=r"The tests of lesions \(.*\) hold no f1 of a subject .* hold false_lesions"):
        entries(table[table["metric"] != "f1"], list(plan.parts), plan.tasks)


@pytest.mark.parametrize(
    ("finetune", "sentence"),
    [
        ({"tasks": {}}, "finetune.tasks is {}"),
        ({"tasks": ["age"]}, "give each task a name"),
        ({"tasks": {"a/b": {}}}, "'a/b' names a folder"),
        ({"tasks": {"age": None}}, "finetune.tasks.age is None; give a config or a model"),
        ({"tasks": {"age": {"cofnig": "regressor"}}}, "no key 'finetune.tasks.age.cofnig'; did you mean 'config'"),
        ({"tasks": {"age": {"labelled": [0]}}}, "finetune.tasks.age.labelled is"),
        ({"tasks": {"age": {"labelled": []}}}, "finetune.tasks.age.labelled is"),
        ({"tasks": {"age": {"labelled": [1], "config": "regressor"}}}, "a Regressor learns from a target of each"),
        ({"tasks": {"age": {"score": "hd95"}}}, "give score and better together"),
        ({"tasks": {"age": {"score": "hd95", "better": "less"}}}, "better is 'less'; give higher or lower"),
        ({"tasks": {"age": {"model": {"class_path": "mine.Counter"}}}}, "its model is Counter, which is none of"),
        ({"model": {"class_path": "lssl.Regressor"}}, "its model is Regressor, and without tasks a Segmenter"),
    ],
)
def test_one_sentence_for_tasks_that_cannot_be(finetune, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        read_plan(write_plan(tmp_path, finetune={**FINETUNE, **finetune}))


def test_numbers_of_labels_are_for_label_maps_alone(tmp_path):
    plan = plan_with(tmp_path, labelled=None)
    assert {cell.labelled for cell in plan.cells} == {None}
    own = {**TASKS, "lesions": {**TASKS["lesions"], "labelled": [2, 3]}}
    cells = plan_with(tmp_path, tasks=own).cells
    assert {cell.labelled for cell in cells if cell.task == "lesions"} == {2, 3, None}  # and the ceiling
    assert {cell.labelled for cell in cells if cell.task == "segmentation"} == {1, None}
    with pytest.raises(InputError, match="at least 5: 3 to train"):
        plan_with(tmp_path, tasks=own, rotate=4)
    with pytest.raises(InputError, match="says no 'labelled'"):
        read_plan(write_plan(tmp_path, labelled=None))


def test_without_tasks_tables_are_as_they_were(tmp_path, monkeypatch):
    plan = read_plan(write_plan(tmp_path, seeds=[0, 1]))
    fingerprints = cell_fingerprints(plan)
    finish(plan, fingerprints, monkeypatch)
    report.write_results(plan, fingerprints, page=False)
    _, _, tables = (plan.out / "table.md").read_text().partition("\n\n")
    assert tables == (Path(__file__).parent / "without_tasks.md").read_text()
    assert list(pd.read_csv(plan.out / "results.csv"))[:3] == ["stage", "strategy", "seed"]
