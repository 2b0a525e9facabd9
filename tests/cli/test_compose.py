"""The one rule of composition: what wins over what, what survives, where a value is from, and what is said."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers import ROOT, TINY_NET, fit, sentence, tiny

from lssl.cli.arguments import read_arguments
from lssl.cli.complete import complete
from lssl.cli.compose import OF_THE_RECIPE, Config, compose, find_config, load, merged, without_data
from lssl.cli.main import main
from lssl.cli.references import from_environment, resolved
from lssl.cli.training import TrainingCLI
from lssl.data.datamodule import PairDataModule
from lssl.utils.errors import InputError

CONFIGS = ROOT / "configs"
SHOWN = {"demo", "demo_finetune"}  # these ask for procedural heads
RECIPES = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in [*CONFIGS.glob("*.yaml"), *(CONFIGS / "paper").glob("*.yaml")]
    if path.stem not in SHOWN
)


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def flat(values, path=()):
    if isinstance(values, dict) and values:
        return {key: value for name, inner in values.items() for key, value in flat(inner, (*path, str(name))).items()}
    return {".".join(path): values}


@pytest.fixture
def prepared(tmp_path) -> Path:
    """What is read of a prepared folder before training: its table and description."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    lines = ["subject,session,image,flags", "sub-1,ses-1,a,", "sub-1,ses-2,b,blurred", "sub-2,ses-1,c,"]
    write(folder / "visits.csv", "\n".join(lines) + "\n")
    write(folder / "dataset.json", '{"settings": "x", "options": {}}')
    return folder


# --- merging ----------------------------------------------------------------------------------------------------------


def test_mappings_merge_and_all_else_is_replaced():
    one = {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    assert merged(one, {"a": {"c": [3]}, "d": {"e": 5}}) == {"a": {"b": 1, "c": [3]}, "d": {"e": 5}}
    assert one == {"a": {"b": 1, "c": [1, 2]}, "d": 4}


def test_another_class_takes_none_of_the_former_ones_arguments():
    adam = {"model": {"init_args": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0, 1]}}}}}
    sgd = {"model": {"init_args": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1}}}}}
    same = {"model": {"init_args": {"optimizer": {"class_path": "AdamW", "init_args": {"lr": 1}}}}}
    optimizer = merged(adam, sgd)["model"]["init_args"]["optimizer"]
    assert optimizer == {"class_path": "torch.optim.SGD", "init_args": {"lr": 1}}
    assert merged(adam, same)["model"]["init_args"]["optimizer"]["init_args"] == {"betas": [0, 1], "lr": 1}


def test_a_later_file_drops_no_options_of_an_earlier_files_model(tmp_path):
    own = write(tmp_path / "own.yaml", "model: {class_path: my.Method, init_args: {tap: b}}\n")
    based = write(tmp_path / "based.yaml", "base: demo\nmodel: {class_path: my.Method, init_args: {tap: b}}\n")
    assert compose([str(based)]).values["model"]["init_args"] == {"tap": "b"}  # a file may build on another
    assert compose(["demo"], options=[("model.class_path", "my.Method")]).values["model"] == {"class_path": "my.Method"}
    with pytest.raises(
        InputError, match=r"own.yaml replaces the model LongitudinalLocal .* by Method, .*\(objective, "
    ):
        compose(["demo", str(own)])


def test_arguments_without_a_class_hold_for_whichever_is_named():
    base = {"model": {"init_args": {"hidden": 8}}}
    for layer in ({"model": {"class_path": "A", "init_args": {"taps": []}}}, {"model": "A"}):
        assert merged(base, layer)["model"]["class_path"] == "A"
        assert merged(base, layer)["model"]["init_args"]["hidden"] == 8
        assert merged(layer, base)["model"] == merged(base, layer)["model"]


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


