"""Nothing stale goes unnoticed: data/ beside params.yaml, and dvc.lock beside the code."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from support import finished, worlds

from pipeline.verify.freshness import message, outdated

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def asked(small_world, tmp_path_factory) -> dict:
    """The parameters by which `finished_world` was made, as params.yaml holds them."""
    return {
        "download": worlds.download_config(small_world.manifest, small_world.root).model_dump(),
        "teacher_embed": worlds.teacher_config(small_world.card, small_world.prompts).model_dump(),
        "select": worlds.select_config().model_dump(),
        "distill": finished.distill_config().model_dump(),
        "evaluate": finished.evaluate_config().model_dump(),
    }


def written(folder: Path, asked: dict, **changes) -> Path:
    """A parameter file with other values of `section__key`."""
    values = json.loads(json.dumps(asked))
    for name, value in changes.items():
        section, key = name.split("__")
        values[section][key] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    return folder / "params.yaml"


def found(params: Path, data: Path, **options) -> dict[str, str]:
    return {one.folder: "; ".join(one.changes) for one in outdated(params, data, **options)}


def run(*words) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *map(str, words)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip


def test_what_was_made_by_the_parameters_is_fresh(finished_world, asked, tmp_path):
    assert found(written(tmp_path, asked), finished_world) == {}


@pytest.mark.parametrize(
    "name,value,folder,said",
    [
        ("download__quality", 80, "images", "download.quality was 95, is 80"),
        ("download__rows_per_shard", 99, "images", "download.rows_per_shard was 21, is 99"),
        ("download__columns", {"label": None}, "images", "download.columns was {}"),
        ("teacher_embed__views", 3, "teacher", "teacher_embed.views was 2, is 3"),
        ("teacher_embed__seed", 7, "teacher", "teacher_embed.seed was 0, is 7"),
        ("teacher_embed__dtype", "bfloat16", "teacher", "teacher_embed.dtype was 'float32'"),
        ("select__test", 0.4, "selection", "select.test was 0.3, is 0.4"),
        ("distill__steps", 5, "student", "distill.steps was 4, is 5"),
        (
            "evaluate__prompts",
            ["x"],
            "evaluation",
            "evaluate.prompts was ['a red circle', 'never embedded']",
        ),
    ],
)
def test_a_changed_parameter_is_named_with_its_folder(
    name, value, folder, said, finished_world, asked, tmp_path
):
    changes = found(written(tmp_path, asked, **{name: value}), finished_world)
    assert list(changes) == [folder] and said in changes[folder]


def test_a_key_inside_a_group_is_named_alone(finished_world, asked, tmp_path):
    student = asked["distill"]["student"] | {"layers": 2}
    params = written(tmp_path, asked, distill__student=student)
    assert found(params, finished_world) == {"student": "distill.student.layers was 1, is 2"}


@pytest.mark.parametrize(
    "name,text,folder",
    [
        ("download__manifest", "url\nfile:1.jpg\n", "images"),
        ("download__forget", "0" * 64 + "\n", "images"),
        ("teacher_embed__prompts", "a green ring\n", "teacher"),
        ("teacher_embed__templates", "a drawing of a {}\n", "teacher"),
        ("evaluate__templates", "a drawing of a {}\n", "evaluation"),
    ],
)
def test_other_contents_of_a_named_file_are_noticed(
    name, text, folder, finished_world, asked, tmp_path
):
    (tmp_path / "other.csv").write_text(text)
    params = written(tmp_path, asked, **{name: str(tmp_path / "other.csv")})
    changes = found(params, finished_world)
    assert list(changes) == [folder] and str(tmp_path / "other.csv") in changes[folder]


@pytest.mark.parametrize("name", ["download__manifest", "teacher_embed__prompts"])
def test_a_file_that_is_not_on_this_machine_is_not_compared(name, finished_world, asked, tmp_path):
    assert found(written(tmp_path, asked, **{name: "/nowhere/x.csv"}), finished_world) == {}


def test_a_manifest_that_only_moved_is_the_same(finished_world, small_world, asked, tmp_path):
    shutil.copy(small_world.manifest, tmp_path / "elsewhere.csv")
    params = written(tmp_path, asked, download__manifest=str(tmp_path / "elsewhere.csv"))
    assert found(params, finished_world) == {}


def test_a_wrong_teacher_card_beside_stored_texts_is_noticed(finished_world, asked, tmp_path):
    other = worlds.write_teacher(tmp_path / "other", seed=1)
    said = found(written(tmp_path, asked), finished_world, card=other)
    assert (
        list(said) == ["teacher"] and str(other) in said["teacher"] and "sha256" in said["teacher"]
    )


def test_a_folder_that_was_made_from_another_selection_is_named(finished_world, asked, tmp_path):
    from stages.select import select

    shutil.copytree(finished_world, tmp_path / "data")
    select(worlds.select_config(test=0.4), tmp_path / "data")
    params = written(tmp_path, asked, select__test=0.4)
    assert found(params, tmp_path / "data") == {
        "student": "it was made from other selection",
        "evaluation": "it was made from other selection",
    }


def test_the_message_is_one_line_with_every_command_once(finished_world, asked, tmp_path):
    params = written(tmp_path, asked, select__test=0.4, distill__steps=5)
    said = message(outdated(params, finished_world))
    assert "\n" not in said
    assert said.endswith("Run `dvc repro`, or `pipeline select && pipeline distill`.")


@pytest.mark.parametrize("stage", ["distill", "evaluate"])
def test_a_stage_refuses_the_old_split_and_leaves_what_was_there(
    stage, finished_world, asked, tmp_path
):
    shutil.copytree(finished_world, tmp_path / "data")
    params = written(tmp_path, asked, select__test=0.4)
    done = run(stage, "--data", tmp_path / "data", "--params", params)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "select.test was 0.3, is 0.4" in done.stderr and "`pipeline select`" in done.stderr
    stamp = json.loads((tmp_path / "data/student/_stamp.json").read_text())
    assert stamp == json.loads((finished_world / "student/_stamp.json").read_text())


def test_a_question_is_answered_with_a_warning_of_one_line(finished_world, asked, tmp_path):
    params = written(tmp_path, asked, select__test=0.4)
    sql = "SELECT count(*) AS n FROM selection"
    done = run("query", sql, "--format", "csv", "--data", finished_world, "--params", params)
    assert done.returncode == 0 and done.stdout.startswith("n\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: data/selection is out of date: select.test was 0.3, is 0.4.")


def test_verify_counts_a_stale_split_as_a_broken_promise(finished_world, asked, tmp_path):
    from pipeline.verify.verify import verify

    assert verify(finished_world, params=written(tmp_path, asked)) == []
    (finding,) = verify(finished_world, params=written(tmp_path, asked, select__test=0.4))
    assert finding.place == "selection" and finding.run == "pipeline select"


def test_imported_vectors_are_compared_with_the_card_alone(
    small_world, tiny_teacher, asked, tmp_path
):
    """Prompts and crops of teacher_embed had no part in them."""
    from pipeline.core.records import Preprocessing
    from pipeline.models.card import read_card
    from stages.import_embeddings import import_embeddings

    data = tmp_path / "data"
    shutil.copytree(small_world.data / "images", data / "images")
    vectors = np.random.default_rng(0).normal(size=(60, 32)).astype(np.float32)
    np.savez(tmp_path / "v.npz", image=[f"{i}.jpg" for i in range(60)], embedding=vectors)
    teacher = read_card(tiny_teacher).named()
    import_embeddings(
        data, tmp_path / "v.npz", teacher=teacher, texts=[], preprocessing=Preprocessing()
    )
    params = written(tmp_path, asked, teacher_embed__views=7, teacher_embed__seed=3)
    assert found(params, data) == {}
    other = worlds.write_teacher(tmp_path / "other", seed=1)
    assert list(found(params, data, card=other)) == ["teacher"]


def md5_of(path: Path) -> str:
    """As DVC has it: of a file's bytes; of a folder's list of files."""
    if path.is_file():
        return hashlib.md5(path.read_bytes()).hexdigest()
    files = sorted(f.relative_to(path) for f in path.rglob("*") if f.is_file())
    rows = [
        {"md5": md5_of(path / file), "relpath": file.as_posix()}
        for file in files
        if "__pycache__" not in file.parts
    ]
    rows.sort(key=lambda row: row["relpath"])
    return hashlib.md5(json.dumps(rows, sort_keys=True).encode()).hexdigest() + ".dir"


@pytest.mark.parametrize("folder", [ROOT, ROOT / "manifests/demo"], ids=["project", "demo"])
def test_the_committed_lock_fits_the_committed_code(folder):
    """Else `make demo` leaves a changed dvc.lock behind where it measures the same."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("needs the git repository: which files are committed")
    names = [ROOT / name for name in tracked.stdout.splitlines()]
    committed = {*names, *(parent for name in names for parent in name.parents)}
    params = yaml.safe_load((folder / "params.yaml").read_text())
    changed = []
    for name, stage in yaml.safe_load((folder / "dvc.lock").read_text())["stages"].items():
        for dep in stage["deps"]:
            path = (folder / dep["path"]).resolve()
            if path in committed:
                changed += [f"{name}: {dep['path']}"] if md5_of(path) != dep["md5"] else []
        for key, value in stage.get("params", {}).get("params.yaml", {}).items():
            now = params
            for part in key.split("."):
                now = now[part]
            changed += [f"{name}: {key} of params.yaml"] if now != value else []
    assert not changed, (
        "dvc.lock was written by other code or parameters. Renew it: `make demo` (or `dvc repro`), "
        "then commit dvc.lock with the code."
    )
