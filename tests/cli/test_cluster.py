"""The recipes for several processes: configs/cluster/torchrun.yaml and slurm.yaml."""

import os
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT, TINY_NET, tiny

from lssl.cli.compose import compose
from lssl.cli.references import resolved
from lssl.runs.outputs import read_cost


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("cluster/torchrun.yaml", ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")),
        ("cluster/slurm.yaml", ("SLURM_NTASKS_PER_NODE", "SLURM_JOB_NUM_NODES")),
    ],
)
def test_processes_and_nodes_are_those_of_the_launcher(recipe, names, monkeypatch):
    for name in names:
        monkeypatch.delenv(name, raising=False)
    config = compose(["longitudinal_infonce", recipe])
    assert [resolved(config.values)["trainer"][key] for key in ("devices", "num_nodes")] == [1, 1]
    for name, value in zip(names, "43", strict=True):
        monkeypatch.setenv(name, value)
    trainer = resolved(config.values)["trainer"]
    assert (trainer["devices"], trainer["num_nodes"]) == (4, 3)
    assert trainer["strategy"]["class_path"].endswith("DDPStrategy")


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_two_processes_train_together(nodes, tmp_path):
    """Two processes of one node, or of two: then each node has a launcher, and they meet at an address."""
    demo = ["--config", str(ROOT / "configs/demo.yaml"), *tiny(tmp_path, backbone=TINY_NET)]
    rest = ["--config", "cluster/torchrun", "--data.init_args.batch_size=1", "--monitor.every=0"]
    train = ["-m", "lssl", "fit", *demo, *rest, "--trainer.callbacks=null", "--trainer.limit_val_batches=0"]
    port = str(20000 + os.getpid() % 20000)
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={2 // nodes}"]
    meet = ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", f"--nnodes={nodes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env}
    launched = [subprocess.Popen([*launch, *meet, *train], **output) for _ in range(nodes)]
    said = [process.communicate(timeout=600)[0] for process in launched]
    assert [process.returncode for process in launched] == [0] * nodes, said
    told = "2 processes × 1 pair = 2 pairs a step. The learning rate stays"
    assert sum(text.count(told) for text in said) == 1
    cost = read_cost(tmp_path / "run")
    assert cost is not None
    assert cost.processes == 2
    strategy = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["trainer"]["strategy"]
    assert strategy["init_args"]["static_graph"]
