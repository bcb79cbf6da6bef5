"""The whole pipeline through DVC, on a small world with a real open_clip teacher of random weights."""

import json
import os
import re
import shutil
import signal
import time

import pytest
from support.checkout import DISTILL, ROOT, Checkout, small
from support.files import digests

README = (ROOT / "README.md").read_text()
STAGE_FOLDERS = ("images", "teacher", "selection", "student", "evaluation")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_teacher) -> Checkout:
    """A checkout in which every stage has run."""
    checkout = small(tmp_path_factory.mktemp("checkout"), tiny_teacher)
    checkout.run("dvc", "repro", "evaluate")
    return checkout


def test_a_second_repro_runs_no_stage(finished):
    output = finished.run("dvc", "repro", "evaluate")
    assert "Running stage" not in output
    assert "up to date" in finished.run("dvc", "status", "evaluate", "--with-deps")


def test_each_command_says_that_there_is_nothing_to_do(finished):
    stage_folders = [finished.folder / "data" / stage_folder for stage_folder in STAGE_FOLDERS]
    before = [digests(stage_folder) for stage_folder in stage_folders]
    for command in ("download", "teacher-embed", "select", "distill", "evaluate"):
        finished.run("pipeline", command)
    assert [digests(stage_folder) for stage_folder in stage_folders] == before


def test_going_back_to_earlier_parameters_comes_from_the_cache(finished):
    first = digests(finished.folder / "data/student")
    finished.set(distill={"steps": 8})
    output = finished.run("dvc", "repro", "distill")
    assert "Running stage 'distill'" in output
    for stage in ("download", "teacher_embed", "select"):
        assert f"Running stage '{stage}'" not in output
    assert digests(finished.folder / "data/student") != first
    finished.set(distill={"steps": DISTILL["steps"]})
    output = finished.run("dvc", "repro", "evaluate")
    assert "Running stage" not in output
    assert digests(finished.folder / "data/student") == first


def test_metrics_and_plots_are_what_dvc_reads(finished):
    shown = json.loads(finished.run("dvc", "metrics", "show", "--json"))
    figures = shown[""]["data"]["data/evaluation/metrics.json"]["data"]
    assert {"value", "floor", "ceiling"} <= figures["fidelity"]["cosine"].keys()
    finished.run("dvc", "plots", "show", "--out", "plots")
    page = (finished.folder / "plots/index.html").read_text()
    assert "val_cosine" in page and "recall" in page


@pytest.mark.slow
def test_an_experiment_of_dvc_runs_what_its_parameters_change_and_is_compared(
    tmp_path, tiny_teacher
):
    checkout = small(tmp_path, tiny_teacher)
    checkout.run("dvc", "config", "core.no_scm", "false")
    shutil.copy(ROOT / ".gitignore", tmp_path)
    for command in (
        ("git", "init", "--quiet"), ("git", "config", "user.name", "somebody"),
        ("git", "config", "user.email", "somebody@example.org"), ("dvc", "repro", "evaluate"),
        ("git", "add", "--all"), ("git", "commit", "--quiet", "--message", "first"),
    ):  # fmt: skip
        checkout.run(*command)
    changed = "distill.learning_rate=0.0001"
    output = checkout.run("dvc", "exp", "run", "evaluate", "--set-param", changed)
    ran = re.findall("Running stage '([a-z_]+)'", output)
    assert ran == ["distill", "evaluate"]
    metrics = json.loads(checkout.run("dvc", "metrics", "diff", "--json"))
    cosine = metrics["data/evaluation/metrics.json"]["fidelity.cosine.value"]
    assert cosine["old"] != cosine["new"]
    assert "0.0001" in checkout.run("dvc", "exp", "show", "--csv")
    plots = checkout.run("dvc", "plots", "diff", "HEAD", "--out", "plots")
    assert "plots" in plots


def test_every_question_of_the_readme_has_an_answer(finished):
    questions = re.findall(r"^pipeline query .*?\"$", README, re.MULTILINE | re.DOTALL)
    assert len(questions) >= 5
    for question in questions:
        assert "rows)" in finished.run("bash", "-c", question), question
    plain = re.search(r"^python -c .*duckdb.*$", README, re.MULTILINE)[0]
    assert "count" in finished.run("bash", "-c", plain)


