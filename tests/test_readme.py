"""What the README shows is what the tests run."""

import re

from helpers import ROOT, VISIT_ORDER

README = (ROOT / "README.md").read_text()


def test_the_readmes_method_is_the_one_that_is_tested():
    shown = re.search(r"```python\n# my_methods.py\n(.+?)```", README, re.DOTALL)
    assert shown
    assert shown.group(1).strip() == VISIT_ORDER.strip()


def test_every_file_named_exists():
    for path in set(re.findall(r"\b(?:configs|docs|lssl|strategies|datamodules)/[\w/]+\.(?:yaml|png|py)", README)):
        assert (ROOT / path).is_file(), path


def test_make_targets_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
