"""What others wrote cannot command a terminal, whichever way it gets there."""

import ast
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core import terminal

ROOT = Path(__file__).parents[1]
EVIL = "\x1b]0;title\x07\x1b[2J\x9b31m\r\x08\u202ereversed\u2066\x7f\u200b"
COMMANDS = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]"
)


def test_what_a_terminal_obeys_is_spelled_out_and_the_rest_is_left():
    text = terminal.printable(EVIL)
    assert not COMMANDS.search(text) and "\r" not in text
    assert "\\x1b[2J" in text and "reversed" in text
    assert terminal.printable("é 猫 🐈 a\n\tb") == "é 猫 🐈 a\n\tb"
    assert terminal.printable("lone \ud800") == "lone \\ud800"


def test_a_cell_is_one_line_however_it_is_written():
    lines = terminal.table(["a\nb"], [["x\r\ny\u2028z"], [EVIL]]).splitlines()
    assert len(lines) == 4 and lines[2] == "x y z"


def test_columns_stand_below_each_other_where_characters_are_two_columns_wide():
    from rich.cells import cell_len

    lines = terminal.table(["name", "n"], [["猫猫", 1], ["cat", 2], ["猫" * 50, 3]], 9).splitlines()
    assert {cell_len(line[: line.rindex(" ")]) for line in lines[2:]} == {len("---------  ") - 1}


def at_a_terminal(command: list[str], cwd: Path) -> str:
    """What a command writes while its output and its errors are a terminal."""
    mine, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd, env=env
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(mine, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    process.wait(60)
    os.close(mine)
    return written.decode().replace("\r\n", "\n")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder whose data, file names and parameters are written by others."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "data/images").mkdir(parents=True)
    table = pa.table({"caption": [EVIL], EVIL: [EVIL]})
    pq.write_table(table, folder / "data/images/0.parquet")
    (folder / "evil.pt").write_bytes(b"no checkpoint")
    (folder / f"{EVIL}.yaml").write_text(json.dumps({EVIL: {EVIL: EVIL}}))
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["query", "SELECT * FROM images"],
        ["query", "SELECT * FROM images", "--format", "csv"],
        ["query", "SELECT * FROM images", "--format", "json"],
        ["query", f"SELECT '{EVIL}' + 1"],
        ["query", f'SELECT "{EVIL}"'],
        ["query", "SELECT error(caption) FROM images"],
        ["query", "SELECT 1", "--format", EVIL],
        ["select", "--params", f"{EVIL}.yaml"],
        ["select", "--params", f"{EVIL}{EVIL}.yaml"],
        ["import", "folder", EVIL, "--out", "x.csv"],
        ["import", "checkpoint", f"{EVIL}.pt", "--out", EVIL],
        [EVIL],
        ["--" + EVIL],
    ],
    ids=range(13),
)
def test_no_command_passes_an_escape_to_a_terminal(project, arguments):
    arguments = [argument.replace("\x00", "") for argument in arguments]
    written = at_a_terminal([sys.executable, "-m", "pipeline.cli", *arguments], project)
    assert written
    assert not COMMANDS.search(terminal.COLOUR.sub("", written)), repr(written)


def test_what_a_library_writes_by_itself_can_only_colour():
    code = (
        "import sys, warnings, logging; from pipeline.core import terminal; terminal.guard();"
        f"evil = {EVIL!r}; warnings.warn(evil); logging.error(evil); print(evil);"
        "sys.stderr.write('\\x1b[1;32mgreen\\x1b[0m' + evil); raise ValueError(evil)"
    )
    written = at_a_terminal([sys.executable, "-c", code], ROOT)
    assert "\x1b[1;32mgreen\x1b[0m" in written and written.count("reversed") >= 4
    assert not COMMANDS.search(terminal.COLOUR.sub("", written)), repr(written)


def test_a_program_reads_the_very_text(project):
    command = [sys.executable, "-m", "pipeline.cli", "query", "SELECT caption FROM images"]
    done = subprocess.run([*command, "--format", "json"], capture_output=True, cwd=project)
    assert json.loads(done.stdout) == {"caption": EVIL}


def test_nothing_else_of_this_project_writes_to_a_terminal():
    allowed = {"pipeline/core/terminal.py"}
    for path in sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/*.py")]):
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            if name not in allowed and isinstance(node, ast.Call):
                said = ast.unparse(node.func)
                assert said not in ("print", "typer.echo", "typer.secho"), f"{name}:{node.lineno}"
                assert not re.fullmatch(r"sys\.std(out|err)\.write(lines)?", said), name
