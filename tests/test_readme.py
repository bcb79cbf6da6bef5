"""The README is a contract: its commands exist, its columns are those of the shards."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import app
from pipeline.core.config import SECTIONS
from pipeline.data import runs, shards

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> set[str]:
    """Every command of the command line; those of a group as `import NAME`."""
    from typer.main import get_command

    root = get_command(app)
    groups = {"import": root.commands["import"].commands}
    return root.commands.keys() - groups.keys() | {f"import {n}" for n in groups["import"]}


def test_every_command_is_in_the_readmes_table():
    table = "\n".join(line for line in README.splitlines() if line.startswith("| `pipeline"))
    for command in commands():
        words = command.split()
        assert re.search(rf"`pipeline {words[0]}\b", table), command
        assert words[-1] in table, command


def test_every_command_that_the_readme_shows_exists():
    shown = set(re.findall(r"(?:`|^|&& )pipeline ([a-z][a-z-]+)", README, re.MULTILINE))
    assert shown <= {command.split()[0] for command in commands()}
    assert shown >= set(name.replace("_", "-") for name in SECTIONS)


@pytest.mark.parametrize(
    "name", [f.name for f in (*shards.IMAGES, *shards.SELECTION, *runs.SCHEMA)]
)
def test_every_column_is_in_the_dictionary(name):
    assert f"`{name}`" in README


@pytest.mark.parametrize("size", [4])
def test_every_column_of_embeddings_is_in_the_dictionary(size):
    for schema in (shards.teacher_schema(size), shards.texts_schema(size)):
        assert all(f"`{name}`" in README for name in schema.names)


def test_every_status_is_explained():
    from pipeline.fetch.forget import JUDGED
    from pipeline.fetch.policy import STATUSES

    assert all(
        f"`{status}`" in README
        for status in {*STATUSES, *JUDGED, "ok", "duplicate_url", "empty_url"}
    )


def test_help_teaches_every_stage():
    for stage in SECTIONS:
        command = [sys.executable, "-m", "pipeline.cli", stage.replace("_", "-"), "--help"]
        said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        assert "data/" in said
