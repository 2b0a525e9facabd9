"""What Lightning and torch would say in a traceback is one sentence."""

import subprocess
import sys

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lssl.cli.failures import explained
from lssl.cli.settings import check_settings, of_a_library, other_weights, trainer_refusal
from lssl.utils.errors import InputError


@pytest.mark.parametrize("name", ["accumulate_grad_batches", "check_val_every_n_epoch", "num_nodes", "devices"])
@pytest.mark.parametrize("command", ["fit", "test"])
def test_counts_of_nothing(command, name):
    check_settings(command, {name: 1})
    with pytest.raises(InputError, match=rf"trainer\.{name}: give a number above 0, not 0"):
        check_settings(command, {name: 0})


def test_training_of_nothing_is_refused_where_there_is_training():
    for name, value in (("max_steps", 0), ("max_epochs", 0), ("limit_train_batches", 0.0)):
        check_settings("test", {name: value})
        with pytest.raises(InputError, match=f"trainer.{name} is 0"):
            check_settings("fit", {name: value})
    check_settings("fit", {"max_steps": -1, "max_epochs": None, "strategy": "ddp"}, None)
    with pytest.raises(InputError, match="max_lost"):
        check_settings("fit", {}, -3)


def failed(function):
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("it did not fail")


def test_weights_of_another_network_and_optimizers_of_other_parts():
    one, other = nn.Linear(2, 3), nn.Linear(2, 4)
    error = failed(lambda: one.load_state_dict(other.state_dict()))
    assert "size mismatch for weight" in str(other_weights(error))
    with pytest.raises(InputError, match=r"another network or task .*--config RUN/config\.yaml"), explained([]):
        raise error
    both = torch.optim.Adam([{"params": one.parameters()}, {"params": other.parameters()}])
    error = failed(lambda: torch.optim.Adam(one.parameters()).load_state_dict(both.state_dict()))
    with pytest.raises(InputError, match="its optimizer trained other parts"), explained([]):
        raise error
    assert other_weights(RuntimeError("shapes do not match")) is None


def test_what_a_library_refuses_is_told_and_our_own_bugs_are_not_hidden():
    assert str(of_a_library(failed(lambda: torch.optim.SGD([torch.ones(1)], lr=-1)))).startswith("optimizer: Invalid")
    assert of_a_library(failed(lambda: int("x"))) is None
    with pytest.raises(ValueError, match="invalid literal") as raised, explained([]):
        int("x")
    assert not isinstance(raised.value, InputError)
    with pytest.raises(InputError, match="trainer: this is wrong"), explained([]):
        raise MisconfigurationException("this\nis wrong.")
    text = str(trainer_refusal(MisconfigurationException("No supported gpu backend found!"), "gpu"))
    assert text.startswith("trainer.accelerator: gpu was asked for, and torch finds none here")


@pytest.mark.smoke
def test_a_list_that_is_not_read_to_its_end_ends_quietly():
    code = "import sys; from lssl.cli.main import main; main(['help'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
