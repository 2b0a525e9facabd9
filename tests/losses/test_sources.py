"""Every loss says where it comes from."""

from __future__ import annotations

import inspect

import pytest

from lssl import losses


@pytest.mark.parametrize("name", sorted(set(losses.__all__) - {"Prototypes"}))
def test_each_loss_links_its_paper_and_reference_code(name: str):
    text = inspect.getdoc(getattr(losses, name))
    assert "https://arxiv.org/abs/" in text
    assert "https://github.com/" in text
