"""Kill it, fill the disk, damage its files, turn back the clock: the same command ends with the
same bytes, or says what is wrong. `pytest -m faults` runs the long ones and prints what it counted.
"""

# a fixture's name is also an argument's

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support import worlds
from support.finished import distill_config, evaluate_config

from pipeline.core.layout import BY_FOLDER, FOLDERS
from pipeline.verify.verify import verify

COMMANDS = {folder: BY_FOLDER[folder].command for folder in FOLDERS}
SIGNALS = [signal.SIGKILL, signal.SIGINT, signal.SIGTERM]
ROUNDS = 5  # per stage
SEED = int(os.environ.get("FAULTS_SEED", "0"))


@pytest.fixture(scope="module")
def counts(request):
    """What was tried and what came of it; printed at the end."""
    counted: Counter = Counter()
    yield counted
    line = ", ".join(f"{number} {what}" for what, number in counted.items())
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\nfaults: {line}")


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def rows(folder: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in folder.rglob("*.parquet"))


class Bench:
    """Parameters, the undisturbed data/, and how long each stage took to make it."""

    def __init__(self, folder: Path, world: worlds.World):
        self.params = worlds.write_params(
            folder / "params.yaml",
            download=worlds.download_config(world.manifest, world.root),
            teacher_embed=worlds.teacher_config(world.card, world.prompts),
            select=worlds.select_config(),
            distill=distill_config(steps=12),
            evaluate=evaluate_config(),
        )
        self.reference, self.seconds = folder / "reference", {}
        for stage_folder in FOLDERS:
            process = self.start(stage_folder, self.reference)
            began = self.at_work(stage_folder, self.reference, process)
            assert self.wait((self.reference / stage_folder).exists, process)
            self.seconds[stage_folder] = time.monotonic() - began
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 0, output

    def start(self, stage_folder: str, data: Path, **how) -> subprocess.Popen:
        command = [sys.executable, "-m", "pipeline.cli", COMMANDS[stage_folder]]
        return subprocess.Popen(
            [*command, "--params", self.params, "--data", data], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            cwd=Path(__file__).parents[1], **how,
        )  # fmt: skip

    @staticmethod
    def wait(condition, process: subprocess.Popen) -> bool:
        """Whether the condition came true before the process ended, or two minutes passed."""
        deadline = time.monotonic() + 120
        while not (true := condition()) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        return true or condition()

    def at_work(self, stage_folder: str, data: Path, process: subprocess.Popen) -> float:
        """When the stage has taken its lock; before, there is nothing to disturb."""
        lock = data / ".work/lock"
        assert self.wait(
            lambda: lock.is_file() and BY_FOLDER[stage_folder].name in lock.read_text(), process
        )
        return time.monotonic()

    def run(self, stage_folder: str, data: Path, **how) -> subprocess.CompletedProcess:
        process = self.start(stage_folder, data, **how)
        try:
            output, _ = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    def before(self, stage_folder: str, data: Path) -> Path:
        """A data/ in which the stage of this folder is the next to run."""
        for source in BY_FOLDER[stage_folder].inputs:
            shutil.copytree(self.reference / source, data / source)
        return data

    def judge(self, stage_folder: str, data: Path, counts: Counter) -> None:
        """The folder against the undisturbed one, counted and asserted."""
        found, expected = digests(data / stage_folder), digests(self.reference / stage_folder)
        different = [name for name in found.keys() | expected if found.get(name) != expected[name]]
        counts["rows lost"] += rows(self.reference / stage_folder) - rows(data / stage_folder)
        counts["files of other bytes"] += len(different)
        assert not different


@pytest.fixture(scope="module")
def bench(small_world, tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), small_world)


@pytest.mark.faults
@pytest.mark.parametrize("number", range(ROUNDS))
@pytest.mark.parametrize("stage_folder", FOLDERS)
def test_a_stage_ended_at_a_random_moment_ends_with_the_same_bytes(
    bench, tmp_path, counts, stage_folder, number
):
    how = SIGNALS[number % len(SIGNALS)]
    moment = random.Random(f"{SEED} {stage_folder} {number}").random() * bench.seconds[stage_folder]
    for tries in range(6):  # until it hits the stage at work: on a busy machine stages vary
        data = bench.before(stage_folder, tmp_path / f"data-{tries}")
        process = bench.start(stage_folder, data)
        bench.at_work(stage_folder, data, process)
        time.sleep(moment / 2**tries)
        process.send_signal(how)
        output, _ = process.communicate(timeout=60)
        if process.returncode:
            break
    counts["rounds of kill -9, Ctrl-C, SIGTERM"] += 1
    counts["of which hit a running stage"] += process.returncode != 0
    assert process.returncode != 0
    assert "error:" not in output
    if (data / stage_folder).exists():  # whole or absent
        assert digests(data / stage_folder) == digests(bench.reference / stage_folder)
    again = bench.run(stage_folder, data)
    assert again.returncode == 0, again.stdout
    bench.judge(stage_folder, data, counts)


