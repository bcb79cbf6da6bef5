"""Real DVC beside the stages: what it deletes while one runs, and outs that are symbolic links."""

import shutil

import pytest
from support import worlds
from support.checkout import small
from support.files import digests
from support.server import wait_until

READERS = (
    ("query", "SELECT count(*) AS n FROM images JOIN teacher USING (image_id) JOIN texts USING (image_id)"),
    ("search", "a red circle", "-k", "3"),
    ("verify", "--recompute", "0.2"),
    ("export", "exported"),
)  # fmt: skip


@pytest.mark.slow
def test_dvc_repro_beside_a_running_distill_takes_nothing_away(tmp_path, tiny_teacher):
    checkout = small(tmp_path, tiny_teacher)
    checkout.set(distill={"steps": 300, "validate_every": 20})
    data = checkout.folder / "data"
    checkout.run("dvc", "repro", "select")
    shutil.copytree(data, checkout.folder / "undisturbed")
    checkout.run("pipeline", "distill", "--data", "undisturbed")

    running = checkout.start("pipeline", "distill")
    assert wait_until(lambda: list((data / ".work/distill").glob("*/checkpoint.pt")), 240)
    (tmp_path / "manifests/pictures/new.jpg").write_bytes(worlds.picture(1000, kind="JPEG"))
    checkout.set(download={"quality": 50})
    said = checkout.run("dvc", "repro", "download", ok=False)
    assert "distill (process" in said  # who holds data/
    assert not (data / "images").exists() and running.poll() is None  # gone while it is read
    output, _ = running.communicate(timeout=300)
    assert running.returncode == 0, output
    assert digests(data / "student") == digests(checkout.folder / "undisturbed/student")
    checkout.run("dvc", "repro", "download")
    assert digests(data / "images") != digests(checkout.folder / "undisturbed/images")


@pytest.mark.slow
def test_every_reader_takes_outs_that_are_symbolic_links(tmp_path, tiny_teacher):
    """DVC's cache type symlink: each stage of a repro reads what DVC has linked before it."""
    checkout = small(tmp_path, tiny_teacher)
    checkout.run("dvc", "config", "cache.type", "symlink")
    checkout.run("dvc", "repro", "evaluate")
    outs = [path for folder in ("images", "teacher", "selection", "student")
            for path in (checkout.folder / "data" / folder).rglob("*.*")]  # fmt: skip
    assert len(outs) > 10 and all(path.is_symlink() for path in outs)
    for command in READERS:
        said = checkout.run("pipeline", *command)
        assert "60" in said if command[0] == "query" else said
    assert (checkout.folder / "search.png").is_file()
    checkout.set(select={"where": "width > 10"}, evaluate={"prompts": ["a blue square"]})
    checkout.run("dvc", "repro", "evaluate")
    assert checkout.run("pipeline", "verify")
