"""A plan whose cells are run by a program of no weight, in the place of `lssl`."""

import contextlib
import sys
from pathlib import Path

import yaml

from lssl.benchmark.output_folder import mark_done, reset
from lssl.runs.outputs import RunCost

PLAN = {
    "seeds": [0, 1, 2],
    "labelled": [1],
    "data": {"class_path": "PhantomDataModule", "init_args": {"subjects": 10, "split": [0.4, 0.2, 0.4]}},
    "backbone": {"channels_last": True},
    "views": {"size": 32},
    "pretrain": {"trainer": {"max_steps": 5}},
    "finetune": {
        "learning_rates": [0.001, 0.01],
        "budgets": {"short": {"trainer": {"max_steps": 3}}, "long": {"trainer": {"max_steps": 9}}},
        "model": {"class_path": "lssl.Segmenter"},
    },
    "strategies": {
        "good": {"model": {"class_path": "LongitudinalLocal"}},
        "bad": {"model": {"class_path": "GlobalContrastive"}, "part": "encoder"},
    },
}

# Writes what `lssl fit` and `lssl test` write. Dice of a subject: its own level, plus 0.1 of `good` and -0.1 of `bad`,
# plus noise that scratch shares. Validation prefers the rate 0.001 but for `bad`; the test prefers 0.01 throughout.
# The scores of other tasks are alike, but that of Regressor and Classifier a lower one is better.
FAKE = """
import json, os, sys, time
from pathlib import Path
import yaml

command, path = sys.argv[1], Path(sys.argv[sys.argv.index("--config") + 1])
config = yaml.safe_load(path.read_text())
run = Path(config["trainer"]["default_root_dir"])
print(command, "threads", os.environ["OMP_NUM_THREADS"])
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(f"{command} {run}\\n")
time.sleep(float(os.environ.get("FAKE_SLEEP", 0)))
with open(os.environ["FAKE_LOG"] + ".slept", "a") as log:
    log.write("slept\\n")
if os.environ.get("FAKE_FAIL", "no cell") in str(run):
    sys.exit("lssl: error: it was told to fail")
tuning = "pretrained" in config["model"].get("init_args", {})
score, figure, sign = {
    "Regressor": ("absolute_error", "val/mae", -1),
    "Classifier": ("brier", "val/brier", -1),
    "ChangeSegmenter": ("f1", "val/dice", 1),
}.get(config["model"]["class_path"].rpartition(".")[2], ("dice", "val/dice", 1))
if command == "fit":
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(path.read_text())
    loss = f"step,train/loss,{figure}\\n0,1.0,\\n1,0.5,\\n"
    if tuning:
        assert config["data"]["init_args"]["few_shot"]["steps"] == config["trainer"]["max_steps"]  # one epoch
        init = config["model"]["init_args"]
        if init["pretrained"]:
            assert Path(init["pretrained"]).is_file()
        rate = init["optimizer"]["init_args"]["lr"]
        loss += f"2,,{0.5 - sign * 0.1 * ((rate == 0.01) != ('/bad/' in str(run)))}\\n"
    else:
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / "last.ckpt").write_text("weights")
        figures = {"rank/a": 7.5, "retrieval/a": 0.8, "dice/a": 0.4}
        (run / "report.json").write_text(json.dumps({"trained": figures, "untrained": {"rank/a": 2.5}}))
    (run / "metrics.csv").write_text(loss)
    cost = dict.fromkeys(COST_FIELDS, 0.0)
    cost |= {"processes": 1, "parameters": 1234, "ms_per_step": 20.0, "flops_per_step": 10**9, "pairs_per_step": 4}
    cost |= {"steps": config["trainer"]["max_steps"], "memory": 0.5, "device_memory": 0.0}
    (run / "cost.json").write_text(json.dumps(cost))
else:
    seed, name = config["seed_everything"], str(run)
    rate = config["model"]["init_args"]["optimizer"]["init_args"]["lr"]
    better = 0.1 * ("/good/" in name) - 0.1 * ("/bad/" in name) + 0.05 * (rate == 0.01) + 0.2 * ("labelled-all" in name)
    (run / "test").mkdir()
    lines = ["subject,session,structure,metric,value,cluster"]
    for subject in range(4):
        for structure, level in (("cortex", 0.0), ("csf", 0.2)):
            own = 0.3 + level + 0.05 * subject + 0.02 * seed + 0.01 * ((seed * 7 + subject * 3) % 5) + sign * better
            if score == "f1" and subject == 3:  # nothing is new
                lines.append(f"{subject:03},v0/v1,{structure},false_lesions,2,")
                continue
            lines.append(f"{subject:03},v0,{structure},{score},{own:.6f},")
            if score == "dice":
                lines.append(f"{subject:03},v0/v1,{structure},stcs,0.7,")
    if score == "brier":  # of the whole cohort
        lines.append(f",,group,auc,{0.55 + better:.6f},")
    file = "segmentation.csv" if score == "dice" else "subject_scores.csv"
    (run / "test" / file).write_text("\\n".join(lines) + "\\n")
""".replace("COST_FIELDS", repr([*RunCost.__dataclass_fields__]))


def write_plan(folder: Path, **groups) -> Path:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({"out": str(folder / "out"), **PLAN, **groups}, sort_keys=False))
    return path


def fake(folder: Path, monkeypatch) -> list[str]:
    path = folder / "fake.py"
    path.write_text(FAKE)
    monkeypatch.setenv("FAKE_LOG", str(folder / "fake.log"))
    (folder / "fake.log").write_text("")
    return [sys.executable, str(path)]


def ran(folder: Path) -> list[str]:
    """The commands that the program was given since the last look."""
    log = folder / "fake.log"
    lines = log.read_text().splitlines()
    log.write_text("")
    return lines


def finish(plan, fingerprints, monkeypatch) -> None:
    """Finishes all cells within this process, each command in 36 seconds."""
    program = compile(FAKE, "fake", "exec")
    monkeypatch.setenv("FAKE_LOG", str(plan.path.parent / "fake.log"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for cell in plan.cells:
        reset(cell)
        for command in cell.commands():
            monkeypatch.setattr(sys, "argv", ["fake", *command])
            with contextlib.redirect_stdout(None):
                exec(program, {})
        mark_done(cell, fingerprints[cell.name], [36.0 for _ in cell.commands()])