@pytest.mark.faults
@pytest.mark.parametrize("free", [0, 64 << 10])
@pytest.mark.parametrize("stage_folder", FOLDERS)
def test_a_full_disk_is_one_message_and_then_the_same_bytes(
    bench, disk, counts, stage_folder, free
):
    folder, leave = disk
    data = bench.before(stage_folder, folder / "data")
    (data / ".work").mkdir(parents=True)
    leave(free)
    ended = bench.run(stage_folder, data)
    counts["rounds of a full disk"] += 1
    if ended.returncode:
        assert "Traceback" not in ended.stdout, ended.stdout
        assert "disk is full" in ended.stdout, ended.stdout
        assert not (data / stage_folder).exists()
    else:
        counts["of which had enough"] += 1
    (folder / "filler").unlink()
    again = bench.run(stage_folder, data)
    assert again.returncode == 0, again.stdout
    bench.judge(stage_folder, data, counts)


@pytest.mark.faults
def test_of_two_commands_at_once_one_works_and_one_is_told_who_does(bench, tmp_path, counts):
    data = bench.before("student", tmp_path / "data")
    both = [bench.start("student", data) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    counts["rounds of two commands at once"] += 1
    assert 0 in [process.returncode for process in both]
    for process, output in zip(both, outputs, strict=True):
        assert process.returncode == 0 or "in use by distill (process" in output
        assert "Traceback" not in output
    bench.judge("student", data, counts)


def damaged(path: Path, draw: random.Random) -> str:
    """Cut a file or flip one of its bits, at a random place."""
    whole = bytearray(path.read_bytes())
    at = draw.randrange(len(whole))
    path.unlink()  # the work folder shares its bytes
    if draw.random() < 0.5:
        path.write_bytes(whole[:at])
        return f"cut at {at}"
    whole[at] ^= 1 << draw.randrange(8)
    path.write_bytes(whole)
    return f"bit flipped at {at}"


def damage_every_file(finished: Path, data: Path, times: int, counts: Counter) -> None:
    shutil.copytree(finished, data)
    draw = random.Random(SEED)
    files = [
        p
        for stage_folder in FOLDERS
        for p in sorted((data / stage_folder).rglob("*"))
        if p.is_file()
    ]
    for path in files:
        for _ in range(times):
            sound = path.read_bytes()
            how = damaged(path, draw)
            found = verify(data)
            counts["files damaged"] += 1
            counts["damages not found"] += not found
            assert found, f"{path.relative_to(data)}, {how}"
            path.write_bytes(sound)
    assert verify(data) == []


def test_every_file_cut_or_flipped_somewhere_is_found(finished_world, tmp_path):
    damage_every_file(finished_world, tmp_path / "data", 1, Counter())


@pytest.mark.faults
def test_every_file_cut_or_flipped_at_twenty_places_is_found(
    finished_world, tmp_path, counts
):  # fmt: skip
    damage_every_file(finished_world, tmp_path / "data", 20, counts)


@pytest.mark.parametrize("clock", [4e9, 1.0], ids=["future", "past"])
def test_a_clock_that_jumps_changes_no_byte(finished_world, tmp_path, monkeypatch, clock):
    from pipeline.training.trainer import Trainer
    from stages.distill import distill

    data = tmp_path / "data"
    for stage_folder in ("images", "teacher", "selection"):
        shutil.copytree(finished_world / stage_folder, data / stage_folder)
    real = Trainer.train_step

    def interrupted(self, batch):
        if self.step == 3:
            raise KeyboardInterrupt
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distill(distill_config(), data, device="cpu", workers=1)
    for path in [data, *data.rglob("*")]:
        os.utime(path, (clock, clock))
    distill(distill_config(), data, device="cpu", workers=1)
    assert digests(data / "student") == digests(finished_world / "student")
