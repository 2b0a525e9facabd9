"""From YAML to cells: what is shared, what differs, what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from plans import PLAN, write_plan

from lssl.benchmark.fingerprints import cell_fingerprints
from lssl.benchmark.plan import read_plan
from lssl.cli.compose import merged
from lssl.utils.errors import InputError


def cell(plan, start, **wanted):
    found = [c for c in plan.cells if c.name.startswith(start) and all(getattr(c, k) == v for k, v in wanted.items())]
    return found[0]


def with_budget(**own):
    return {**PLAN["finetune"], "budgets": {"short": {"trainer": {"max_steps": 3}, **own}}}


def test_every_cell_of_the_grid_and_a_ceiling_is_there(tmp_path):
    plan = read_plan(write_plan(tmp_path))
    pretraining = [c for c in plan.cells if c.stage == "pretrain"]
    tuning = [c for c in plan.cells if c.stage == "finetune"]
    assert len(pretraining) == 2 * 3
    assert len(tuning) == 3 * 3 * 2 * 2 + 3 * 2  # strategies, seeds, rates, budgets; and scratch with all labels
    assert {(c.strategy, c.budget) for c in tuning if c.labelled is None} == {("scratch", "long")}
    assert len({c.name for c in plan.cells}) == len({str(c.folder) for c in plan.cells}) == len(plan.cells)
    assert plan.cells[: len(pretraining)] == pretraining
    assert plan.parts == {"scratch": "–", "good": "network", "bad": "encoder"}


def test_a_budget_of_scratch_alone_is_no_other_rows(tmp_path):
    short, long = PLAN["finetune"]["budgets"].values()
    budgets = {"short": short, "long": {"only": "scratch", **long}}
    plan = read_plan(write_plan(tmp_path, finetune={**PLAN["finetune"], "budgets": budgets}))
    tuning = [c for c in plan.cells if c.stage == "finetune"]
    assert {(c.strategy, c.budget) for c in tuning if c.labelled == 1 and c.budget == "long"} == {("scratch", "long")}
    assert len(tuning) == 3 * 3 * 2 + 3 * 2 * 2  # strategies, seeds, rates; and longer from scratch, few labels and all
    as_it_was = {c.name: c for c in read_plan(write_plan(tmp_path)).cells}
    assert all(c.config == as_it_was[c.name].config for c in plan.cells)


def test_a_cell_is_paired_with_its_sisters_in_all_that_chance_decides(tmp_path):
    plan = read_plan(write_plan(tmp_path))
    for seed in PLAN["seeds"]:
        sisters = [c for c in plan.cells if c.stage == "finetune" and (c.seed, c.labelled) == (seed, 1)]
        assert {c.config["seed_everything"] for c in sisters} == {seed}
        assert {c.config["data"]["init_args"]["few_shot"]["seed"] for c in sisters} == {seed}
    configs = [c.config for c in plan.cells]
    assert all(c["data"]["init_args"]["split"] == [0.4, 0.2, 0.4] for c in configs)
    assert all(c["backbone"] == PLAN["backbone"] for c in configs)


def test_fine_tuning_starts_from_its_own_strategy_and_seed(tmp_path):
    plan = read_plan(write_plan(tmp_path))
    by_name = {c.name: c for c in plan.cells}
    for tuned in (c for c in plan.cells if c.stage == "finetune"):
        init = tuned.config["model"]["init_args"]
        assert init["optimizer"]["init_args"]["lr"] == tuned.rate
        assert tuned.config["data"]["init_args"]["few_shot"]["steps"] == tuned.steps  # validated where it ends
        if tuned.strategy == "scratch":
            assert init["pretrained"] is None
            continue
        start = by_name[tuned.needs]
        assert (start.strategy, start.seed) == (tuned.strategy, tuned.seed)
        assert init["pretrained"] == str(start.run / "checkpoints" / "last.ckpt")
        assert init["part"] == plan.parts[tuned.strategy]


def test_network_and_data_of_all_replace_those_of_a_config_and_differences_are_named(tmp_path):
    own = {
        "model": {"class_path": "LongitudinalLocal"},
        "data": {"init_args": {"subjects": 99, "pairs": "baseline"}},
        "backbone": {"padding": "reflect"},
        "views": {"size": 96, "rotation": 10.0},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own))
    strategies = {"mine": {"config": "mine.yaml", "trainer": {"max_steps": 7}}, "other": PLAN["strategies"]["bad"]}
    plan = read_plan(write_plan(tmp_path, strategies=strategies))
    config = cell(plan, "pretrain/mine").config
    stays = {"pairs": "baseline"}  # what the recipe needs of any data; its subjects go with its data
    assert config["data"] == {
        "class_path": PLAN["data"]["class_path"],
        "init_args": {**PLAN["data"]["init_args"], **stays},
    }
    assert config["backbone"] == PLAN["backbone"]
    assert config["views"] == {"size": 32, "rotation": 10.0}
    assert plan.differences() == {
        "data.init_args.pairs": {"mine": "baseline", "other": "default"},
        "trainer.max_steps": {"mine": 7, "other": 5},
        "views.rotation": {"mine": 10.0, "other": "default"},
    }


def test_merging_leaves_the_arguments_of_another_class_behind():
    base = {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1, "betas": [0, 1]}}, "a": 1}
    same = merged(base, {"optimizer": {"class_path": "AdamW", "init_args": {"lr": 2}}})
    assert same["optimizer"]["init_args"] == {"lr": 2, "betas": [0, 1]}
    other = merged(base, {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 2}}})
    assert other == {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 2}}, "a": 1}
    assert base["optimizer"]["init_args"]["lr"] == 1


@pytest.mark.parametrize("name", ["lightning.pytorch.loggers.WandbLogger", "lssl.runs.loggers.RunWandb"])
def test_weights_and_biases_gets_one_group_beside_the_csv(name, tmp_path):
    wandb = {"class_path": name, "init_args": {"project": "p"}}
    trainer = {"max_steps": 5, "logger": wandb}
    first = read_plan(write_plan(tmp_path, pretrain={"trainer": trainer})).cells[0]
    csv, other = first.config["trainer"]["logger"]
    assert csv["class_path"].endswith("CSVLogger")
    assert other["init_args"] == {"project": "p", "name": first.name, "group": "out"}


def test_a_key_changes_with_what_the_cell_depends_on_alone(tmp_path):
    def fingerprints(**groups):
        plan = read_plan(write_plan(tmp_path, **groups))
        return cell_fingerprints(plan)

    before = fingerprints()
    assert fingerprints(seeds=[0, 1, 2, 3]).items() >= before.items()  # more seeds leave the others as they are
    longer = {**PLAN["finetune"], "budgets": {**PLAN["finetune"]["budgets"], "long": {"trainer": {"max_steps": 8}}}}
    changed = {name for name, key in fingerprints(finetune=longer).items() if key != before[name]}
    assert changed == {name for name in before if "/long/" in name}
    changed = {
        name for name, key in fingerprints(pretrain={"trainer": {"max_steps": 6}}).items() if key != before[name]
    }
    assert changed == {name for name in before if "scratch" not in name}  # what starts from it, too
    assert cell_fingerprints(read_plan(write_plan(tmp_path), tmp_path / "elsewhere")) == before


def test_a_key_follows_the_users_own_file_and_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_way.py").write_text("one = 1\n")
    (tmp_path / "table.csv").write_text("a\n")
    data = {"class_path": "NiftiDataModule", "init_args": {"root": "table.csv"}}
    strategies = {"mine": {"model": {"class_path": "own_way.Mine"}}}

    def key(name="pretrain/mine/seed-0"):
        return cell_fingerprints(read_plan(write_plan(tmp_path, strategies=strategies, data=data)))[name]

    first = key()
    (tmp_path / "own_way.py").write_text("one = 2\n")
    second = key()
    (tmp_path / "table.csv").write_text("b\n")
    assert len({first, second, key()}) == 3
    data["init_args"]["root"] = "images"
    (tmp_path / "images" / "sub-1").mkdir(parents=True)
    (tmp_path / "images" / "sub-1" / "a.nii").write_text("1")
    third = key()
    (tmp_path / "images" / "sub-1" / "b.nii").write_text("1")
    assert key() != third


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ({"sedes": [1]}, "no key 'sedes'; did you mean 'seeds'"),
        ({"seeds": [0, 0]}, "seeds is"),
        ({"labelled": [0]}, "labelled is"),
        ({"labelled": 3}, "labelled is 3"),
        ({"finetune": {**PLAN["finetune"], "learning_rates": []}}, "learning_rates is"),
        ({"finetune": {**PLAN["finetune"], "budgets": {"short": {}}}}, "budgets.short needs"),
        ({"finetune": with_budget(only="good")}, "short.only is 'good'; give scratch"),
        ({"finetune": with_budget(only="scratch")}, "budgets are all of scratch alone"),
        ({"pretrain": {"steps": 4}}, "no key 'pretrain.steps'"),
        ({"strategies": {"a b": {}}}, "names a folder"),
        ({"strategies": {"mine": None}}, "'mine' needs settings"),
        ({"strategies": {"mine": {"part": "decoder"}}}, "give network or encoder"),
        ({"strategies": {"mine": {"config": "nowhere.yaml"}}}, "There is no config nowhere.yaml"),
        ({"pretrain": {}}, "pretrain.trainer.max_steps is missing"),
        ({"rotate": 2}, "rotate is 2; give a number of folds, at least 3"),
        ({"rotate": 4, "labelled": [1, 3]}, "at least 5: 3 to train"),
        ({"rotate": 7}, "learning_rates can be only one"),
    ],
)
def test_one_sentence_for_a_plan_that_cannot_be(groups, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        read_plan(write_plan(tmp_path, **groups))


def test_planning_needs_no_torch():
    room = Path(__file__).parents[2] / "lssl" / "benchmark"
    light = [p.stem for p in room.glob("*.py") if "without torch" in p.read_text().split('"""')[1]]
    assert {"plan", "fingerprints", "output_folder", "run", "results", "statistics", "tables"} <= {*light}
    modules = ", ".join(f"lssl.benchmark.{name}" for name in [*light, "command"])
    code = f"import sys, {modules}; print(*{{'torch', 'lightning', 'monai'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_data_by_path_in_the_plan_or_beside_it(tmp_path):
    """They are recognised as by `lssl fit`, and change nothing of what the recipes need."""
    table = tmp_path / "visits.csv"
    table.write_text("subject,session,image\na,1,x\na,2,y\n")
    (tmp_path / "recipe.yaml").write_text("data: {init_args: {batch_size: 7}}\nmodel: LongitudinalLocal\n")
    strategies = {"mine": {"config": "recipe"}}
    inside = read_plan(write_plan(tmp_path, data=str(table), strategies=strategies))
    beside = read_plan(write_plan(tmp_path, strategies=strategies), data=str(table))
    for plan in (inside, beside):
        assert plan.note == f"{table}: table, 2 visits of 1 subject, 0 left out"
        data = cell(plan, "pretrain/mine").config["data"]
        assert data["class_path"] == "NiftiDataModule"
        assert data["init_args"] == {"batch_size": 7, "root": None, "table": str(table)}
    with pytest.raises(InputError, match="says no 'data' for"):
        read_plan(write_plan(tmp_path, data=None))