def test_training_imports_no_teacher_and_opens_only_parquet_and_parameters(finished):
    shutil.rmtree(finished.folder / "data/student")
    program = (
        "import sys, pathlib\n"
        "opened = set()\n"
        "sys.addaudithook(lambda event, arguments: opened.add(str(arguments[0]))\n"
        "    if event == 'open' and isinstance(arguments[0], str) else None)\n"
        "from pipeline.core.config import load_section\n"
        "from stages.distill import distill\n"
        "distill(load_section(pathlib.Path('params.yaml'), 'distill'), pathlib.Path('data'))\n"
        "assert not {'open_clip', 'torchvision', 'img2dataset'} & sys.modules.keys()\n"
        "for path in map(pathlib.Path, opened):\n"
        # a bare name that is not here is one below an open folder, which rmtree walks
        "    here = path.is_absolute() or path.exists()\n"
        "    if here and path.resolve().is_relative_to(pathlib.Path.cwd()) and path.suffix != '.py':\n"
        "        print('opened', path.resolve().relative_to(pathlib.Path.cwd()))\n"
    )
    lines = finished.run("python", "-c", program).splitlines()
    opened = {line.removeprefix("opened ") for line in lines if line.startswith("opened ")}
    kept = ("data/.work/", "data/runs/", "pipeline/", "stages/")  # its own files; its own code
    foreign = {path for path in opened if not path.startswith(kept) and ".parquet" not in path}
    # a stamp says which Parquet files belong together
    assert foreign == {
        "params.yaml",
        *(f"data/{stage_folder}/_stamp.json" for stage_folder in STAGE_FOLDERS[:4]),
    }


STAGES = {  # stage -> the file whose appearance says that the stage is in its middle
    "download": ".store/images/0*.parquet",
    "teacher-embed": ".store/teacher/images/0*.parquet",
    "distill": ".work/distill/*/checkpoint.pt",
    "evaluate": ".work/evaluate/*/index/0*.parquet",
}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
@pytest.mark.parametrize("command", STAGES)
def test_a_stage_ended_in_its_middle_goes_on_to_the_same_bytes(finished, tmp_path, command, how):
    stage = command.replace("-", "_")
    checkout = Checkout(tmp_path)
    shutil.copy(finished.folder / "params.yaml", tmp_path / "params.yaml")
    shutil.copytree(finished.folder / "manifests", tmp_path / "manifests", dirs_exist_ok=True)
    out = {"download": "images", "teacher-embed": "teacher", "distill": "student",
           "evaluate": "evaluation"}[command]  # fmt: skip
    for stage_folder in STAGE_FOLDERS:
        if stage_folder == out:
            break
        shutil.copytree(finished.folder / "data" / stage_folder, tmp_path / "data" / stage_folder)
    process = checkout.start("pipeline", command)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "data").glob(STAGES[command])) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, how)
    process.communicate(timeout=60)
    if process.returncode:  # else the stage was faster than the signal, and its out is judged below
        assert not (tmp_path / "data" / out).exists()
    checkout.run("pipeline", command)
    assert digests(tmp_path / "data" / out) == digests(finished.folder / "data" / out), stage


def test_a_stage_that_a_killed_dvc_left_behind_keeps_others_out(finished, tmp_path, tiny_teacher):
    checkout = small(tmp_path, tiny_teacher)
    for stage_folder in ("images", "teacher", "selection"):
        shutil.copytree(finished.folder / "data" / stage_folder, tmp_path / "data" / stage_folder)
    checkout.set(distill={"steps": 100_000, "validate_every": 100_000})
    parent = checkout.start("dvc", "repro", "--single-item", "distill")
    lock = tmp_path / "data/.work/lock"
    deadline = time.monotonic() + 120
    while not (lock.is_file() and "distill" in lock.read_text()):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    os.kill(parent.pid, signal.SIGKILL)
    try:
        refusal = checkout.run("pipeline", "select", ok=False)
        assert "in use by distill (process" in refusal and "Traceback" not in refusal
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while "in use" in checkout.run("pipeline", "select", "--params", "nowhere.yaml", ok=False):
        assert time.monotonic() < deadline
    checkout.run("pipeline", "select")