def test_another_network_takes_no_taps_of_the_former():
    one = {"backbone": {"network": {"class_path": "A"}, "taps": {"x": "a"}, "tokens": "t", "padding": "reflect"}}
    other = {"backbone": {"network": {"class_path": "B"}, "taps": {"y": "b"}}}
    assert merged(one, other)["backbone"] == {
        "network": {"class_path": "B"},
        "taps": {"y": "b"},
        "padding": "reflect",
    }
    same = {"backbone": {"network": {"class_path": "A", "init_args": {"n": 1}}, "taps": {"y": "b"}}}
    assert merged(one, same)["backbone"]["taps"] == {"x": "a", "y": "b"}


# --- options ----------------------------------------------------------------------------------------------------------


def options(*pairs: tuple[str, str], over: dict | None = None) -> dict:
    config = Config().add(over or {})
    for key, text in pairs:
        config.set(key, text)
    return config.values


def test_options_reach_into_classes_lists_and_names_with_dots():
    model = {"model": {"class_path": "A", "init_args": {"objective": "MoCo", "hidden": 1}}}
    values = options(("model.hidden", "2"), ("model.init_args.objective.queue", "64"), over=model)
    assert values["model"]["init_args"] == {
        "hidden": "2",
        "objective": {"class_path": "MoCo", "init_args": {"queue": "64"}},
    }
    assert options(("model", "B"), over=model) == {"model": {"class_path": "B"}}
    assert options(("model.class_path", "B"), over=model) == {"model": {"class_path": "B"}}
    two = options(("trainer.callbacks", "A"), ("trainer.callbacks+", "B"), ("trainer.callbacks.monitor", "x"))
    assert two["trainer"]["callbacks"] == ["A", {"class_path": "B", "init_args": {"monitor": "x"}}]
    taps = {"backbone": {"taps": {"encoder.0": "a"}}}
    assert options(("backbone.taps.encoder.0", "b"), over=taps) == {"backbone": {"taps": {"encoder.0": "b"}}}
    table = {"classes": {"cortex": [1]}}
    assert options(("classes", "{lesion: [2]}"), over=table) == {"classes": {"lesion": [2]}}
    assert options(("classes.lesion", "[2]"), over=table) == {"classes": {"cortex": [1], "lesion": [2]}}
    assert options(("a", "null"), ("b", "[1, 2]"), ("c", "{d: 1}")) == {"a": None, "b": [1, 2], "c": {"d": 1}}


def test_the_command_line_is_read_as_it_stands():
    read = read_arguments(["--a.b=1", "--config", "x", "--data", "d", "--c", "-1", "-c=y", "--print_config=sources"])
    assert (read.files, read.data, read.options, read.show) == (
        ["x", "y"],
        "d",
        [("a.b", "1"), ("c", "-1")],
        "sources",
    )
    for args, words in (
        (["--a"], "--a needs a value"),
        (["--a", "--b=1"], "--a needs a value"),
        (["a"], "'a' stands alone"),
        (["--print_config=all"], "--print_config=all is unknown"),
    ):
        with pytest.raises(InputError, match=words):
            read_arguments(args)


# --- files ------------------------------------------------------------------------------------------------------------


def test_bases_come_first_at_any_depth_and_relative_to_their_file(tmp_path):
    write(tmp_path / "deep" / "one.yaml", "a: 1\nb: 1\nc: 1\n")
    write(tmp_path / "deep" / "two.yaml", "base: one.yaml\nb: 2\nc: 2\n")
    top = write(tmp_path / "top.yaml", "base: [deep/two, network/unet]\nc: 3\n")
    values = compose([top]).values
    assert (values["a"], values["b"], values["c"]) == (1, 2, 3)
    assert values["backbone"]["network"]["class_path"] == "lssl.networks.backbone.unet"  # shipped
    assert "base" not in values


def test_a_circle_and_a_missing_base_are_one_sentence(tmp_path):
    one = write(tmp_path / "one.yaml", "base: two.yaml\n")
    write(tmp_path / "two.yaml", "base: one.yaml\n")
    with pytest.raises(InputError, match=r"leads back to itself: .*one\.yaml → .*two\.yaml → .*one\.yaml"):
        load(one)
    three = write(tmp_path / "three.yaml", "base: [demoo]\n")
    with pytest.raises(InputError, match=r"three\.yaml names a base that does not exist.*did you mean 'demo'"):
        load(three)
    with pytest.raises(InputError, match="is a file or a list of files"):
        load(write(tmp_path / "four.yaml", "base: {a: 1}\n"))


