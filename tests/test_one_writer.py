"""What the operating system may do to a run: full disks, folders without rights, other processes."""

import errno
import os
import resource
import signal
import subprocess
import textwrap
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from support import server
from support.worlds import run_code

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import lock
from pipeline.core.records import Recipe
from pipeline.core.work import Work
from pipeline.data import shards


@contextmanager
def little_space(folder: Path, size: int):
    """A file system of size bytes mounted on folder; where that is forbidden, a limit per file."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield errno.ENOSPC
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    else:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield errno.EFBIG
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_leaves_no_half_file_and_a_smaller_one_still_fits(tmp_path):
    schema = pa.schema([("jpg", pa.binary())])
    table = pa.table({"jpg": [os.urandom(3_000_000)]})
    with little_space(tmp_path / "small", 1_000_000) as expected:
        work = Work(tmp_path / "small", "stage", tmp_path / "small/out", Recipe())
        work.begin()
        for write in (
            lambda partial: shards.write_shard(partial, schema, [table], {}),
            lambda partial: partial.write_bytes(os.urandom(3_000_000)),
        ):
            with pytest.raises(OSError) as caught:
                work.commit("big", write)
            assert caught.value.errno == expected
            assert not [path for path in work.folder.rglob("*") if path.is_file()]
        work.commit("a", lambda partial: partial.write_text("fits"))
        work.publish(["a"], {})
        assert (work.out / "a").read_text() == "fits"


def test_a_folder_that_may_not_be_written_is_one_message_without_traceback(tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "data").mkdir(mode=0o555)
    code = """
        import os, sys
        import stages.select
        from pipeline import cli
        from pipeline.core.presets import write_preset
        from pathlib import Path
        write_preset("demo", Path("params.yaml"), force=True)
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        sys.argv = ["pipeline", "select"]
        cli.main()
    """
    process = run_code(code, cwd=tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 1 and "Traceback" not in errors
    assert errors.startswith("error:") and "right to write there" in errors


# The lock

HOLDER = """
    import sys, time
    from pathlib import Path
    from pipeline.core.provenance import lock
    with lock(Path(sys.argv[1]), sys.argv[2]):
        Path(sys.argv[1], "held").touch()
        time.sleep(60)
"""


def assert_refused(data: Path, *parts: str) -> None:
    with pytest.raises(PipelineError) as caught, lock(data, "mine"):
        pass
    for part in (*parts, str(data)):
        assert part in str(caught.value), str(caught.value)


def test_a_second_writer_is_refused_and_told_who_holds_the_data(tmp_path):
    holder = run_code(HOLDER, tmp_path, "distill")
    try:
        assert server.wait_until((tmp_path / "held").exists)
        assert_refused(tmp_path, "distill", f"process {holder.pid}")
    finally:
        holder.kill()
        holder.communicate()
    with lock(tmp_path, "mine"):  # the kernel let go of it
        assert "mine" in (tmp_path / ".work/lock").read_text()


def test_a_process_left_behind_by_its_killed_parent_still_holds_the_data(tmp_path):
    """As a stage after `kill -9` of dvc."""
    parent = run_code(
        """
        import subprocess, sys
        subprocess.Popen([sys.executable, "-c", sys.argv[3], *sys.argv[1:3]]).wait()
        """,
        tmp_path,
        "download",
        textwrap.dedent(HOLDER),
    )
    assert server.wait_until((tmp_path / "held").exists)
    (child,) = psutil.Process(parent.pid).children()
    parent.kill()
    try:
        assert_refused(tmp_path, "download", f"process {child.pid}")
    finally:
        child.kill()
        parent.communicate()
    assert server.wait_until(lambda: not child.is_running())
    with lock(tmp_path, "mine"):
        pass


def test_a_lock_that_was_let_go_says_nothing_about_its_last_holder(tmp_path):
    with lock(tmp_path, "a stage with a long name"):
        pass
    with lock(tmp_path, "b"):
        assert_refused(tmp_path, "b (process")
        assert "long name" not in (tmp_path / ".work/lock").read_text()


def test_a_file_as_data_folder_is_refused(tmp_path):
    (tmp_path / "data").write_text("")
    with (
        pytest.raises(PipelineError, match="a file is in the way"),
        lock(tmp_path / "data", "stage"),
    ):
        pass
