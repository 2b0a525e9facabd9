"""What loggers hold after a run: W&B offline for real, read back from its file; TensorBoard's pictures."""

from __future__ import annotations

import json
import socket
import struct
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import TINY_NET, fit
from lightning.pytorch.loggers import TensorBoardLogger

from lssl.resume.rows import forget_later_events
from lssl.runs import loggers
from lssl.runs.loggers import RunWandb


def records(path: Path) -> list[Any]:
    """Records of a W&B file: LevelDB's log format, blocks of 32 KiB after a header of 7 bytes."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, place, whole, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = pb.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Four steps, logged offline, and two more after a restart."""
    folder = tmp_path_factory.mktemp("wandb")
    logger = ["offline=true", "artifact=true", "project=heads"]
    options = [f"--trainer.logger.init_args.{option}" for option in logger]
    options += ["--monitor.every=4", "--trainer.callbacks=lssl.callbacks.Pictures"]
    first = [*options, "--trainer.max_steps=4"]
    done = fit(folder, "demo.yaml", "logger/wandb.yaml", options=first, backbone=TINY_NET)
    again = [*options, "--trainer.max_steps=6", "--ckpt_path=last"]
    assert fit(folder, "demo.yaml", "logger/wandb.yaml", options=again, backbone=TINY_NET) == done
    return done


def test_wandb_holds_terms_monitors_pictures_config_group_and_checkpoint(run):
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    written = records(files[0])
    started = next(record.run for record in written if record.WhichOneof("record_type") == "run")
    assert (started.project, started.run_group, started.display_name) == ("heads", "run", "run")
    logged, steps = set(), []
    for record in written:
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            logged |= row.keys()
            steps += [row["trainer/global_step"]] if any(name.startswith("monitor/") for name in row) else []
    assert {"train/similarity", "val/loss", "monitor/feature_std/decoder.0"} <= logged
    assert steps == [0, 1, 2, 4]
    assert list(files[0].parent.glob("files/media/images/pictures/views_*.png"))
    config = {
        update.key: json.loads(update.value_json)
        for record in written
        if record.WhichOneof("record_type") == "config"
        for update in record.config.update
    }
    assert config["model"]["class_path"].endswith("LongitudinalLocal")
    assert config["views"]["size"] == 32
    assert config["seed_everything"] == 0
    artifacts = [record.artifact for record in written if record.WhichOneof("record_type") == "artifact"]
    stored = [entry.path for artifact in artifacts if artifact.type == "model" for entry in artifact.manifest.contents]
    assert stored == ["model.ckpt"] * 2  # best and last


def test_wandb_continues_the_same_run_after_a_restart(run):
    ids = [
        record.run.run_id
        for path in sorted(run.glob("wandb/offline-run-*/*.wandb"))
        for record in records(path)
        if record.WhichOneof("record_type") == "run"
    ]
    assert len(ids) >= 2
    assert set(ids) == {(run / "wandb_id.txt").read_text().strip()}


def test_repetitions_join_one_group(tmp_path):
    for name, group in (("demo", "demo"), ("demo-2", "demo"), ("demo-12", "demo"), ("demo-b", "demo-b")):
        assert RunWandb(str(tmp_path / name))._wandb_init["group"] == group
    named = RunWandb(str(tmp_path / "fold-3"), group="five folds")
    assert (named._wandb_init["group"], named._wandb_init["name"]) == ("five folds", "fold-3")


@pytest.mark.slow
def test_tensorboard_holds_pictures_and_monitors(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ["--trainer.logger=TensorBoardLogger", "--trainer.callbacks=lssl.callbacks.Pictures", "--monitor.every=4"]
    run = fit(tmp_path, "demo.yaml", options=options, backbone=TINY_NET)
    events = EventAccumulator(str(run), size_guidance={"images": 0})
    events.Reload()
    assert {"pictures/views", "pictures/features", "pictures/similarity"} <= set(events.Tags()["images"])
    assert [event.step for event in events.Scalars("monitor/rank/decoder.0")] == [0, 1, 2]


def test_tensorboard_forgets_what_a_killed_run_logged_after_its_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for values, checkpoint in ((range(9), None), (range(4, 12), 3)):
        logger = TensorBoardLogger(tmp_path, name="", version="")
        if checkpoint is not None:
            forget_later_events(SimpleNamespace(loggers=[logger], is_global_zero=True), checkpoint)
        for step in values:
            logger.log_metrics({"loss": 0.0}, step=step)
        logger.finalize("success")
        time.sleep(1.1)  # files are named by the second
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(12))


@pytest.mark.parametrize("mode", [None, "disabled"])
def test_wandb_without_a_network_goes_on_offline_and_says_so(tmp_path, monkeypatch, mode):
    """A port that nothing listens at; with a mode of the user's nothing is tried."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
        assert loggers._unreachable() == ""
        return
    with pytest.warns(UserWarning, match=r"127.0.0.1 cannot be reached .* logged offline; `wandb sync`"):
        logger = RunWandb(save_dir=str(tmp_path))
    assert logger._wandb_init["mode"] == "offline"