def test_names_find_files_here_and_shipped_ones_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "configs/demo.yaml", "benchmark/demo", "network/unet_tiny"):
        assert find_config(name).is_file()
    write(tmp_path / "demo.yaml", "a: 1\n")
    assert find_config("demo").resolve() == tmp_path / "demo.yaml"


# --- references -------------------------------------------------------------------------------------------------------


def test_references_reach_across_files_and_options(tmp_path):
    one = write(tmp_path / "one.yaml", "views: {size: 48}\nx: ${y.z}\n")
    two = write(tmp_path / "two.yaml", "y:\n  z: ${views.size}\nbox: ${times:${views.size},1.3}\n")
    assert resolved(compose([one, two]).values)["x"] == 48
    assert resolved(compose([two, one]).values)["box"] == 64  # 62.4, a multiple of 8
    assert resolved(compose([one, two], options=[("views.size", "[32,40,96]")]).values)["box"] == [48, 56, 128]
    with pytest.raises(InputError, match=r"reference in the config has no value.*views"):
        resolved(compose([two]).values)


def test_what_comes_from_the_environment_is_known(monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    values = {
        "a": "${oc.env:SECRET}",
        "b": "${a}!",
        "c": "${d}",
        "d": 1,
        "e": ["${b}"],
        "f": "hunter2",
        "g": "${times:${oc.decode:${oc.env:SIZE,8}},1}",
    }
    hidden = from_environment(values)
    assert {("a",), ("b",), ("e", "0")} <= hidden.keys()
    assert not {("d",), ("f",)} & hidden.keys()
    assert hidden["b",] == "${a}!"
    assert resolved(values)["b"] == "hunter2!"  # and the environment is read again


def test_a_secret_reaches_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LSSL_TEST_SECRET", "hunter2-hunter2")
    own = write(
        tmp_path / "own.yaml",
        "trainer: {logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: runs, name: '', "
        "version: '', prefix: '${oc.env:LSSL_TEST_SECRET}'}}}\n",
    )
    run = fit(tmp_path, "demo.yaml", own, options=["--trainer.callbacks=null"], backbone=TINY_NET)
    assert "hunter2" in (run / "metrics.csv").read_text()  # it was used
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["trainer"]["logger"]["init_args"]["prefix"] == "${oc.env:LSSL_TEST_SECRET}"
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)
    log = checkpoint.pop("exact_resume")  # holds the text of metrics.csv, whose columns have the prefix
    assert "hunter2" in repr(log)
    assert "hunter2" not in repr(checkpoint)
    for path in run.rglob("*"):
        if path.is_file() and path.name != "metrics.csv" and path.suffix != ".ckpt":
            assert b"hunter2" not in path.read_bytes(), path
    monkeypatch.setenv("LSSL_TEST_SECRET", "other")
    assert complete([str(run / "config.yaml")]).values["trainer"]["logger"]["init_args"]["prefix"].startswith("${")


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


