"""The README is a contract: its commands exist and parse, its blocks run, its columns are the shards'."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from pipeline.cli import app
from pipeline.core.config import SECTIONS
from pipeline.data import runs, shards

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = (ROOT / "docs/commands.md").read_text()
COLUMNS = (ROOT / "docs/columns.md").read_text()
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", README, re.DOTALL)
QUERIES = [
    " ".join(sql.split())
    for kind, block in BLOCKS
    for sql in re.findall(r'pipeline query "(.*?)"\n', block, re.DOTALL)
]
DATA = "data"  # as the README names it


def commands() -> set[str]:
    """Every command of the command line; those of a group as `import NAME`."""
    found = set()
    for name, command in get_command(app).commands.items():
        inside = getattr(command, "commands", None)
        found |= {f"{name} {n}" for n in inside} if inside else {name}
    return found


def shown() -> list[list[str]]:
    """Every `pipeline ...` of a sh block, as words, queries aside."""
    lines = [
        piece.split(" #")[0].strip()
        for kind, block in BLOCKS
        for line in block.splitlines()
        for piece in line.split("&&")
        if kind == "sh"
    ]
    return [
        shlex.split(line)[1:]
        for line in lines
        if line.startswith("pipeline ") and not line.startswith("pipeline query")
    ]


def test_every_command_is_in_the_table():
    table = "\n".join(line for line in COMMANDS.splitlines() if line.startswith("| `pipeline"))
    for command in commands():
        words = command.split()
        assert re.search(rf"`pipeline {words[0]}\b", table), command
        assert words[-1] in table, command


def test_every_command_that_is_named_exists():
    text = README + COMMANDS
    named = set(re.findall(r"(?:`|^|&& )pipeline ([a-z][a-z-]+)", text, re.MULTILINE))
    assert named <= {command.split()[0] for command in commands()}
    assert named >= {name.replace("_", "-") for name in SECTIONS}


@pytest.mark.parametrize("words", shown(), ids=" ".join)
def test_every_command_line_of_the_readme_parses(words):
    """The options and arguments exist; click's own parser is the judge, and nothing is run."""
    command = get_command(app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, list(words))


@pytest.mark.parametrize("sql", QUERIES, ids=range(len(QUERIES)))
def test_every_question_of_the_readme_has_an_answer(sql, finished_world, capsys):
    from pipeline.explore.query import print_answer

    print_answer(finished_world, sql.replace(r"\"", '"'), "csv")
    assert capsys.readouterr().out.count("\n") >= 1


def test_there_are_questions():
    assert len(QUERIES) >= 7


def test_duckdb_alone_reads_the_shards_as_the_readme_says(finished_world):
    (line,) = [li for k, b in BLOCKS for li in b.splitlines() if li.startswith("python -c")]
    words = shlex.split(line)
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=finished_world.parent, capture_output=True, text=True
    )
    assert done.returncode == 0 and "view" in done.stdout, done.stderr


def test_every_page_and_file_that_is_linked_exists():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    "name", [f.name for f in (*shards.IMAGES, *shards.SELECTION, *runs.SCHEMA)]
)
def test_every_column_is_in_the_dictionary(name):
    assert f"`{name}`" in COLUMNS


@pytest.mark.parametrize("size", [4])
def test_every_column_of_embeddings_is_in_the_dictionary(size):
    for schema in (shards.teacher_schema(size), shards.texts_schema(size)):
        assert all(f"`{name}`" in COLUMNS for name in schema.names)


def test_every_status_is_explained():
    from pipeline.fetch.forget import JUDGED
    from pipeline.fetch.policy import STATUSES

    assert all(
        f"`{status}`" in COLUMNS
        for status in {*STATUSES, *JUDGED, "ok", "duplicate_url", "empty_url"}
    )


def test_help_teaches_every_stage():
    for stage in SECTIONS:
        command = [sys.executable, "-m", "pipeline.cli", stage.replace("_", "-"), "--help"]
        said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        assert "data/" in said
