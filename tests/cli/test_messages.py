"""What we read of the parser's text: each pattern meets the library's real wording, and fails when that changes."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import pytest
from jsonargparse import ArgumentError, ArgumentParser

from lssl.cli.messages import NO_CLASS, NO_OPTION, OF_A_UNION, explain, refuse_unknown
from lssl.cli.registered import registered
from lssl.strategies.global_contrastive import Objective
from lssl.utils.errors import InputError


def said(data, **more) -> str:
    """What jsonargparse says of a datamodule."""
    registered()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data", required=False)
    parser.add_argument("--steps", type=int)
    with pytest.raises(ArgumentError) as refused:
        parser.parse_object({"data": data, **more})
    return " ".join(str(refused.value).split())


def phantom(**options) -> dict:
    return {"class_path": "PhantomDataModule", "init_args": options}


def test_an_option_that_a_class_does_not_have():
    found = NO_OPTION[0].search(said(phantom(subject=3)))
    assert found["path"].endswith("PhantomDataModule")
    assert found["option"] == "subject"
    registered()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--objective", type=Callable[[int], Objective])
    with pytest.raises(ArgumentError) as refused:
        parser.parse_object({"objective": {"class_path": "MoCo", "init_args": {"queu": 3}}})
    found = NO_OPTION[1].search(" ".join(str(refused.value).split()))
    assert found["path"].endswith("MoCo")
    assert found["option"] == "queu"


def test_a_class_that_is_not_there():
    assert NO_CLASS.search(said({"class_path": "FantomDataModule"}))["name"] == "FantomDataModule"


@pytest.mark.parametrize("kind", [Objective, Callable[[], Objective]])
@pytest.mark.parametrize("path", ["lssl.InputError", "lssl.networks.heads.mean_and_max"])
def test_what_makes_no_instance_of_the_class_that_is_asked_for(kind, path):
    """As a function without a return annotation, which a user of TorchIO gives as a dataset."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--factory", type=kind)
    with pytest.raises(ArgumentError) as refused:
        parser.parse_object({"factory": path})
    assert str(explain(refused.value, [])) == (
        f"factory: {path} is no Objective; give a class that is one, or a function that says in its return annotation "
        "that it makes one."
    )


def test_a_value_of_the_wrong_type():
    """The first of the reasons is the one that counts; the type's names are said plainly."""
    text = said(phantom(max_interval="soon"))
    assert OF_A_UNION.search(text)
    registered_classes = registered()
    sentence = str(explain(ArgumentError(None, text), registered_classes))
    assert sentence == 'PhantomDataModule: "max_interval": Expected one of float, NoneType. Got value: soon'
    sentence = str(explain(ArgumentError(None, said(phantom(pairs="some"))), registered_classes))
    assert "one of 'any', 'consecutive', 'baseline', 'all'" in sentence
    plain = str(explain(ArgumentError(None, said(phantom(), steps="many")), registered_classes))
    assert plain.startswith('"steps"')


def test_keys_are_checked_before_the_parser_sees_them():
    known = {"views": {"size": 1}, "model": None}
    refuse_unknown({"views": {"size": 2}, "model": {"x": 1}}, known, ["views"])
    with pytest.raises(InputError, match="'views' has no key 'sise'; did you mean 'size'"):
        refuse_unknown({"views": {"sise": 2}}, known, ["views"])
    with pytest.raises(InputError, match="There is no key 'modell'; did you mean 'model'"):
        refuse_unknown({"modell": {}}, known, ["views"])
