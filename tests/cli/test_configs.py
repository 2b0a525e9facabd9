"""Every shipped YAML runs, through the same door a user takes, with a tiny override."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, TINY_NET, fit, resolved
from jsonargparse import ArgumentParser

from lssl.benchmark.plan import read_plan
from lssl.checkpoint import load_task
from lssl.cli.compose import compose, load
from lssl.correspondence.matchers import EmbeddingMatcher, Matcher, full_view
from lssl.datamodules.phantom import PhantomDataModule

SLOW = pytest.mark.slow
LAYER = ["--model.init_args.norm=layer"]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param("demo.yaml", marks=SLOW),
        pytest.param("longitudinal_infonce.yaml", marks=SLOW),
        "longitudinal_local.yaml",
        "label_contrast.yaml",
        pytest.param("paper/longitudinal_local.yaml", marks=SLOW),
    ],
)
def test_methods(config, tmp_path):
    heads = ["--model.init_args.hidden=16", "--model.init_args.projection=16"]
    run = fit(tmp_path, config, options=[*heads, "--model.init_args.samples=16"], backbone=TINY_NET)
    assert (run / "config.yaml").is_file()
    assert (run / "metrics.csv").read_text().count("\n") >= 2
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


@pytest.mark.parametrize(
    "objective", ["MoCo", *(pytest.param(name, marks=SLOW) for name in ("SimCLR", "BYOL", "VICReg"))]
)
def test_global_contrastive_changes_its_objective_in_one_line(objective, tmp_path):
    run = fit(
        tmp_path,
        "global_contrastive.yaml",
        options=[f"--model.init_args.objective={objective}", "--data.init_args.batch_size=4"],
        backbone=TINY_NET,
    )
    chosen = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["objective"]
    assert chosen["class_path"] == f"lssl.strategies.global_contrastive.{objective}"
    assert set(chosen["init_args"].values()) <= {
        None,
        0.2,
        2048,
        0.999,
        3,
        "batch",
    }  # none inherited from another class
    assert "val/similarity" in (run / "metrics.csv").read_text()


@pytest.mark.parametrize("network", [None, pytest.param("swin_unetr", marks=SLOW), pytest.param("unetr", marks=SLOW)])
def test_anatomical_invariance_on_every_kind_of_network(network, tmp_path):
    options = [
        "--model.init_args.hidden=16",
        "--model.init_args.objective.init_args.prototypes=8",
        "--data.init_args.batch_size=2",
    ]
    options += ["--model.init_args.block=8", "--trainer.max_steps=1", "--model.init_args.encoder=bottleneck"]
    configs, groups = ["anatomical_invariance.yaml"], {"backbone": TINY_NET}
    if network == "swin_unetr":
        configs.append("network/swin_unetr.yaml")
        small = {"depths": [1, 1, 1, 1], "feature_size": 12}
        groups = {"backbone": {"network": {"init_args": small}}, "views": {"size": 64}}
    elif network == "unetr":
        configs.append("network/unetr.yaml")
        small = {"img_size": 32, "feature_size": 4, "hidden_size": 24, "mlp_dim": 24, "num_heads": 2}
        groups = {"backbone": {"network": {"init_args": small}}}
        options[3] = "--model.init_args.block=16"
    if network == "swin_unetr":
        options += ["--data.init_args.size=72", "--data.init_args.subjects=3", "--data.init_args.split=[0.7,0.3,0.0]"]
    run = fit(tmp_path, *configs, options=options, **groups)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    assert ("masking.token" in state) == (network is not None)
    log = (run / "metrics.csv").read_text()
    assert all(name in log for name in ("train/inter", "train/intra", "train/match/same_visit", "val/match/score"))


@pytest.mark.smoke
def test_masked_autoencoder(tmp_path):
    run = fit(tmp_path, "masked_autoencoder.yaml", options=["--model.init_args.block=8"], backbone=TINY_NET)
    log = (run / "metrics.csv").read_text()
    assert all(name in log for name in ("train/reconstruction", "train/explained", "val/explained"))


@pytest.mark.parametrize(
    ("config", "options"),
    [
        pytest.param("temporal_order.yaml", [], marks=SLOW),  # tests/prediction goes on from a run of it
        pytest.param("latent_direction.yaml", [], marks=SLOW),
        ("neighbourhood_embedding.yaml", []),
        ("trajectory_order.yaml", ["--data.init_args.visits=3", "--data.init_args.split=[0.75,0.25,0]", *LAYER]),
        ("trajectory_prediction.yaml", LAYER),
        pytest.param("siamese_masked_autoencoder.yaml", [], marks=SLOW),
    ],
)
def test_methods_of_time(config, options, tmp_path):
    run = fit(tmp_path, config, options=["--data.init_args.batch_size=2", *options], backbone=TINY_NET)
    log = (run / "metrics.csv").read_text()
    assert "train/skipped" in log
    assert all(f"val/{term}" in log for term in load_task(run / "checkpoints" / "last.ckpt").LOSS_WEIGHTS)


def test_the_frame_pairs_no_subjects_that_share_none(tmp_path, bids, capsys):
    options = ["--model.init_args.hidden=16", "--model.init_args.block=8", "--data.init_args.source_size=null"]
    data = {"class_path": "NiftiDataModule", "init_args": {"root": str(bids)}}
    config = "anatomical_invariance.yaml"
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, config, options=options, backbone=TINY_NET, data=data)
    assert stop.value.code == 2
    assert "share no frame" in capsys.readouterr().err
    run = fit(tmp_path, config, options=[*options, "--data.init_args.common_frame=true"], backbone=TINY_NET, data=data)
    assert (run / "checkpoints" / "last.ckpt").is_file()


def test_anatomical_embedding_ends_with_its_landmarks_and_plugs_into_the_matcher(tmp_path, capsys):
    options = [
        "--model.init_args.fine.tap=decoder.1",
        "--model.init_args.coarse.tap=bottleneck",
        "--data.init_args.batch_size=2",
    ]
    options += ["--data.init_args.split=[0.5,0.5,0.0]", "--model.init_args.fine.anchors=8"]
    run = fit(tmp_path, "anatomical_embedding.yaml", options=options, backbone=TINY_NET)
    assert "Landmarks found again" in capsys.readouterr().out
    errors = json.loads((run / "landmarks.json").read_text())
    assert errors.keys() == {"untrained", "trained"}
    assert all(math.isfinite(value) for value in errors["trained"].values())
    assert errors["trained"]["subjects/frame"] == errors["untrained"]["subjects/frame"] > 0

    path = run / "checkpoints" / "last.ckpt"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Matcher, "matcher")
    config = {"class_path": "lssl.correspondence.matchers.EmbeddingMatcher", "init_args": {"embedding": str(path)}}
    assert isinstance(parser.instantiate(parser.parse_object({"matcher": config})).matcher, EmbeddingMatcher)
    strategy = load_task(path)
    assert type(strategy).__name__ == "AnatomicalEmbedding"
    weights = torch.load(path, weights_only=False)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in strategy.state_dict().items())
    data = PhantomDataModule(subjects=2, visits=2, size=40, spacing=5.0, batch_size=2, split=(1.0, 0.0, 0.0))
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    points = torch.zeros(2, 5, 3, dtype=torch.float64) + 10 * torch.arange(5)[:, None]
    one, other = (
        EmbeddingMatcher(e).match(points, full_view(batch, 0), full_view(batch, 1)) for e in (str(path), strategy)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("config", "objective"),
    [
        ("prior_guided_local_multiscale.yaml", "InfoNCE"),
        *(
            pytest.param(config, objective, marks=SLOW)
            for config in ("prior_guided_local.yaml", "prior_guided_local_multiscale.yaml")
            for objective in ("Cosine", "InfoNCE", "VICReg")
            if (config, objective) != ("prior_guided_local_multiscale.yaml", "InfoNCE")
        ),
    ],
)
def test_prior_guided_local_changes_its_objective_in_one_line(config, objective, tmp_path):
    options = [f"--model.init_args.objective={objective}", "--model.init_args.hidden=16", "--views.size=64"]
    options += ["--data.init_args.size=72", "--data.init_args.spacing=3", "--data.init_args.batch_size=2"]
    run = fit(tmp_path, config, options=options, backbone=TINY_NET)
    assert "train/skipped" in (run / "metrics.csv").read_text()


@pytest.mark.parametrize(
    ("backbone", "size", "smaller"),
    [
        pytest.param("segresnet.yaml", 32, {"init_filters": 8}, marks=SLOW),
        ("dynunet.yaml", 32, {"filters": [4, 4, 8, 8, 8]}),
        pytest.param("swin_unetr.yaml", 64, {"feature_size": 12}, marks=SLOW),
    ],
)
def test_backbones(backbone, size, smaller, tmp_path):
    options = [f"--backbone.network.init_args.{name}={value}" for name, value in smaller.items()]
    options += [f"--views.size={size}", f"--data.init_args.size={size}", "--trainer.max_steps=1"]
    run = fit(tmp_path, "longitudinal_infonce.yaml", f"network/{backbone}", options=options)
    assert (run / "checkpoints" / "last.ckpt").is_file()


@SLOW  # tests/runs/test_loggers.py reads what W&B and TensorBoard hold
@pytest.mark.parametrize("logger", ["csv", "tensorboard", "wandb"])
def test_loggers(logger, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = fit(tmp_path, "demo.yaml", f"logger/{logger}.yaml", options=["--trainer.callbacks=null"], backbone=TINY_NET)
    written = {"csv": "metrics.csv", "tensorboard": "events.out.tfevents.*", "wandb": "wandb/offline-run-*/*.wandb"}
    assert len(list(run.glob(written[logger]))) == 1


def test_logger_by_one_line(tmp_path):
    options = ["--trainer.callbacks=null", "--trainer.logger=TensorBoardLogger"]
    run = fit(tmp_path, "demo.yaml", options=options, backbone=TINY_NET)
    assert list(run.glob("events.out.tfevents.*"))


EARLY = '--trainer.callbacks={"class_path": "EarlyStopping", "init_args": {"monitor": "val/dice", "mode": "max"}}'


@pytest.mark.smoke
@SLOW
def test_finetuning_from_scratch_and_from_a_checkpoint_is_one_line(tmp_path):
    """tests/test_segmenter.py follows what comes of demo_finetune.yaml."""
    (tmp_path / "pretraining").mkdir()
    run = fit(tmp_path / "pretraining", "demo.yaml", options=["--trainer.callbacks=null", "--trainer.max_steps=1"])
    for pretrained in ("null", str(run / "checkpoints" / "last.ckpt")):
        options = [f"--model.init_args.pretrained={pretrained}", "--data.init_args.few_shot.steps=1"]
        options += ["--data.init_args.spacing=4.5", "--trainer.max_steps=1", EARLY]
        tuned = fit(tmp_path, "demo_finetune.yaml", options=options)
        assert "val/dice" in (tuned / "metrics.csv").read_text()


def test_every_config_is_run():
    """A new YAML must be named in a test above, among the plans in tests/benchmark, or as a base of one that is."""
    others = ("benchmark/test_benchmark_command.py", "cli/test_cluster.py", "prediction/test_prediction.py")
    others += ("lesions/test_change_segmenter_runs.py", "segmentation/test_context.py", "cli/test_data_configs.py")
    text = Path(__file__).read_text() + "".join((Path(__file__).parents[1] / path).read_text() for path in others)
    names = {f"configs/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.yaml")}
    named = {name for name in names if (Path(name).stem if "/logger/" in name else Path(name).name) in text}
    run = {path for name in named for path, _ in load(name)}
    assert names == run, f"run by no test: {sorted(names - run)}"


def test_paper_preset_is_the_published_recipe(capsys):
    config = yaml.safe_load(resolved(capsys, "--config", str(ROOT / "configs/paper/longitudinal_local.yaml")))
    assert config["views"]["geometry"] == config["views"]["intensity"] == "shared"
    assert config["backbone"]["padding"] == "reflect"
    model = config["model"]["init_args"]
    assert model["objective"]["init_args"]["predictor_hidden"] == 512
    assert (model["hidden"], model["projection"], model["samples"]) == (2048, 2048, 128)
    assert model["loss_weights"] == {
        "similarity": 1.0,
        "variance": 1e-3,
        "covariance": 1e-3,
        "orthogonality": 100.0,
        "reconstruction": 10.0,
    }
    assert model["optimizer"]["class_path"] == "torch.optim.Adam"
    assert model["optimizer"]["init_args"]["betas"] == [0.5, 0.999]


@SLOW  # a resumed run that equals a whole one shows it, too: test_cli.py
def test_two_runs_with_one_seed_agree_to_the_bit(tmp_path):
    losses = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run = fit(tmp_path / name, "demo.yaml", options=["--trainer.callbacks=null"], backbone=TINY_NET)
        losses.append((run / "metrics.csv").read_text())
        weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
        losses.append({key: value.clone() for key, value in weights.items()})
    assert losses[0] == losses[2]
    assert all(torch.equal(value, losses[3][key]) for key, value in losses[1].items())


def test_recipes_are_named_for_what_they_are():
    """Published terms on shifted views; dense InfoNCE with three terms off; the paper's own; and a row for each."""
    from lssl.strategies.longitudinal_local import LongitudinalLocal

    published = dict(LongitudinalLocal.LOSS_WEIGHTS)
    local, infonce, paper = (
        compose([name]).values for name in ("longitudinal_local", "longitudinal_infonce", "paper/longitudinal_local")
    )
    for config, geometry in ((local, "independent"), (paper, "shared")):
        options = config["model"]["init_args"]
        assert options["loss_weights"] == published
        assert options["objective"]["class_path"] == "Cosine"
        assert config["views"]["geometry"] == geometry
    options = infonce["model"]["init_args"]
    assert options["objective"] == "InfoNCE"
    assert [term for term, weight in options["loss_weights"].items() if weight] == ["similarity", "reconstruction"]
    rows = {"longitudinal_local", "longitudinal_infonce"}
    for plan, more in (("demo", set()), ("brains", {"paper_longitudinal_local"})):
        assert rows | more <= set(read_plan(ROOT / "configs" / "benchmark" / f"{plan}.yaml").parts)
