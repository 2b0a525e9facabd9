"""Help in a screenful, classes described, completion that parses and offers, and the nearest option of a typo."""

import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, sentence

from lssl.cli.completion import words
from lssl.cli.describe import recipes, registered_names
from lssl.cli.help import COMMANDS, OPTIONS
from lssl.cli.main import main

BASH = shutil.which("bash")


def said(capsys, *args):
    main(list(args))
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_a_screenful(command, capsys):
    text = said(capsys, command, "--help")
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 120
    assert f"lssl {command} --help=all" in text
    assert ("--trainer.max_steps" in text) == (command == "fit")


def test_short_help_and_completion_import_neither_torch_nor_lightning():
    code = "import sys; from lssl.cli.main import main; main(['fit', '--help']); main(['completion', 'bash']); "
    code += "print([name for name in ('torch', 'lightning', 'jsonargparse') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.rstrip().endswith("[]")


def test_the_long_help_has_every_option_of_the_short_one(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--help=all"])
    assert not end.value.code
    text = capsys.readouterr().out
    assert len(text.splitlines()) > 400
    for name in OPTIONS:
        if "init_args" not in name and name not in ("backbone", "print_config", "config", "help"):
            assert f"--{name}" in text, name


def test_a_strategy_is_described(capsys):
    text = said(capsys, "strategies", "LongitudinalLocal")
    assert "NeurIPS 2022 (arXiv 2206.04281)" in " ".join(text.split())
    assert "samples" in text
    assert "default" in text
    assert "loss_weights" in text  # of every strategy
    assert "longitudinal_infonce" in text
    assert "paper/longitudinal_local" in text
    assert "``" not in text
    following = text.strip().splitlines()[-1].removeprefix("Next: lssl ").split()
    with pytest.raises(SystemExit) as end:
        main(following)
    assert not end.value.code
    assert "LongitudinalLocal" in capsys.readouterr().out


def test_every_class_is_described_with_recipes(capsys):
    for group in ("strategies", "datamodules"):
        for name in registered_names(group):
            text = said(capsys, group, name)
            assert "\nOptions" in text, name
            if group == "strategies":
                assert "\nPaper:" in text, name
            assert "\nRecipes" in text or "No shipped recipe" in text, name
    assert set(recipes("strategies", "Segmenter")) >= {"finetune", "demo_finetune"}
    assert "data/phantom" in recipes("datamodules", "PhantomDataModule")


def test_a_class_of_another_package_is_described(capsys, tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(
        '"""Their method: Doe, \\"A method\\", arXiv 2401.00001."""\n'
        "class Theirs:\n"
        '    """Does it.\n\n    Args:\n        width: of the head.\n    """\n'
        "    def __init__(self, width: int = 7): pass\n"
    )
    info = tmp_path / "theirs-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[lssl.strategies]\nTheirs = theirs:Theirs\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = said(capsys, "strategies", "Theirs")
    assert "Does it." in text
    assert "width                   int, default 7: of the head." in text
    assert "arXiv 2401.00001" in text
    assert "No shipped recipe uses it." in text
    assert "Theirs" in words()[1]["strategies"]


def test_a_package_that_cannot_be_imported_stops_nothing(capsys, tmp_path, monkeypatch):
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[lssl.strategies]\nBroken = no_such_module:Broken\n")
    monkeypatch.syspath_prepend(tmp_path)
    main(["strategies"])
    printed = capsys.readouterr()
    assert "LongitudinalLocal" in printed.out
    assert "Broken of the package broken cannot be imported (ModuleNotFoundError: No module named" in printed.err
    with pytest.raises(SystemExit) as ended:
        main(["strategies", "Broken"])
    assert ended.value.code == 2
    assert "Broken cannot be imported" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_parse(shell, capsys):
    script = said(capsys, "completion", shell)
    assert all(name in script for name in ("predict", "longitudinal_infonce", "MaskedAutoencoder", "trainer.max_steps"))
    parser = BASH if shell == "bash" else shutil.which(shell)
    if parser is None:
        pytest.skip(f"there is no {shell} here")
    subprocess.run([parser, "-n"], input=script, text=True, check=True)


@pytest.mark.skipif(BASH is None, reason="there is no bash here")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["pre"], {"predict", "prepare"}),
        (["strategies", "Mask"], {"MaskedAutoencoder"}),
        (["fit", "--config", "longitudinal_i"], {"longitudinal_infonce"}),
        (["fit", "--data", "Ph"], {"PhantomDataModule"}),
        (["fit", "--config", "demo", "--trainer.max"], {"--trainer.max_steps"}),
        (["prepare", "a", "b", "--transform", "r"], {"rigid"}),
        (["inspect", "--subj"], {"--subjects"}),
        (["benchmark", "--config", "benchmark/d"], {"benchmark/demo"}),
        (["show", "some"], {"some_run"}),
    ],
)
def test_bash_completes(typed, offered, capsys, tmp_path):
    (tmp_path / "some_run").mkdir()
    script = said(capsys, "completion", "bash")
    line = " ".join(f"'{word}'" for word in ["lssl", *typed])
    script += f"\nCOMP_WORDS=({line}); COMP_CWORD={len(typed)}; _lssl; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    result = subprocess.run([BASH, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert set(result.stdout.split()) == offered
    assert not result.stderr


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish here")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("pre", {"predict", "prepare"}),
        ("strategies Mask", {"MaskedAutoencoder"}),
        ("fit --config longitudinal_i", {"longitudinal_infonce"}),
        ("fit --data Ph", {"PhantomDataModule"}),
        ("fit --config demo --trainer.max", {"--trainer.max_steps"}),
        ("prepare a b --transform r", {"rigid"}),
    ],
)
def test_fish_completes(typed, offered, capsys, tmp_path):
    (tmp_path / "lssl.fish").write_text(said(capsys, "completion", "fish"))
    command = f'source lssl.fish; complete -C "lssl {typed}"'
    result = subprocess.run(["fish", "-c", command], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert set(result.stdout.split()) == offered


def test_the_nearest_option_is_named(capsys):
    demo = ["fit", "--config", str(ROOT / "configs/demo.yaml")]
    for command, near in (
        ([*demo, "--max_steps", "3"], "'trainer.max_steps'"),
        ([*demo, "--trainer.max_step", "3"], "'max_steps'"),
        ([*demo, "--ckpt-path", "last"], "'ckpt_path'"),
        ([*demo, "--modell.init_args.samples", "3"], "'model'"),
        ([*demo, "--model.init_args.sample", "3"], "'samples'"),
        ([*demo, "--data.init_args.batchsize", "3"], "'batch_size'"),
        (["prepare", "a", "b", "--sufix", "T1w"], "'--suffix'"),
        (["inspect", "a", "--jsn"], "'--json'"),
        (["show", "a", "--ou", "b"], "'--out'"),
        (["benchmark", "--config", "benchmark/demo", "--dryrun"], "'--dry-run'"),
        (["export", "a", "b", "--imag", "c"], "'--image'"),
        (["strategies", "LongitudinalLokal"], "'LongitudinalLocal'"),
        (["datamodules", "Phantom"], "'PhantomDataModule'"),
        (["completion", "bsh"], "'bash'"),
        (["predikt"], "'predict'"),
    ):
        assert f"did you mean {near}?" in sentence(capsys, *command), command
