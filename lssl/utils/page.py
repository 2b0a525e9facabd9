"""One HTML page that needs no other file; without torch."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable
from pathlib import Path

from lssl.utils.files import atomic_write

__all__ = ["image_tag", "write_page"]

STYLE = (
    "body{font-family:sans-serif;margin:2em auto;max-width:1200px;color:#222}"
    "table{border-collapse:collapse;font-size:13px}"
    "th,td{padding:3px 8px;border-bottom:1px solid #ddd;text-align:right}th{background:#f4f4f4}img{max-width:100%}"
    "p{color:#555;font-size:13px}"
)


def image_tag(path: Path, title: str) -> str:
    """A PNG as an element that holds its content."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<img alt='{html.escape(title)}' src='data:image/png;base64,{data}'>"


def write_page(path: Path, title: str, parts: Iterable[str], heading: str = "") -> None:
    """Writes a page atomically.

    Args:
        path: HTML.
        title: of the page, as text.
        parts: elements, as HTML.
        heading: as text; the title by default.
    """
    title, heading = html.escape(title), html.escape(heading or title)
    head = f"<!doctype html><meta charset='utf-8'><title>{title}</title><style>{STYLE}</style><h1>{heading}</h1>"
    with atomic_write(path) as part:
        part.write_text(f"{head}{''.join(parts)}\n", encoding="utf-8")