def test_a_plan_may_have_a_base(tmp_path):
    write_plan(tmp_path).rename(tmp_path / "base.yaml")
    (tmp_path / "plan.yaml").write_text("base: base.yaml\nseeds: [4]\n")
    assert {one.seed for one in read_plan(tmp_path / "plan.yaml").cells} == {4}


@pytest.mark.parametrize("name", ["lssl.callbacks.Report", "my.Report", "lssl.callbacks.Pictures"])
def test_only_a_report_keeps_its_options_in_pretraining(name, tmp_path):
    """A class of another package that is called Report, too, is none."""
    callback = {"class_path": name, "init_args": {"tap": "x"}}
    plan = read_plan(write_plan(tmp_path, pretrain={"trainer": {"max_steps": 5, "callbacks": [callback]}}))
    ours = cell(plan, "pretrain/good").config["trainer"]["callbacks"]
    assert ours == ([callback] if name == "lssl.callbacks.Report" else [{"class_path": "lssl.callbacks.Report"}])


def test_a_row_may_start_from_a_file(tmp_path):
    file = tmp_path / "anatomix.pth"
    file.write_bytes(b"weights")
    row = {"pretrained": str(file), "part": "encoder", "partial": True}
    plan = read_plan(write_plan(tmp_path, strategies={"file": row}))
    assert {cell.stage for cell in plan.cells} == {"finetune"}
    mine = [cell for cell in plan.cells if cell.strategy == "file"]
    assert len(mine) == 3 * 2 * 2  # seeds, rates, budgets
    for cell in mine:
        init = cell.config["model"]["init_args"]
        assert (init["pretrained"], init["part"], init["partial"], cell.needs) == (str(file), "encoder", True, None)
    before = cell_fingerprints(plan)[mine[0].name]
    file.write_bytes(b"others")
    assert cell_fingerprints(plan)[mine[0].name] != before
    for wrong, said in (
        ({"pretrained": "no.pth"}, "there is no file no.pth"),
        ({**row, "model": {}}, "takes no model"),
    ):
        with pytest.raises(InputError, match=said):
            read_plan(write_plan(tmp_path, strategies={"file": wrong}))


def test_estimates_add_up():
    from lssl.benchmark.estimate import Timing, estimate

    class Cell:
        def __init__(self, stage, strategy, steps):
            self.stage, self.strategy, self.steps, self.task = stage, strategy, steps, ""

    cells = [Cell("pretrain", "a", 100), Cell("finetune", "a", 50), Cell("finetune", "scratch", 50)]
    timings = {"a": Timing(10.0, 2.0, 3.0), "fine-tuning": Timing(20.0, 1.0, 1.0)}
    hours, memory = estimate(cells, timings, 2)
    assert hours * 3600 == pytest.approx((10 + 200 + 70 + 70) / 2)
    assert memory == 4.0
