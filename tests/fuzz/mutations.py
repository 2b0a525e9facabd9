"""Damaged bytes and odd cells, by hypothesis; ``make fuzz`` tries more of them than the suite."""

import contextlib
import io
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from lssl.cli.main import main
from lssl.utils.errors import InputError

TRIES = int(os.environ.get("LSSL_FUZZ", "10"))  # of each target
ODD = [
    *(
        "",
        " ",
        "n/a",
        "NaN",
        "nan",
        "inf",
        "-inf",
        "-1",
        "0",
        "999",
        "-4",
        "1e308",
        "1e-320",
        "89+",
        ">89",
        "70-74",
        "72,5",
    ),
    *("2015-03-02", "1600-01-01", "9999-12-31T23:59:59", "31/02/2015", "2015-13-45", "bl", "M06", "ses-01", "sub-01"),
    *(
        "🧠",
        "\u00a0",
        "\u202e",
        "\x00",
        "\x1a",
        '"',
        "'",
        "\\",
        "../../x",
        "/etc/passwd",
        "~",
        "${oc.env:HOME}",
        "a" * 5000,
    ),
    *(
        "[]",
        "{}",
        "null",
        "true",
        "1_000",
        "0x1F",
        "١٢",
        "!!python/object:os.system",
        "&a [*a]",
        "1;2",
        "=1+1",
        "-",
        "None",
    ),
]
cells = st.one_of(
    st.sampled_from(ODD), st.text(max_size=8), st.floats().map(str), st.integers(-(10**9), 10**12).map(str)
)


def tried(share: float = 1.0) -> settings:
    """The same inputs in every run of the suite; ``make fuzz`` draws new ones."""
    return settings(
        max_examples=max(1, round(TRIES * share)),
        derandomize="LSSL_FUZZ" not in os.environ,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def tables(draw, columns, rows, separator="\t"):
    """A table of sensible rows in which some cells, lines, names of columns or the end of the file are odd."""
    lines = [list(columns), *[list(row) for row in rows]]
    for _ in range(draw(st.integers(1, 4))):
        line = draw(st.integers(0, len(lines) - 1))
        kind = draw(st.sampled_from(["cell", "cell", "cell", "drop", "add", "line", "repeat"]))
        if kind == "cell" and lines[line]:
            lines[line][draw(st.integers(0, len(lines[line]) - 1))] = draw(cells)
        elif kind == "drop":
            lines[line] = lines[line][:-1]
        elif kind == "add":
            lines[line] = [*lines[line], draw(cells)]
        elif kind == "line":
            lines.insert(line, [draw(cells)])
        else:
            lines.insert(line, list(lines[line]))
    text = draw(st.sampled_from(["\n", "\r\n", "\r"])).join(separator.join(line) for line in lines)
    content = text.encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"])), "replace")
    return content[: len(content) - draw(st.sampled_from([0, 0, 0, 1, 7]))]


@st.composite
def damages(draw):
    """A function of bytes: flipped bits, a cut, a gap, a repeated or foreign part."""
    edits = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["flip", "flip", "flip", "cut", "gap", "repeat", "write"]),
                st.floats(0, 1, exclude_max=True),
                st.integers(0, 7),
                st.binary(min_size=1, max_size=8),
            ),
            min_size=1,
            max_size=3,
        )
    )
    head = draw(st.booleans())  # headers are short, and where the meaning is

    def damage(content: bytes) -> bytes:
        changed = bytearray(content)
        for kind, where, bit, payload in edits:
            place = int(where * (min(len(changed), 400) if head else len(changed)))
            if kind == "flip" and changed:
                changed[place] ^= 1 << bit
            elif kind == "cut":
                del changed[place:]
            elif kind == "gap":
                del changed[place : place + 1 + bit]
            elif kind == "repeat":
                changed[place:place] = changed[place : place + 64]
            else:
                changed[place : place + len(payload)] = payload
        return bytes(changed)

    return damage


def read_or_sentence(read, path):
    """What a reader returns; ``None`` if it refuses the file by its name."""
    try:
        return read(path)
    except InputError as error:
        sentence = str(error)
    assert str(path) in sentence
    return None


def command(*args):
    """Runs a command: its exit status is 0, or 2 with a sentence."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            main(list(args))
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
    assert status in (0, 2)
    assert status == 0 or errors.getvalue().strip()
