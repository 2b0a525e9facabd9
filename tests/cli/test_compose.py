"""The one rule of composition: what wins over what, options, files and references, and where a value is from."""

# ruff: noqa: F811

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from composing import CONFIGS, prepared, write  # noqa: F401

from lssl.cli.arguments import read_arguments
from lssl.cli.complete import complete
from lssl.cli.compose import Config, compose, find_config, load, merged
from lssl.cli.main import main
from lssl.cli.references import from_environment, resolved
from lssl.utils.errors import InputError

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


@pytest.mark.parametrize("network", ["unet_tiny", "segresnet", "dynunet", "swin_unetr", "unetr"])
def test_the_network_takes_as_many_channels_as_the_backbone_says(network: str):
    values = complete(["longitudinal_infonce", f"network/{network}"], options=[("backbone.in_channels", "3")]).values
    assert str(values["backbone"]["network"]["init_args"]["in_channels"]) == "3"


def test_the_networks_own_number_of_channels_holds_if_the_backbone_has_none():
    own = ("backbone.network.init_args.in_channels", "2")
    files = ["longitudinal_infonce", "network/unet_tiny"]
    assert complete(files, options=[own]).values["backbone"]["in_channels"] == "2"
    with pytest.raises(InputError, match=r"in_channels is 3 and backbone\.network\.init_args\.in_channels 2"):
        complete(files, options=[own, ("backbone.in_channels", "3")])


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


@pytest.mark.parametrize(
    ("cuda", "options", "wanted"),
    [
        (False, {}, "32-true"),  # where bfloat16 may take a hundred times as long
        (True, {}, "bf16-mixed"),
        (True, {"trainer.accelerator": "cpu"}, "32-true"),
        (True, {"trainer.accelerator": "gpu"}, "bf16-mixed"),
        (False, {"trainer.precision": "bf16-mixed"}, "bf16-mixed"),
    ],
)
def test_recipes_take_bfloat16_on_gpus_alone(cuda, options, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    for recipe in ("longitudinal_infonce", "masked_autoencoder"):
        values = resolved(compose([recipe], "PhantomDataModule", [*options.items()]).values)
        assert values["trainer"]["precision"] == wanted


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
