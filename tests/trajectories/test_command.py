"""lssl trajectories: planted slopes come back on the page and in the tables, and what is missing is said."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from lssl.cli.main import main

SLOPES = {"control": -20.0, "patient": -120.0}  # mm³ a year


@pytest.fixture
def predicted(tmp_path):
    """Predictions of 12 subjects of two groups, and the cohort's folder."""
    data, folder = tmp_path / "cohort", tmp_path / "run" / "predict" / "cohort"
    data.mkdir()
    folder.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("{}\n")
    rng, visits, volumes, people = np.random.default_rng(0), [], [], []
    for number in range(12):
        subject, group = f"sub-{number:02}", list(SLOPES)[number % 2]
        people.append((subject, group, "A" if number < 6 else "B"))
        start, level = rng.uniform(60, 80), rng.normal(4000, 300)
        for visit in range(3):
            row = (subject, f"ses-{visit}", start + visit, float(visit))
            visits.append((*row, f"site {number % 3}", 0.5 + 0.01 * rng.normal()))
            value = level + SLOPES[group] * visit + rng.normal(0, 10)
            volumes += [(*row, "hippocampus", value), (*row, "ventricles", 9000 + 3 * number)]
    columns = ["subject", "session", "age", "years"]
    table = pd.DataFrame(visits, columns=[*columns, "site", "motion"])
    table.to_csv(folder / "visits.tsv", sep="\t", index=False)
    pd.DataFrame(volumes, columns=[*columns, "structure", "mm3"]).to_csv(folder / "volumes.csv", index=False)
    people = pd.DataFrame(people, columns=["participant_id", "diagnosis", "scanner"])
    people.to_csv(data / "participants.tsv", sep="\t", index=False)
    about = {"lssl": {"cohort": str(data.resolve())}}
    (folder / "dataset_description.json").write_text(json.dumps(about))
    return tmp_path / "run", data, folder


def sentence(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main(["trajectories", *map(str, args)])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_volumes_that_never_differ_have_no_slope_and_no_traceback(predicted, capsys):
    """As those of a network that was hardly trained: all are 0."""
    run, data, folder = predicted
    volumes = pd.read_csv(folder / "volumes.csv").assign(mm3=0.0)
    volumes.to_csv(folder / "volumes.csv", index=False)
    main(["trajectories", str(run), str(data)])
    assert "No slope: it takes 2 subjects with two visits at different times, and values that differ." in (
        capsys.readouterr().out
    )
    slopes = pd.read_csv(folder / "slopes.tsv", sep="\t")
    assert slopes.empty
    assert {"measure", "group", "slope_per_year", "p_holm"} <= {*slopes}
    assert "<h2>Slopes</h2><p>None.</p>" in (folder / "trajectories.html").read_text().replace("\n", "")


def test_groups_on_the_page_and_in_the_tables(predicted, capsys):
    run, data, folder = predicted
    main(["trajectories", str(run), str(data), "--group", "diagnosis"])
    out = capsys.readouterr().out
    assert "hippocampus (ml) patient: -0.1" in out
    assert f"Folder: {folder}" in out
    slopes = pd.read_csv(folder / "slopes.tsv", sep="\t").set_index(["measure", "group"])
    for group, slope in SLOPES.items():
        assert slopes.loc[("hippocampus (ml)", group), "slope_per_year"] == pytest.approx(slope / 1000, abs=0.01)
    assert slopes.loc[("hippocampus (ml)", "patient"), "p_holm"] < 1e-3
    table = pd.read_csv(folder / "trajectories.tsv", sep="\t")
    assert len(table) == 36
    assert {"site", "interval", "motion", "group", "hippocampus (ml)"} <= {*table}
    assert table.groupby("subject")["interval"].apply(list).map(lambda one: one[1:]).tolist() == [[1.0, 1.0]] * 12
    page = (folder / "trajectories.html").read_text()
    assert page.count("data:image/png;base64,") >= 1
    assert "patient" in page
    assert "src='http" not in page


def test_embeddings_become_components_and_change(predicted):
    _, _, folder = predicted
    visits = pd.read_csv(folder / "visits.tsv", sep="\t")
    rng = np.random.default_rng(1)
    direction = rng.normal(size=16)
    features = 3.0 * visits["years"].to_numpy()[:, None] * direction + 0.01 * rng.normal(size=(36, 16))
    shuffled = rng.permutation(36)
    names = {key: visits[key].to_numpy(str)[shuffled] for key in ("subject", "session")}
    np.savez(
        folder / "embeddings.npz",
        **names,
        age=visits["age"][shuffled],
        small=np.zeros((36, 2)),
        deep=features[shuffled],
    )
    (folder / "volumes.csv").unlink()
    main(["trajectories", str(folder)])
    table = pd.read_csv(folder / "trajectories.tsv", sep="\t")
    (first,) = [name for name in table if name.startswith("deep PC1")]
    assert first == "deep PC1 (100 %)"
    assert abs(np.corrcoef(table[first], table["years"])[0, 1]) > 0.99
    expected = 3.0 * np.linalg.norm(direction) * table["years"]
    np.testing.assert_allclose(table["deep change"], expected, atol=0.2)


def test_what_is_missing_is_said(predicted, capsys, tmp_path):
    run, data, folder = predicted
    assert "participants.tsv has no column diagnose; did you mean 'diagnosis'?" in sentence(
        capsys, run, data, "--group", "diagnose"
    )
    assert "is neither a run folder" in sentence(capsys, tmp_path / "none", data)
    assert "does not exist; give the folder or the table" in sentence(capsys, run, tmp_path / "none")
    assert "holds no checkpoint to predict with" in sentence(capsys, run, tmp_path)
    assert "participants.tsv has no column nothing" in sentence(capsys, run, data, "--adjust", "nothing")
    assert "there is no table" in sentence(capsys, run, data, "--group", "x", "--participants", data / "no.tsv").lower()
    (folder / "visits.tsv").unlink()
    assert "holds no checkpoint" in sentence(capsys, run, data)


def test_held_constant_and_unknown_groups(predicted, capsys):
    run, data, folder = predicted
    people = pd.read_csv(data / "participants.tsv", sep="\t")
    people.loc[0, "diagnosis"] = None
    people.to_csv(data / "participants.tsv", sep="\t", index=False, na_rep="n/a")
    main(["trajectories", str(run), "--group", "diagnosis", "--adjust", "scanner", "motion"])
    out = capsys.readouterr().out
    assert "3 visits without a value of diagnosis left out." in out
    slopes = pd.read_csv(folder / "slopes.tsv", sep="\t").set_index(["measure", "group"])
    assert slopes.loc[("hippocampus (ml)", "control"), "subjects"] == 5
    assert slopes.loc[("hippocampus (ml)", "patient"), "slope_per_year"] == pytest.approx(-0.12, abs=0.01)
