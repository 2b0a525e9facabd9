"""Data beside a recipe: recognised by what they hold, and deciding nothing that the recipe does."""

# ruff: noqa: F811

from __future__ import annotations

import itertools

import pytest
import yaml
from composing import CONFIGS, parsed, prepared, write  # noqa: F401
from helpers import few

from lssl.cli.arguments import read_arguments
from lssl.cli.complete import complete
from lssl.cli.compose import OF_THE_RECIPE, compose, load, merged, without_data
from lssl.cli.main import main
from lssl.cli.references import resolved
from lssl.cli.training import TrainingCLI
from lssl.data.datamodule import PairDataModule
from lssl.utils.errors import InputError

SHOWN = {"demo", "demo_finetune"}  # these ask for procedural heads
EXAMPLES = ("classifier", "global_contrastive")  # of those whose data alone differ, in every run of the suite
RECIPES = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in [*CONFIGS.glob("*.yaml"), *(CONFIGS / "paper").glob("*.yaml")]
    if path.stem not in SHOWN
)


# --- what a recipe decides --------------------------------------------------------------------------------------------


def test_what_the_method_needs_of_any_data_outlives_their_class():
    one = {
        "data": {"class_path": "PhantomDataModule", "init_args": {"subjects": 3, "split": [1, 0, 0], "batch_size": 8}}
    }
    other = {"data": {"class_path": "NiftiDataModule", "init_args": {"root": "x"}}}
    assert merged(one, other)["data"]["init_args"] == {"batch_size": 8, "root": "x"}
    assert merged(other, one)["data"]["init_args"] == one["data"]["init_args"]
    assert without_data(one)["data"] == {"init_args": {"batch_size": 8}}


def test_recipes_bring_no_data_of_their_own():
    assert len(RECIPES) >= 10
    for name in RECIPES:
        values = compose([name]).values
        assert values["data"].keys() == {"init_args"}
        assert {*values["data"]["init_args"]} <= {*OF_THE_RECIPE}


def test_every_option_of_a_datamodule_belongs_to_the_recipe_or_to_the_data():
    import inspect

    assert {*inspect.signature(PairDataModule).parameters} == {
        *OF_THE_RECIPE,
        "split",
        "folds",
        "targets",
        "seed",
        "on_error",
    }


# --- data -------------------------------------------------------------------------------------------------------------


def test_data_are_recognised_by_what_they_hold(tmp_path, bids, prepared):
    next((bids / "sub-02" / "ses-M012" / "anat").glob("*")).unlink()
    file = next(bids.rglob("*.nii.gz"))
    table = write(tmp_path / "mine.csv", "subject,session,image\na,1,x\na,2,y\n")
    part = write(prepared / "part.csv", "subject,session,image\nsub-1,ses-1,a\n")
    for path, cls, arguments, words in (
        (prepared, "PreparedDataModule", {"root": str(prepared), "table": None}, "prepared, 3 visits of 2 subjects, 0"),
        (bids, "NiftiDataModule", {"root": str(bids), "table": None}, "BIDS, 9 visits of 5 subjects, 1 left out"),
        (table, "NiftiDataModule", {"root": None, "table": table}, "table, 2 visits of 1 subject, 0 left out"),
        (part, "PreparedDataModule", {"root": str(prepared), "table": part}, "1 visit of 1 subject, 0 left out"),
        (file, "NiftiDataModule", {"root": str(file), "table": None}, "one file"),
    ):
        config = compose(["longitudinal_local"], str(path))
        assert config.values["data"]["class_path"] == cls
        assert arguments.items() <= config.values["data"]["init_args"].items()
        assert config.found.sentence().startswith(f"{path}: ")
        assert words in config.found.sentence()
        layer = write(tmp_path / "layer.yaml", f"data: {path}\n")
        assert compose([layer, "longitudinal_local"]).values == config.values


def test_what_is_no_data_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    half = tmp_path / "half"
    write(half / "dataset.json", '{"settings": "x"}')
    for path, words in (
        (tmp_path / "empty", "neither a folder that `lssl prepare` wrote"),
        (half, "its preparation was interrupted"),
        (tmp_path / "nowhere.csv", "There is no file or folder"),
        (write(tmp_path / "text.txt", "x"), "is no data"),
    ):
        with pytest.raises(InputError, match=words):
            compose([], str(path))


def test_no_data_names_the_three_ways_to_give_some(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "longitudinal_local"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert all(way in said for way in ("--data PATH", "--data CLASS (PhantomDataModule", "a config with data:"))


@pytest.mark.parametrize("recipe", few(sorted(RECIPES, key=lambda recipe: recipe not in EXAMPLES), len(EXAMPLES)))
def test_data_change_nothing_of_a_recipe_wherever_they_stand(recipe, capsys, bids, prepared):
    """Phantom, BIDS, prepared, before and after it: the class of the data and its own arguments differ, no more."""
    alone, found = resolved(compose([recipe]).values), []
    target = ["--model.init_args.target", "sex"] if recipe in ("classifier", "regressor") else []  # theirs to give
    for data, cls in (
        ("PhantomDataModule", "PhantomDataModule"),
        (str(bids), "NiftiDataModule"),
        (str(prepared), "PreparedDataModule"),
    ):
        both = [["--config", recipe], ["--data", data]]
        given = [read_arguments([*itertools.chain(*order)]) for order in (both, both[::-1])]
        one, other = (complete(read.files, read.data, read.options).values for read in given)
        assert one == other
        config = parsed(capsys, *both[0], *both[1], *target)
        assert config["data"]["class_path"].rpartition(".")[2] == cls
        shared = {key: value for key, value in config["data"]["init_args"].items() if key in OF_THE_RECIPE}
        assert shared.keys() == {*OF_THE_RECIPE}
        assert alone["data"]["init_args"].items() <= shared.items()
        found.append({"recipe": shared, **{key: value for key, value in config.items() if key != "data"}})
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", ["nifti", "prepared", "phantom", "label_maps", "heads", "demo"])
def test_configs_of_data_say_nothing_that_a_recipe_decides(name):
    layers = [layer for _, layer in load(f"data/{name}")]
    assert all(layer.keys() == {"data"} for layer in layers)
    assert not {*merged(*layers)["data"]["init_args"]} & {*OF_THE_RECIPE}


def test_a_run_keeps_its_recipe_on_other_data(tmp_path, bids, capsys):
    """What `lssl test --config RUN/config.yaml --data DIR` composes."""
    saved = parsed(capsys, "--config", "global_contrastive", "--data", "PhantomDataModule")
    config = compose([write(tmp_path / "run.yaml", yaml.safe_dump(saved))], str(bids))
    assert config.values["data"]["init_args"]["batch_size"] == 8
    assert "subjects" not in config.values["data"]["init_args"]


def test_a_users_datamodule_need_not_know_the_recipes_options(tmp_path, monkeypatch):
    text = (
        "class Mine(L.LightningDataModule):\n    def __init__(self, batch_size: int = 1):\n        super().__init__()\n"
    )
    write(tmp_path / "my_data_of_compose.py", f"import lightning as L\n\n\n{text}")
    monkeypatch.syspath_prepend(tmp_path)
    config = complete(["longitudinal_local"], "my_data_of_compose.Mine")
    assert config.values["data"]["init_args"] == {"batch_size": 2}
    TrainingCLI.check(config)
    with pytest.raises(InputError, match="Mine has no option 'nonsense'"):
        TrainingCLI.check(
            complete(["longitudinal_local"], "my_data_of_compose.Mine", [("data.init_args.nonsense", "1")])
        )