def parsed(capsys, *args: str) -> dict:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args, "--print_config"])
    assert not stop.value.code
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("recipe", RECIPES)
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


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_network_comes_with_its_checkpoint(tmp_path, capsys):
    run = fit(tmp_path, "demo.yaml", options=["--trainer.callbacks=null", "--trainer.max_steps=1"])
    path = str(run / "checkpoints" / "last.ckpt")
    start = ["--config", "finetune", "--model.init_args.pretrained", path, "--data", "PhantomDataModule"]
    config, demo = parsed(capsys, *start), parsed(capsys, "--config", "demo")
    assert config["backbone"] == demo["backbone"]  # network, taps, padding, channels
    assert config["views"]["size"] == 32
    assert config["views"]["spacing"] == [5.0, 5.0, 5.0]
    assert config["data"]["init_args"]["source_size"] == 48
    assert (config["data"]["init_args"]["few_shot"]["subjects"], config["data"]["init_args"]["few_shot"]["visits"]) == (
        None,
        None,
    )
    assert parsed(capsys, *start, "--backbone.padding", "zeros")["backbone"] == {**demo["backbone"], "padding": "zeros"}
    own = parsed(capsys, *start, "--config", "network/segresnet")["backbone"]
    assert own["network"]["class_path"].endswith("SegResNet")
    assert own["padding"] == "zeros"  # a network that is named is taken as it is named
    last = ["--data.init_args.split=[0.5,0.25,0.25]", "--trainer.max_steps=1", "--data.init_args.num_workers=0"]
    last += ["--data.init_args.subjects=4", "--data.init_args.size=40", "--data.init_args.spacing=5"]
    main(["fit", *start, *last, f"--trainer.default_root_dir={tmp_path / 'tuned'}", "--trainer.accelerator=cpu"])
    assert (tmp_path / "tuned" / "checkpoints" / "last.ckpt").is_file()
    assert (tmp_path / "tuned" / "checkpoints" / "best.ckpt").is_file()  # a run shorter than an epoch is validated, too
    words = sentence(capsys, "fit", *start, "--config", str(run / "config.yaml"))
    assert "replaces the model Segmenter of an earlier --config by LongitudinalLocal" in words
    assert "give one of the two; to fine-tune a run's network, give --config finetune" in words
    words = sentence(capsys, "fit", "--config", str(run / "config.yaml"), "--model.init_args.pretrained", path)
    assert "LongitudinalLocal pretrains and has no option 'pretrained', which the Segmenter has" in words
    words = sentence(capsys, "fit", "--config", str(run / "config.yaml"), "--model.init_args.target=diagnosis")
    assert "which the Classifier has; to fine-tune, give --config classifier instead" in words
    words = sentence(
        capsys, "fit", "--config", str(run / "config.yaml"), "--config=regressor", "--data.init_args.targets={a: b}"
    )
    assert "give one of the two; to fine-tune a run's network, give --config regressor" in words
    start[3] = str(run)
    assert f"there is no checkpoint {run}; give {run / 'checkpoints' / 'best.ckpt'}" in sentence(capsys, "fit", *start)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_each_value_says_where_it_is_from(capsys, tmp_path, prepared):
    own = write(tmp_path / "own.yaml", "base: demo\nmodel: {init_args: {hidden: 64}}\n")
    args = ["--config", own, "--data", str(prepared), "--views.size", "48", "--print_config=sources"]
    with pytest.raises(SystemExit):
        main(["fit", *args])
    lines = dict(line.partition(": ")[::2] for line in capsys.readouterr().out.splitlines())
    assert lines["model.init_args.hidden"] == f"64  # {own}"
    assert lines["model.init_args.samples"] == "256  # configs/demo.yaml"
    assert lines["backbone.taps.bottleneck"] == "down_4.convs.conv_1  # configs/network/unet_tiny.yaml"
    assert lines["views.size"] == "48  # --views.size"
    assert lines["data.init_args.root"] == f"{prepared}  # --data"
    assert lines["trainer.max_epochs"] == "null  # default"


# --- predicting -------------------------------------------------------------------------------------------------------


def test_prediction_needs_no_labels(tmp_path, bids):
    """A folder without labels, to which the pattern of the training's labels does not apply."""
    for image in bids.rglob("*_T1w.nii.gz"):
        of = nib.load(image)
        label = (np.asarray(of.dataobj) > 50).astype(np.int16)
        nib.save(nib.Nifti1Image(label, of.affine), image.with_name(image.name.replace("T1w", "dseg")))
    labelled = [
        "--data.init_args.labels={subject}/{session}/anat/*_dseg.nii.gz",
        "--data.init_args.split=[0.6,0.2,0.2]",
    ]
    small = ["--trainer.max_steps=1", "--data.init_args.few_shot.steps=1", "--data.init_args.num_workers=0"]
    group = tiny(tmp_path, backbone=TINY_NET)
    content = yaml.safe_load(Path(group[1]).read_text())
    content.pop("data")
    Path(group[1]).write_text(yaml.safe_dump(content))
    main(["fit", "--config", "finetune", *group, "--data", str(bids), *labelled, *small])
    run = tmp_path / "run"
    other = tmp_path / "other" / "sub-09" / "ses-1" / "anat"
    other.mkdir(parents=True)
    os.link(next(bids.rglob("*_T1w.nii.gz")), other / "sub-09_ses-1_T1w.nii.gz")
    config = ["--config", str(run / "config.yaml"), "--ckpt_path", "last"]
    main(["predict", *config, "--data", str(tmp_path / "other")])
    volumes = pd.read_csv(next(run.rglob("volumes.csv")))
    assert set(volumes["subject"]) == {"sub-09"}


