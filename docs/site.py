"""Hooks of mkdocs: formulas as MathML, notebooks and files outside docs/ as pages, roles in docstrings as code."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
MATH = re.compile(r"^```math\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):(<code>)~?")
ANSI = re.compile(r"\x1b\[[0-9;]*m")
ADDED = {"CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}


def on_files(files: Any, config: Any) -> Any:
    """Adds pages that stand at the top of the repository."""
    for source, target in ADDED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = re.sub(r"\]\(docs/", "](", text)
        text = re.sub(r"\[([^\]]+)\]\((?:benchmarks|examples)/[^)]*\)", r"\1", text)  # these files are not of the site
        files.append(File.generated(config, target, content=text))
    for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=_notebook(path)))
    return files


def _notebook(path: Path) -> str:
    """Cells, printed text and pictures of an executed notebook."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            shown = output.get("data", {})
            text = "".join(output.get("text", []) or shown.get("text/plain", []))
            if "image/png" in shown:
                parts.append(f'<img alt="output" src="data:image/png;base64,{"".join(shown["image/png"]).strip()}">')
            elif text:
                parts.append(f"```text\n{ANSI.sub('', text).rstrip()}\n```")
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns ```math blocks into MathML, which browsers show without scripts, and mends links out of docs/."""
    up = posixpath.relpath(".", posixpath.dirname(page.file.src_uri) or ".")
    for source, target in ADDED.items():
        markdown = re.sub(rf"\]\((?:\.\./)+{source}", f"]({posixpath.join(up, target)}", markdown)
    markdown = re.sub(r"\]\((notebooks/\w+)\.ipynb\)", r"](\1.md)", markdown)
    return MATH.sub(lambda found: f"\n{_mathml(found[1])}\n", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name classes as :class:`lssl.Task`; the site shows the name as code."""
    return ROLE.sub(r"\1", html)


def _mathml(latex: str) -> str:
    lines = [line for line in latex.strip().split("\n\n") if line.strip()]
    return "\n".join(f'<div style="overflow-x:auto">{convert(line, display="block")}</div>' for line in lines)
