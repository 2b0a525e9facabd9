"""The packages hold what they promise, every way of installing names the same versions, and a release is consistent."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import yaml
from helpers import ROOT

spec = importlib.util.spec_from_file_location("check_release", ROOT / ".ci/check_release.py")
check_release = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_release)


# --- version, changelog, citation, tag --------------------------------------------------------------------------------


def test_version_changelog_and_citation_agree():
    assert check_release.disagreements(ROOT, None) == []


@pytest.fixture
def released(tmp_path):
    """The project at a tag: a copy with a version, a date in the changelog and the same in the citation."""
    texts = {
        "lssl/__init__.py": '__version__ = "1.2.0"\n',
        "CITATION.cff": "version: 1.2.0\ndate-released: 2030-01-02\n",
        "CHANGELOG.md": "# Changelog\n\n## 1.2.0 (2030-01-02)\n\n## 1.1.0 (2029-01-01)\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_release_that_agrees_passes(released):
    assert check_release.disagreements(released, "v1.2.0") == []


@pytest.mark.parametrize(
    ("name", "old", "new", "tag", "says"),
    [
        ("lssl/__init__.py", "1.2.0", "1.3.0", "v1.3.0", "CITATION.cff has version 1.2.0"),
        ("CHANGELOG.md", "## 1.2.0 (2030-01-02)\n\n", "", "v1.2.0", "first heading of CHANGELOG.md is of 1.1.0"),
        ("CHANGELOG.md", "(2030-01-02)", "(unreleased)", "v1.2.0", r"says \(unreleased\)"),
        ("CITATION.cff", "date-released: 2030-01-02\n", "", "v1.2.0", "date-released missing"),
        ("CITATION.cff", "", "", "v1.2.1", "tag is v1.2.1, lssl/__init__.py asks for v1.2.0"),
        ("CITATION.cff", "", "", "", "tag is missing"),
    ],
)
def test_a_release_that_disagrees_is_refused(released, name, old, new, tag, says):
    path = released / name
    path.write_text(path.read_text().replace(old, new))
    wrong = check_release.disagreements(released, tag)
    assert re.search(says, "\n".join(wrong))


def test_a_release_is_of_a_clean_tagged_commit(released):
    def git(*words):
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        return subprocess.run(["git", "-C", released, *identity, *words], check=True, capture_output=True, text=True)

    def run():
        return subprocess.run(
            [sys.executable, released / ".ci/check_release.py", "--tag", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )

    shutil.copytree(ROOT / ".ci", released / ".ci", ignore=shutil.ignore_patterns("__pycache__"))
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "release")
    assert "tag is missing" in run().stderr
    git("tag", "v1.2.0")
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    (released / "CITATION.cff").write_text("version: 1.2.0\ndate-released: 2030-01-02\ntitle: new\n")
    done = run()
    assert done.returncode == 1
    assert "not committed" in done.stderr


# --- what the packages hold -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Names of the files in the sdist, and in the wheel that is built from it as `python -m build` does."""
    place = tmp_path_factory.mktemp("built")

    def made(folder, names):
        top = {".git", ".venv", "runs", "build", "dist"} if folder == str(ROOT) else set()
        return [name for name in names if name in top or name.endswith((".egg-info", "_cache", "__pycache__"))]

    shutil.copytree(ROOT, place / "tree", symlinks=True, ignore=made)
    code = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"

    def build(what, folder, out):
        subprocess.run([sys.executable, "-c", code, what, out], cwd=folder, check=True, capture_output=True)

    build("build_sdist", place / "tree", place)
    (archive,) = place.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(place, filter="data")
        sdist = {name.partition("/")[2] for name in tar.getnames()}
    build("build_wheel", place / archive.name.removesuffix(".tar.gz"), place)
    with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
        return sdist, set(wheel.namelist())


def sources(folder, pattern):
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern) if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built):
    _, wheel = built
    wanted = {"lssl/py.typed", *(name for name in sources("lssl", "*.py"))}
    for folder, pattern in (("strategies", "*.py"), ("datamodules", "*.py"), ("configs", "*.yaml")):
        wanted |= {f"lssl/{name}" for name in sources(folder, pattern)}
    found = {name for name in wheel if ".dist-info/" not in name}
    assert found == wanted
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


@pytest.mark.slow
def test_the_sdist_holds_what_tests_and_users_of_it_need(built):
    sdist, _ = built
    top = {"README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", "constraints.txt", "Dockerfile", "environment.yml"}
    assert top <= sdist
    assert sources("tests", "*.py") | sources("configs", "*.yaml") | sources("docs", "*.md") <= sdist
    assert not [name for name in sdist if "__pycache__" in name or name.startswith((".git/", ".venv", "runs"))]


# --- ways to install --------------------------------------------------------------------------------------------------


def test_docker_and_conda_install_the_tested_versions():
    """Both read constraints.txt, so they cannot name others; a version that they pinned themselves could."""
    tested = re.findall(r"CPython (3\.\d+)", (ROOT / "constraints.txt").read_text())
    docker = (ROOT / "Dockerfile").read_text()
    installs = [line for line in docker.splitlines() if line.startswith("RUN pip install")]
    assert re.findall(r"^FROM python:(3\.\d+)-slim$", docker, re.MULTILINE) == tested
    assert len(installs) == 2
    assert all("constraints.txt" in line for line in installs)
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert [name.removeprefix("python=") for name in conda if str(name).startswith("python=")] == tested
    (pip,) = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    assert pip[0] == "--constraint constraints.txt"
    assert pip[-1] == "."
    assert not re.findall(r"[=<>~]=", docker.replace("'^torch=='", "") + "".join(pip))


def test_the_build_of_torch_is_kept_by_the_constraints():
    """`torch==2.13.0` allows 2.13.0+cu130: an installed build for CUDA is not replaced."""
    from packaging.requirements import Requirement

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    (torch,) = map(Requirement, lines)
    shown = set(re.findall(r"torch==([\d.]+)", (ROOT / "README.md").read_text()))
    shown |= set(re.findall(r"torch==([\d.]+)", (ROOT / "docs/installation.md").read_text()))
    assert shown == {str(torch.specifier).removeprefix("==")}
    assert all(torch.specifier.contains(f"{version}+cu130") for version in shown)
