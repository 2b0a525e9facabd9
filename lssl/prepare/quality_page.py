"""``quality.html``: how well the visits of every subject lie on each other, in figures and pictures, on one page."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from lssl.data.pairs import count
from lssl.utils.page import write_page

__all__ = ["MOST_BYTES", "write_quality_page"]

MOST_BYTES = 48 * 2**20  # of pictures within the page; the others are linked
FIGURES = {  # column → heading, digits, what it is
    "ncc_before": ("NCC before", 2, "correlation with the subject's other visits in scanner coordinates"),
    "ncc_after": ("NCC after", 2, "the same, registered"),
    "overlap": ("overlap", 2, "Dice of the foregrounds"),
    "disagreement_mm": ("disagreement, mm", 2, "between both directions of registration"),
    "same_person": ("same person", 2, "above 0.2: one person; near 0: perhaps another; negative: left–right flipped"),
    "rotation_deg": ("turned, °", 1, "against the visit before"),
    "moved_mm": ("moved, mm", 1, "against the visit before"),
    "coverage": ("coverage", 2, "share of the head that the field of view holds"),
    "foreground_ml": ("foreground, ml", 0, "volume"),
    "change_mm": ("tissue moved, mm", 2, "mean of the non-rigid field since the first visit"),
    "folding": ("folds", 4, "share of the head in which that field folds; 0 is right"),
}
STYLE = """<style>
th{cursor:pointer;position:sticky;top:0}td:nth-child(-n+3){text-align:left}tr.flagged td{background:#fff3e0}
details{margin:6px 0}summary{cursor:pointer;padding:4px}.flagged>summary{background:#fff3e0}
.stack{position:relative;max-width:990px}.stack img{width:100%;display:block}
.stack img+img{position:absolute;top:0;left:0;opacity:0}.wide{overflow-x:auto}.wide img{max-width:none;height:auto}
</style>"""
SCRIPT = """<script>
document.querySelectorAll('th').forEach((th,i)=>{let up=true;th.onclick=()=>{
 const body=th.closest('table').tBodies[0],rows=[...body.rows],key=r=>r.cells[i].dataset.value??r.cells[i].textContent;
 const order=(a,b)=>{const x=key(a),y=key(b);if(x===''||y==='')return (x==='')-(y==='');
  return (isNaN(x)||isNaN(y)?x.localeCompare(y):x-y)*(up?1:-1)};
 rows.sort(order).forEach(r=>body.append(r));up=!up}});
document.querySelectorAll('a.open').forEach(a=>a.onclick=()=>document.getElementById(a.hash.slice(1)).open=true);
document.querySelectorAll('.blink').forEach(box=>{const shown=[...box.querySelectorAll('.stack img')],
 slider=box.querySelector('input[type=range]'),name=box.querySelector('output');let timer=null;
 const show=v=>{const low=Math.floor(v);shown.forEach((im,i)=>im.style.opacity=i===low?1:i===low+1?v-low:0);
  slider.value=v;name.textContent=shown[Math.round(v)].alt};
 slider.oninput=()=>show(+slider.value);
 box.querySelector('button').onclick=()=>{if(timer){clearInterval(timer);timer=null;return}
  let at=0;timer=setInterval(()=>show(at=(at+1)%shown.length),600)};show(0)});
</script>"""


def write_quality_page(folder: Path, table: pd.DataFrame) -> Path | None:
    """Writes the page of a prepared folder; it needs no other file.

    All visits stand in one table that every heading sorts, flagged ones first and then those that correlate least. Of
    each subject there are its visits in one place, to fade or to blink, the edges of later visits on the first, and
    where volumes changed, after ``--nonrigid``.
    Pictures beyond :data:`MOST_BYTES` are linked, not held; flagged subjects come first.

    Args:
        folder: that ``lssl prepare`` wrote.
        table: a row per visit with quality figures, ``flags`` and ``picture``.
    """
    if table.empty:
        return None
    flagged = table["flags"].fillna("") != ""
    order = table.assign(_ok=~flagged, _ncc=pd.to_numeric(table["ncc_after"], errors="coerce"))
    order = order.sort_values(["_ok", "_ncc"], kind="stable")
    subjects = list(dict.fromkeys(order["subject"]))
    number = {subject: place for place, subject in enumerate(subjects)}
    title = (
        f"{folder.name}: {count(len(subjects), 'subject')}, {count(len(table), 'visit')}, {flagged.sum()} to look at"
    )
    parts = [STYLE, "<p>Click a heading to sort, a subject to see it. The patient's right is on the left.</p>"]
    parts += [_table(order, number), *_subjects(folder, table, subjects), SCRIPT]
    write_page(folder / "quality.html", title, parts)
    return folder / "quality.html"


def _table(rows: pd.DataFrame, number: dict[str, int]) -> str:
    known = {name: of for name, of in FIGURES.items() if name in rows}
    heads = ["<th>subject</th><th>visit</th><th>look at</th>"]
    heads += [f"<th title='{html.escape(what, quote=True)}'>{heading}</th>" for heading, _, what in known.values()]
    lines = []
    for row in rows.to_dict("records"):
        name, flags = html.escape(str(row["subject"])), html.escape(_text(row["flags"]))
        cells = [f"<td><a class='open' href='#s{number[row['subject']]}'>{name}</a></td>"]
        cells += [f"<td>{html.escape(str(row['session']))}</td><td>{flags}</td>"]
        cells += [_cell(row[column], digits) for column, (_, digits, _) in known.items()]
        lines.append(f"<tr{' class=flagged' if flags else ''}>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _cell(value: object, digits: int) -> str:
    figure = float(pd.to_numeric(pd.Series([value]), errors="coerce").iloc[0])
    if figure != figure:
        return "<td data-value=''>–</td>"
    return f"<td data-value='{figure:.6g}'>{figure:.{digits}f}</td>"


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _subjects(folder: Path, table: pd.DataFrame, subjects: list[str]) -> Iterator[str]:
    """A part of the page for each subject."""
    left = MOST_BYTES
    groups = dict(iter(table.groupby("subject", sort=False)))
    for place, subject in enumerate(subjects):
        rows = groups[subject]
        pictures = map(_text, rows.get("picture", [""] * len(rows)))
        each = [(str(name), folder / file) for name, file in zip(rows["session"], pictures, strict=True)]
        visits = [(name, path) for name, path in each if path.is_file()]
        wide = {f"{subject}: edges and differences": folder / "pictures" / f"{subject}.png"}
        if "change_mm" in rows and rows["change_mm"].notna().any():
            wide[f"{subject}: change of volume"] = folder / "pictures" / f"{subject}.change.png"
        wide = {what: path for what, path in wide.items() if path.is_file()}
        size = sum(path.stat().st_size for path in (*[path for _, path in visits], *wide.values()))
        held = size <= left
        left -= size * held
        marks = "; ".join(filter(None, map(_text, rows["flags"])))
        content = _blink(visits, folder, held)
        for what, path in wide.items():
            content += f"<div class='wide'>{_image(path, what, folder, held)}</div>"
        summary = html.escape(f"{subject}: {count(len(rows), 'visit')}" + f" – {marks}" * bool(marks))
        kind = " class='flagged'" if marks else ""
        yield f"<details id='s{place}'{kind}><summary>{summary}</summary>{content}</details>"


def _blink(visits: list[tuple[str, Path]], folder: Path, held: bool) -> str:
    """The visits of a subject in one place, with a slider and a button; one visit alone has neither."""
    images = "".join(_image(path, name, folder, held) for name, path in visits)
    if len(visits) < 2:
        return f"<div class='stack'>{images}</div>"
    slider = f"<input type='range' min='0' max='{len(visits) - 1}' step='0.02' value='0' aria-label='visit'>"
    return (
        f"<div class='blink'><div class='stack'>{images}</div>{slider} <button>blink</button> <output></output></div>"
    )


def _image(path: Path, name: str, folder: Path, held: bool) -> str:
    kind = "png" if path.suffix == ".png" else "jpeg"
    source = path.relative_to(folder).as_posix()
    if held:
        source = f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return f"<img loading='lazy' alt='{html.escape(name, quote=True)}' src='{html.escape(source, quote=True)}'>"
