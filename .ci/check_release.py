"""Refuses a release whose version, changelog, citation and tag disagree.

``python .ci/check_release.py`` compares what the files say. ``--tag v1.2.3`` (or ``--tag HEAD``, for the tag of the
commit) adds the tag and asks for a date in the changelog and in CITATION.cff. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def disagreements(root: Path, tag: str | None) -> list[str]:
    """Sentences on what disagrees with ``lssl.__version__``; an empty list allows the release.

    Args:
        root: of the repository.
        tag: of the commit; ``None`` checks a version that is not to be released yet.
    """
    version = _find(r'^__version__ = "(.+)"$', root / "lssl/__init__.py")
    cited = _find(r"^version: *(\S+)$", root / "CITATION.cff")
    cited_date = _find(r"^date-released: *[\"']?([\d-]+)", root / "CITATION.cff")
    heading, date = _find(r"^## (\S+)", root / "CHANGELOG.md"), _find(r"^## \S+ \((.*)\)$", root / "CHANGELOG.md")
    wrong = []
    if cited != version:
        wrong.append(f"CITATION.cff has version {cited}, lssl/__init__.py has {version}.")
    if heading != version:
        wrong.append(f"The first heading of CHANGELOG.md is of {heading}, lssl/__init__.py has {version}.")
    if tag is None:
        return wrong
    if tag != f"v{version}":
        wrong.append(f"The tag is {tag or 'missing'}, lssl/__init__.py asks for v{version}.")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        wrong.append(f"The first heading of CHANGELOG.md says ({date}); give the day of the release, (YYYY-MM-DD).")
    elif cited_date != date:
        wrong.append(f"CITATION.cff has date-released {cited_date or 'missing'}, CHANGELOG.md has {date}.")
    return wrong


def uncommitted(root: Path) -> list[str]:
    """A sentence if the working tree differs from its commit."""
    changed = _git(root, "status", "--porcelain").splitlines()
    return [f"The working tree has changes that are not committed ({changed[0].strip()}, …)."] if changed else []


def _find(pattern: str, path: Path) -> str:
    found = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else ""


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False).stdout.strip()


def main() -> int:
    """Prints what disagrees; the exit status is 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", help="tag of the release, or HEAD for the tag of the checked-out commit")
    tag, wrong = parser.parse_args().tag, []
    if tag == "HEAD":
        tag, wrong = _git(ROOT, "tag", "--points-at", "HEAD", "v*"), uncommitted(ROOT)
    wrong += disagreements(ROOT, tag)
    print("\n".join(wrong) or "Version, changelog, citation and tag agree.", file=sys.stderr if wrong else sys.stdout)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
