"""A student by its name on the Hub, over a loopback server; and how little its user must import."""

import hashlib
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from support import students

from pipeline.core.errors import PipelineError
from pipeline.core.records import Preprocessing
from pipeline.models.hub import student_folder
from pipeline.models.student import Student

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HEAVY = {"dvc", "img2dataset", "duckdb", "open_clip", "torchvision", "transformers", "matplotlib"}
LOAD = """
import sys
from pipeline import Student
student = Student.load(sys.argv[1])
print(student.config.embedding_size, sorted({name.split(".")[0] for name in sys.modules}))
"""


@pytest.fixture
def exported(tmp_path) -> Path:
    """A folder as `pipeline export` writes it, as far as the student is concerned."""
    folder = tmp_path / "exported"
    students.small_student(Preprocessing()).save(folder / "student", provenance={})
    return folder


@pytest.fixture
def hub(exported, tmp_path, monkeypatch):
    """A server that answers as the Hub does for user/name: the paths it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            asked.append(self.path)
            head = "/user/name/resolve/main/"
            file = exported / self.path.removeprefix(head)
            found = self.path.startswith(head) and file.is_file()
            body = file.read_bytes() if found else b""
            self.send_response(200 if found else 404)
            if found:
                self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
            elif not self.path.startswith("/user/name/"):
                self.send_header("X-Error-Code", "RepoNotFound")
            else:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield asked
    server.shutdown()


def test_a_student_is_loaded_by_its_name_on_the_hub_and_then_from_the_cache(
    hub, exported, monkeypatch
):
    expected = Student.load(exported).state_dict()
    found = Student.load("user/name").state_dict()
    assert all(found[name].equal(expected[name]) for name in expected)
    assert {path for path in hub if "/resolve/" in path} == {
        "/user/name/resolve/main/student/config.json",
        "/user/name/resolve/main/student/model.safetensors",
    }
    hub.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    Student.load("user/name")
    assert hub == []


def test_a_name_that_the_hub_does_not_know_is_one_sentence(hub):
    with pytest.raises(PipelineError, match="the Hub knows no model of that name"):
        Student.load("user/nobody")


def test_a_model_without_a_student_is_one_sentence(hub, exported):
    (exported / "student/model.safetensors").unlink()
    with pytest.raises(PipelineError, match=r"A model there needs student/config\.json and"):
        Student.load("user/name")


def test_a_hub_that_cannot_be_reached_is_one_sentence(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PipelineError, match="from the Hub it cannot be had"):
        Student.load("user/name")


def test_a_folder_is_never_looked_for_on_the_hub(tmp_path, exported, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert student_folder("data/student") == Path("data/student")  # before `pipeline distill`
    assert student_folder(Path("user/name")) == Path("user/name")
    assert student_folder(exported) == exported / "student"
    assert student_folder(exported / "student") == exported / "student"


def test_who_only_uses_a_student_imports_nothing_of_the_pipelines_heavy_packages(exported):
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(exported)], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    size, loaded = done.stdout.split(" ", 1)
    assert int(size) > 0 and not HEAVY & set(eval(loaded))
