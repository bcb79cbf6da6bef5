"""data/ that may be read and not written: questions are answered, and what would write says so.

Root passes over the modes of files, so the commands run without that right, which no exec of theirs
brings back.
"""

# a fixture's name is also an argument's

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import worlds
from support.finished import distill_config, evaluate_config

from pipeline.core.layout import BY_FOLDER, FOLDERS

LIBC = ctypes.CDLL(None)
DAC_OVERRIDE, DAC_READ_SEARCH, PR_CAPBSET_DROP = 1, 2, 24
STAGES = {folder: BY_FOLDER[folder].command for folder in FOLDERS}


def obey_modes() -> None:
    """Between fork and exec: what root keeps after the exec does not include these two rights."""
    if os.geteuid() == 0:
        for right in (DAC_OVERRIDE, DAC_READ_SEARCH):
            if LIBC.prctl(PR_CAPBSET_DROP, right, 0, 0, 0):
                raise OSError("the right cannot be given up")
        version_3, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        LIBC.capset(version_3, nothing)  # nor does it inherit them


@pytest.fixture(scope="module")
def obedient(tmp_path_factory):
    """Arguments for subprocess; skips where even then a read-only folder can be written."""
    folder = tmp_path_factory.mktemp("probe")
    folder.chmod(0o555)
    how = {"preexec_fn": obey_modes}
    try:
        subprocess.run(["touch", folder / "x"], stderr=subprocess.DEVNULL, **how)
    except subprocess.SubprocessError:
        pytest.skip("this user may neither obey the modes of files nor give up passing over them")
    if (folder / "x").exists():
        pytest.skip("this user writes in read-only folders whatever is done about it")
    return how


def set_modes(folder: Path, directory: int, file: int) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(directory if path.is_dir() else file)


def state(folder: Path) -> dict[str, tuple]:
    """Everything about a folder that a command could change."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.stat().st_mode,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
        )
        for path in [folder, *folder.rglob("*")]
    }


RUN = """
import contextlib, io, json, sys, traceback
from pipeline import cli
for name, arguments in json.load(sys.stdin).items():
    sys.argv = ["pipeline", *arguments]
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            cli.main()
        except SystemExit as ended:
            status = ended.code or 0
        except BaseException:
            status = traceback.format_exc()
    print(json.dumps([name, status, out.getvalue(), errors.getvalue()]), flush=True)
"""


def run(commands: dict[str, list], folder: Path, how: dict) -> dict[str, tuple]:
    """Run commands one after the other, in one process; (status, output, errors) of each."""
    ended = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(commands, default=str), capture_output=True, text=True, timeout=500,
        cwd=folder, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}, **how,
    )  # fmt: skip
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [name for name, *_ in lines] == list(commands), ended.stderr
    return {name: tuple(found) for name, *found in lines}


def write_params(folder: Path, world: worlds.World, **changes: dict) -> Path:
    """The parameters that the finished world was made with, changed in the sections named."""
    sections = {
        "download": worlds.download_config(world.manifest, world.root),
        "teacher_embed": worlds.teacher_config(world.card, world.prompts),
        "select": worlds.select_config(),
        "distill": distill_config(),
        "evaluate": evaluate_config(),
    }
    for name, values in changes.items():
        sections[name] = sections[name].model_copy(update=values)
    return worlds.write_params(folder / "params.yaml", **sections)


@pytest.fixture(scope="module")
def ended(finished_world, small_world, tmp_path_factory, obedient):
    """What came of every command over a read-only data/; data/ before and after them."""
    folder = tmp_path_factory.mktemp("read_only")
    data = shutil.copytree(finished_world, folder / "data")
    params = ["--params", write_params(folder, small_world), "--data", data]
    set_modes(data, 0o555, 0o444)
    before = state(data)
    commands = {
        "query": ["query", "SELECT count(*) AS n FROM images JOIN teacher USING (image_id)"],
        "verify": ["verify", "--recompute", "0.01", "--device", "cpu", *params],
        "search": ["search", "a red circle", *params],
        "look": ["look", small_world.root / "0.jpg", "a red circle", *params],
        "report": ["report", *params],
    }
    commands["query"] += ["--data", data]
    commands |= {stage: [stage, *params] for stage in STAGES.values()}
    source = ["import", "embeddings", folder / "v.npz", "--card", small_world.card, "--data", data]
    found = run(commands | {"import embeddings": source}, folder, obedient)
    after = state(data)
    set_modes(data, 0o755, 0o644)
    return found, before, after


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("query", "(1 rows)"),
        ("verify", "every promise is kept"),
        ("search", "search.png written"),
        ("look", "look.png written"),
        ("report", "report.html written"),
    ],
)
def test_a_question_is_answered_from_a_data_folder_that_cannot_be_written(ended, asked, answer):
    status, output, errors = ended[0][asked]
    assert status == 0, errors or status
    assert answer in output + errors


@pytest.mark.parametrize("asked", [*STAGES.values(), "import embeddings"])
def test_a_command_that_writes_says_in_one_message_where_it_cannot_and_what_to_do(ended, asked):
    status, output, errors = ended[0][asked]
    assert (status, output) == (1, ""), errors
    assert errors.startswith("error:") and errors.count("\n") == 1
    assert "/data/.work/lock'" in errors
    assert "Give this user the right to write there, or choose another --data." in errors


def test_no_command_changed_anything_in_a_read_only_data_folder(ended):
    _, before, after = ended
    assert before == after and len(before) > 20


OTHER = {  # parameters that make the stage work again
    "images": {"download": {"quality": 80}},
    "teacher": {"teacher_embed": {"views": 1}},
    "selection": {"select": {"test": 0.4}},
    "student": {"distill": {"steps": 2}},
    "evaluation": {"evaluate": {"batch": 8}},
}


def only_the_out_is_read_only(
    stage_folder: str, finished: Path, world, folder: Path, how: dict
) -> None:
    """The stage does its work, cannot put it in place, and says so; the old out stays whole."""
    data = shutil.copytree(finished, folder / "data")
    params = write_params(folder, world, **OTHER[stage_folder])
    asked = {"once": [STAGES[stage_folder], "--params", params, "--data", data]}
    set_modes(data / stage_folder, 0o555, 0o444)
    before = state(data / stage_folder)
    status, _, errors = run(asked, folder, how)["once"]
    assert status == 1 and errors.splitlines()[-1].startswith("error:"), (status, errors)
    assert f"'{data / stage_folder}'" in errors and "the right to write there" in errors
    assert state(data / stage_folder) == before
    set_modes(data / stage_folder, 0o755, 0o644)
    status, _, errors = run(asked, folder, how)["once"]
    assert status == 0, errors
    assert state(data / stage_folder) != before


def test_an_out_that_alone_is_read_only_stays_whole_until_it_may_be_replaced(
    finished_world, small_world, tmp_path, obedient
):
    only_the_out_is_read_only("selection", finished_world, small_world, tmp_path, obedient)


@pytest.mark.faults
@pytest.mark.parametrize(
    "stage_folder", [stage_folder for stage_folder in FOLDERS if stage_folder != "selection"]
)
def test_every_out_that_alone_is_read_only_stays_whole_until_it_may_be_replaced(
    finished_world, small_world, tmp_path, obedient, stage_folder
):
    only_the_out_is_read_only(stage_folder, finished_world, small_world, tmp_path, obedient)
