"""The command line: quick to answer, and a user's mistake is one message, never a traceback."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import worlds

from pipeline.core.presets import write_preset

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "torchvision", "open_clip", "duckdb", "pyarrow", "numpy", "PIL", "img2dataset")


def pipeline(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with parameters, a manifest without rows, a picture, and what is in the way."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "pictures").mkdir()
    (folder / "pictures/a.png").write_bytes(worlds.picture(0))
    (folder / "empty").mkdir()
    (folder / "empty.csv").write_text("url,caption\n")
    (folder / "there.csv").write_text("mine")
    (folder / "file").write_text("")
    (folder / "broken.yaml").write_text("download: [")
    manifest = folder / "empty.csv"
    config = worlds.download_config(manifest, folder)
    worlds.write_params(folder / "params.yaml", download=config)
    missing = config.model_copy(update={"manifest": "none.csv"})
    worlds.write_params(folder / "missing.yaml", download=missing)
    write_preset("clip-vit-b32", folder / "own.yaml", force=False)
    return folder


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["download", "--help"], ["distill", "--help"], ["import", "folder", "--help"]],
    ids=" ".join,
)
def test_help_imports_none_of_the_heavy_libraries(arguments, folder):
    code = f"""
import sys
sys.argv = ["pipeline", *{arguments!r}]
from pipeline import cli
try:
    cli.main()
except SystemExit as ended:
    assert ended.code in (0, None), ended.code
print(*sorted(set({HEAVY!r}) & set(sys.modules)), sep=",", file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "Usage" in done.stdout
    assert done.stderr.strip() == ""


def test_a_query_does_not_wait_for_torch(folder):
    code = """
import sys
sys.argv = ["pipeline", "query", "SELECT 42 AS answer"]
from pipeline import cli
try:
    cli.main()
except SystemExit as ended:
    assert not ended.code
print(*sorted({"torch", "open_clip", "img2dataset"} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "42" in done.stdout and done.stderr.strip() == ""


MISTAKES = {
    "init demo": "--force",
    "download --params none.yaml": "pipeline init",
    "download --params empty": "cannot be read",
    "download --params broken.yaml": "not YAML",
    "download --params missing.yaml": "no manifest none.csv",
    "download": "no rows",
    "download --data file": "a file is in the way",
    "download --data file/below": "a file is in the way",
    "select": "pipeline download",
    "query SELEC": "syntax error",
    "query DROP": "syntax error",
    "query 'SELECT 1; SELECT 2'": "exactly one SELECT",
    "query 'SELECT * FROM images'": "Run `pipeline download` first",
    "import folder none --out m.csv --params own.yaml": "is no folder",
    "import folder empty --out m.csv --params own.yaml": "holds no image",
    "import folder pictures --out there.csv --params own.yaml": "exists",
    "import folder pictures --out file/m.csv --params own.yaml": "a file is in the way",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_message_and_status_1(line, folder):
    done = pipeline(*shlex.split(line), cwd=folder)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ") and MISTAKES[line] in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
    assert not list(folder.glob("new.yaml")) + list(folder.glob("m.csv"))


@pytest.mark.parametrize("line", ["teacher-embed", "distill", "evaluate", "distill --device tpu9"])
def test_a_stage_before_its_inputs_names_what_to_run(line, folder):
    done = pipeline(*line.split(), cwd=folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "pipeline " in done.stderr or "--device cpu" in done.stderr


@pytest.mark.parametrize("line", ["nonsense", "query", "download --threads 0", "download --no", ""])
def test_a_wrong_call_is_answered_with_usage_and_status_2(line, folder):
    done = pipeline(*line.split(), cwd=folder)
    assert done.returncode == 2 and "Usage" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


CHOICES = {
    "init nonsense --params new.yaml": ("demo", "clip-vit-b32"),
    "query 'SELECT 1' --format xml": ("table", "csv", "json", "parquet"),
    "search red --format parquet": ("table", "json", "csv"),
    "verify --format csv": ("table", "json"),
    "export model --format xml": ("folder", "onnx"),
}


@pytest.mark.parametrize("line", CHOICES)
def test_a_choice_is_listed_by_help_and_by_the_answer_to_a_wrong_one(line, folder):
    done = pipeline(*shlex.split(line), cwd=folder)
    answer = " ".join(done.stderr.replace("│", " ").split())
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "is not one of " + ", ".join(map(repr, CHOICES[line])) in answer
    described = pipeline(line.split()[0], "--help", cwd=folder).stdout
    assert f"<{'|'.join(CHOICES[line])}>" in described
    assert not (folder / "new.yaml").exists()


def test_help_lists_the_teachers_whose_cards_lie_here():
    names = sorted(path.stem for path in (ROOT / "manifests/teachers").glob("*.yaml"))
    described = pipeline("init", "--help", cwd=ROOT).stdout
    assert all(name in described for name in names)


def test_an_import_prints_what_to_set_next(folder, tmp_path):
    options = "--out", tmp_path / "m.csv", "--params", "own.yaml"
    done = pipeline("import", "folder", "pictures", *options, cwd=folder)
    assert done.returncode == 0 and "1 images" in done.stdout
    assert "download.manifest" in done.stdout and "download.root" in done.stdout
    assert (tmp_path / "m.csv").read_text().startswith("url,caption,label\nfile:a.png")


def test_an_answer_goes_to_standard_output_and_nothing_else_does(small_world, tmp_path):
    shutil.copytree(small_world.data, tmp_path / "data")
    sql = "SELECT status, count(*) AS n FROM images GROUP BY status ORDER BY n DESC, status"
    done = pipeline("query", sql, "--format", "csv", cwd=tmp_path)
    assert done.stdout == "status,n\nok,60\nduplicate_url,1\nempty_url,1\nnot_found,1\n"
    assert not done.stderr


def test_select_tells_what_it_did(small_world, tmp_path):
    shutil.copytree(small_world.data, tmp_path / "data")
    worlds.write_params(
        tmp_path / "params.yaml",
        download=worlds.download_config(small_world.manifest, small_world.root),
        teacher_embed=worlds.teacher_config(small_world.card, small_world.prompts),
        select=worlds.select_config(),
    )
    first = pipeline("select", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("select: ") and "5 left out: duplicate" in first.stdout
    assert pipeline("select", cwd=tmp_path).stdout == first.stdout
