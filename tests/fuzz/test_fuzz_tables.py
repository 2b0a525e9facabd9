"""Odd tables, sidecars, run folders and settings: one sentence or sensible values, never a traceback."""

import contextlib
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import yaml
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from mutations import cells, command, damages, tables, tried

from lssl.data.bids import bids_table
from lssl.data.pairs import build_pairs, order_visits
from lssl.data.tables import csv_table
from lssl.utils.errors import InputError

COLUMNS = ("subject", "session", "image", "age", "days", "date", "site", "split")
ROWS = [
    ("s1", "v1", "a.nii", "71.5", "0", "2015-03-02", "A", "train"),
    ("s1", "v2", "b.nii", "72.5", "365", "2016-03-02", "A", "train"),
    ("s2", "bl", "c.nii", "", "0", "", "B", "test"),
    ("s2", "M12", "d.nii", "65", "370", "", "B", "test"),
]


def sensible(table):
    """What a table of visits must fulfil, whatever was read."""
    assert len(table)
    assert (table["subject"].str.strip() == table["subject"]).all()
    age, time = (table[name].to_numpy(float) for name in ("age", "time"))
    assert ((age >= 0) & (age <= 130) | np.isnan(age)).all()
    assert ((time >= 0) & (time <= 130) | np.isnan(time)).all()
    ordered = order_visits(table)
    pairs = build_pairs(ordered, "any", 0.0, None).pairs
    first, second = ordered["time"].to_numpy(float)[pairs].T.reshape(2, -1)
    assert not (first > second).any()


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return tmp_path_factory.mktemp("room")


@tried(3)
@given(content=tables(COLUMNS, ROWS, ","))
def test_a_table_of_visits(room, content):
    path = room / "visits.csv"
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        sensible(csv_table(path)[0])


@pytest.fixture(scope="module")
def bids(tmp_path_factory):
    root = tmp_path_factory.mktemp("bids")
    for subject in ("01", "02"):
        for session in ("a", "b"):
            folder = root / f"sub-{subject}/ses-{session}/anat"
            folder.mkdir(parents=True)
            image = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4))
            nib.save(image, folder / f"sub-{subject}_ses-{session}_T1w.nii")
    return root


PEOPLE = tables(
    ("participant_id", "session_id", "age", "sex", "site"),
    [("sub-01", "ses-a", "71", "F", "A"), ("sub-01", "ses-b", "73", "F", "A"), ("sub-02", "n/a", "89+", "M", "B")],
)
SESSIONS = tables(
    ("session_id", "acq_time", "age", "days_from_baseline"),
    [("ses-a", "2015-03-02T10:00:00", "71", "0"), ("ses-b", "2017-03-02T10:00:00", "73", "731")],
)
SCANS = tables(("filename", "acq_time"), [("anat/sub-01_ses-a_T1w.nii", "2015-03-02T10:00:00")])
UNITS = st.sampled_from(["years", "months", "weeks", "days", "mm", "", "fortnights"]) | cells
SIDECAR = st.one_of(
    st.builds(lambda unit, levels: json.dumps({"age": {"Units": unit, "Levels": levels}}), UNITS, st.none() | cells),
    st.sampled_from(
        ["", "{", "[]", '{"age": 3}', '{"age": {"Units": ["years"], "Levels": [1, 2]}}', "null", "\ufeff{}"]
    ),
)


@tried(3)
@given(people=PEOPLE, sessions=SESSIONS, scans=SCANS, sidecar=SIDECAR, file=st.integers(0, 3))
def test_sidecars_of_a_bids_folder(bids, people, sessions, scans, sidecar, file):
    contents = [people, sessions, scans, sidecar.encode()]
    names = [
        "participants.tsv",
        "sub-01/sub-01_sessions.tsv",
        "sub-01/ses-a/sub-01_ses-a_scans.tsv",
        "participants.json",
    ]
    for name, content in zip(names, contents, strict=True):
        (bids / name).write_bytes(content)
    with contextlib.suppress(InputError):
        table = bids_table(bids, "T1w")[0]
        assert len(table) == 4  # odd sidecars cost values, never visits
        sensible(table)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    folder.mkdir()
    lines = ["step,epoch,train/loss,val/loss,monitor/rank/bottleneck"]
    lines += [f"{10 * n},{n},{2 / (n + 1)},{1 / (n + 1)},{5 + n}" for n in range(6)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text("model: {class_path: LongitudinalLocal}\nviews: {size: 32}\n")
    shutil.copytree(folder, folder.with_name("b"))
    return folder


@pytest.fixture(scope="module")
def without_curves():
    """Curves are drawn by matplotlib, from values that the tables have shown to be numbers: seconds each."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_terms", "draw_monitors"):
            patch.setattr(f"lssl.runs.curves.{name}", lambda runs, path: False)
        yield


@tried(4)
@given(damage=damages(), name=st.sampled_from(["metrics.csv", "config.yaml"]))
def test_a_damaged_run_folder(run, without_curves, damage, name):
    (run / name).write_bytes(damage((run.with_name("b") / name).read_bytes()))
    command("show", str(run), "--out", str(run.with_name("out")))
    shutil.copy(run.with_name("b") / name, run / name)


KEYS = [
    *(
        "views.size",
        "views.overlap",
        "views.rotation",
        "views.transforms",
        "views",
        "backbone.taps",
        "backbone.padding",
    ),
    *(
        "backbone.network",
        "data",
        "data.class_path",
        "data.init_args",
        "data.init_args.subjects",
        "data.init_args.split",
    ),
    *("data.init_args.few_shot", "data.init_args.transform", "model", "model.class_path", "model.init_args.objective"),
    *("model.init_args.loss_weights", "model.init_args.optimizer", "model.init_args.schedule", "trainer"),
    *(
        "trainer.max_steps",
        "trainer.devices",
        "trainer.precision",
        "trainer.callbacks",
        "trainer.logger",
        "monitor.every",
    ),
    *("seed_everything", "base", "unknown", "trainer.default_root_dir", "ckpt_path"),
]
values = st.recursive(
    cells | st.none() | st.booleans() | st.integers(-2, 10**12) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["class_path", "init_args", "a", ""]), inner)
    ),
    max_leaves=4,
)


@tried(1)
@given(key=st.sampled_from(KEYS), value=values)
def test_odd_settings(room, key, value):
    """As YAML; what the parser accepts is printed, everything else is a sentence and exit 2."""
    content = value
    for part in reversed(key.split(".")):
        content = {part: content}
    path = room / "odd.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    shipped = ["--config", str(ROOT / "configs/global_contrastive.yaml"), "--config", str(path)]
    command("fit", *shipped, "--data", "PhantomDataModule", "--print_config")


@tried(1)
@given(
    text=st.text(max_size=60) | st.sampled_from(["&a [*a]", "a: &a [*a, *a]", "{", "- 1\n- 2", "a: 1\na: 2", "\t- x"])
)
def test_any_text_as_a_config(room, text):
    path = room / "text.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    command("fit", "--config", str(path), "--data", "PhantomDataModule", "--print_config")
