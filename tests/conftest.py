"""Fixtures that more than one test file uses."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from support import worlds
from support.finished import finished_world  # noqa: F401  (a fixture)

# A background shell starts its jobs with SIGINT ignored, and so would be every process that a test
# starts and then interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real photos, real CLIP vectors and parity fixtures, named by EXTRAHEAD_SHARED.

    Absent elsewhere: tests that need it skip. In CI a missing folder is a failure, not a skip.
    """
    folder = os.environ.get("EXTRAHEAD_SHARED")
    if folder and Path(folder).is_dir():
        return Path(folder)
    reason = f"EXTRAHEAD_SHARED={folder!r} names no folder with photos and reference vectors"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> Path:
    """Card of a real open_clip model, 32 px, embedding 32, random weights."""
    return worlds.write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def small_world(tmp_path_factory, tiny_teacher) -> worlds.World:
    """60 pictures, downloaded and embedded once; copy `data` before you change it.

    Rows 0 to 49 are distinct pictures with captions; 50 to 54 are exact copies of rows 0 to 4 under
    another name; 55 to 59 are nearly rows 5 to 9 (compressed harder). Row 60 is missing on disk, row
    61 has no url, row 62 repeats the url of row 0. Labels: `wide` or `high`.
    """
    from stages.download import download
    from stages.teacher_embed import teacher_embed

    folder = tmp_path_factory.mktemp("world")
    root = folder / "pictures"
    root.mkdir()
    rows = []
    for i in range(60):
        seed = i if i < 50 else i - 50
        width, height = (48, 40) if seed % 3 else (40, 48)
        quality = 60 if i >= 55 else 92
        jpg = worlds.picture(seed, width, height, "JPEG", quality=quality)
        (root / f"{i}.jpg").write_bytes(jpg)
        label = "wide" if width > height else "high"
        rows.append({"url": f"file:{i}.jpg", "caption": f"picture {i}", "label": label})
    rows += [
        {"url": "file:missing.jpg", "caption": "nothing", "label": "wide"},
        {"url": "", "caption": "no url", "label": "wide"},
        {"url": "file:0.jpg", "caption": "again", "label": "wide"},
    ]
    manifest = worlds.write_manifest(folder / "manifest.csv", rows)
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    data = folder / "data"
    download(worlds.download_config(manifest, root), data, processes=1, threads=8)
    teacher_embed(worlds.teacher_config(tiny_teacher, prompts), data, device="cpu", workers=1)
    return worlds.World(root, manifest, tiny_teacher, prompts, data, rows)


@pytest.fixture
def disk(tmp_path):
    """A file system of 32 MB, and a function that leaves only some bytes of it free."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")

    def leave(free: int) -> None:
        with (folder / "filler").open("ab") as file:
            left = shutil.disk_usage(folder).free - free
            file.write(b"\0" * max(0, left))

    yield folder, leave
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
