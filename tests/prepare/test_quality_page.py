"""quality.html holds every visit, flagged ones first, and their pictures; names cannot break it."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess

import pandas as pd
import pytest

from lssl.prepare import quality_page
from lssl.prepare.quality_page import write_quality_page

VISITS = [
    ("sub-a", "1", 0.95, ""),
    ("sub-a", "2", 0.95, ""),
    ("sub-b", "1", 0.2, "correlates by 0.20"),
    ("sub-c", "1", None, ""),
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for subject, visit, *_ in VISITS[:3]:
        (tmp_path / f"pictures/{subject}_{visit}.jpg").write_bytes(b"jpeg of " + subject.encode())
        (tmp_path / f"pictures/{subject}.png").write_bytes(b"png")
    return tmp_path


def visits() -> pd.DataFrame:
    table = pd.DataFrame(VISITS, columns=["subject", "session", "ncc_after", "flags"])
    pictures = [f"pictures/{subject}_{visit}.jpg" for subject, visit, *_ in VISITS[:3]]
    return table.assign(picture=[*pictures, float("nan")])  # the last one was prepared before there were pictures


def body(text: str) -> list[str]:
    return re.findall(r"<tr.*?</tr>", text.split("<tbody>")[1].split("</tbody>")[0])


def test_all_visits_flagged_ones_first_with_their_pictures(folder):
    text = write_quality_page(folder, visits()).read_text()
    rows = body(text)
    assert [re.search("#s(\\d)", row)[1] for row in rows] == ["0", "1", "1", "2"]
    assert "class=flagged" in rows[0] and "correlates by 0.20" in rows[0] and "data-value='0.2'>0.20" in rows[0]  # noqa: PT018
    assert "data-value=''>–" in rows[3]
    assert text.index("id='s0'") < text.index("id='s1'") < text.index("id='s2'")
    assert "3 subjects, 4 visits, 1 to look at" in text
    assert text.count("data:image/jpeg;base64,") == 3
    assert text.count("data:image/png;base64,") == 2
    assert text.count("<input type='range' min='0' max='1'") == 1  # only sub-a has two visits to compare
    assert "src='pictures" not in text


def test_change_is_shown_of_those_for_whom_it_was_found(folder):
    for subject in ("sub-a", "sub-b"):
        (folder / f"pictures/{subject}.change.png").write_bytes(b"change of " + subject.encode())  # b: of an older run
    text = write_quality_page(folder, visits().assign(change_mm=[0.0, 0.4, None, None], folding=[0.0, 0.0, None, None]))
    text = text.read_text()
    assert text.count(base64.b64encode(b"change of sub-a").decode()) == 1
    assert base64.b64encode(b"change of sub-b").decode() not in text
    assert "data-value='0.4'>0.40" in text
    assert "tissue moved" not in write_quality_page(folder, visits()).read_text()


def test_pictures_beyond_the_limit_are_linked(folder, monkeypatch):
    monkeypatch.setattr(quality_page, "MOST_BYTES", 20)
    text = write_quality_page(folder, visits()).read_text()
    assert text.count("data:image/jpeg;base64,") == 1  # of the flagged subject
    assert text.count("src='pictures/sub-a_") == 2


def test_names_are_text(folder):
    table = visits().assign(subject=["<script>alert(1)</script>", "b'><img src=x>", "c", "d"], flags="<b>")
    text = write_quality_page(folder, table).read_text()
    assert text.count("<script>") == 1
    assert "<img src=x>" not in text
    assert "<b>" not in text


def test_no_visits_no_page(folder):
    assert write_quality_page(folder, visits().iloc[:0]) is None


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node here")
def test_the_script_sorts_numbers_words_and_gaps(tmp_path):
    """In a stand-in of a page: one heading, rows with a figure each."""
    script = quality_page.SCRIPT.split("<script>")[1].split("</script>")[0]
    page = """
    const rows=['0.5','','-2','10'].map(v=>({cells:[{dataset:{value:v}}]}));
    const body={rows,append:r=>{rows.splice(rows.indexOf(r),1);rows.push(r)}};
    const th={closest:()=>({tBodies:[body]})};
    const document={querySelectorAll:s=>s==='th'?[th]:[]};
    """
    say = (
        "const say=()=>console.log(rows.map(r=>r.cells[0].dataset.value).join());th.onclick();say();th.onclick();say();"
    )
    (tmp_path / "page.js").write_text(page + script + say)
    said = subprocess.run(["node", tmp_path / "page.js"], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["-2,0.5,10,", "10,0.5,-2,"]