# --- how little is written twice --------------------------------------------------------------------------------------


def shared_lines(paths: list[Path], run: int = 4) -> float:
    """Share of the lines that stand in a run of four lines which stands elsewhere, too; comments and blanks aside."""
    files = [
        [line for line in path.read_text().splitlines() if line.strip() and line.strip()[0] != "#"] for path in paths
    ]
    seen: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for number, lines in enumerate(files):
        for start in range(len(lines) - run + 1):
            window = tuple(line.partition(" #")[0].strip() for line in lines[start : start + run])
            seen.setdefault(window, []).append((number, start))
    twice = {(n, s + i) for places in seen.values() if len(places) > 1 for n, s in places for i in range(run)}
    return len(twice) / sum(map(len, files))


def test_little_is_written_twice():
    assert shared_lines(sorted(CONFIGS.rglob("*.yaml"))) < 0.10


def test_two_contrasts_are_learned_and_predicted_on_the_grid_of_the_first(tmp_path, bids, capsys):
    """The FLAIR has voxels of twice the size and its own origin; a visit without it is left out and named."""
    for image in bids.rglob("*_T1w.nii.gz"):
        of = nib.load(image)
        label = (np.asarray(of.dataobj) > 50).astype(np.int16)
        nib.save(nib.Nifti1Image(label, of.affine), image.with_name(image.name.replace("T1w", "dseg")))
        coarse = nib.Nifti1Image(np.asarray(of.dataobj)[::2, ::2, ::2], of.affine @ np.diag([2.0, 2.0, 2.0, 1.0]))
        nib.save(coarse, image.with_name(image.name.replace("T1w", "FLAIR")))
    (bids / "sub-05/ses-M012/anat/sub-05_ses-M012_FLAIR.nii.gz").unlink()
    net = {**TINY_NET, "network": {**TINY_NET["network"], "init_args": {**TINY_NET["network"]["init_args"]}}}
    net["network"]["init_args"]["in_channels"] = net["in_channels"] = 2
    group = tiny(tmp_path, backbone=net)
    content = yaml.safe_load(Path(group[1]).read_text())
    content.pop("data")
    Path(group[1]).write_text(yaml.safe_dump(content))
    suffixes = "--data.init_args.suffix=[T1w,FLAIR]"
    data = ["--data", str(bids), suffixes, "--data.init_args.labels={subject}/{session}/anat/*_dseg.nii.gz"]
    small = ["--trainer.max_steps=1", "--data.init_args.few_shot.steps=1", "--data.init_args.num_workers=0"]
    main(["fit", "--config", "finetune", *group, *data, "--data.init_args.split=[0.6,0.2,0.2]", *small])
    run = tmp_path / "run"
    config = ["--config", str(run / "config.yaml"), "--ckpt_path", "last"]
    main(["predict", *config, "--data", str(bids), suffixes])
    written = sorted(run.rglob("*_dseg.nii.gz"))
    assert len(written) == 9
    first = nib.load(written[0])
    source = nib.load(bids / "sub-01/ses-M000/anat/sub-01_ses-M000_T1w.nii.gz")
    assert first.shape == source.shape
    np.testing.assert_array_equal(first.affine, source.affine)
    with pytest.raises(SystemExit):
        main(["predict", *config, "--data", str(bids), "--data.init_args.suffix=T1w"])
    assert "The data have 1 channel (T1w) and the network takes 2" in capsys.readouterr().err
