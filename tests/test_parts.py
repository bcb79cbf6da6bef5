"""Parts of one plan on any number of processes: the files of one process, whatever happens to them."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support import worlds
from support.files import out_bytes

from pipeline.cluster.parts import Share, parse_share
from pipeline.core.errors import PipelineError
from pipeline.core.plans import store_of

ROOT = Path(__file__).parents[1]
OUTS = {"download": "images", "teacher-embed": "teacher"}
SEED = int(os.environ.get("FAULTS_SEED", "0"))


# Which part


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("0/1", {}, Share(0, 1)),
        ("3/16", {"RANK": "1", "WORLD_SIZE": "2"}, Share(3, 16)),
        ("auto", {"RANK": "1", "WORLD_SIZE": "2"}, Share(1, 2)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, Share(3, 4)),
        (
            "auto",  # --array=1-7:2
            {
                "SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "2",
            },
            Share(2, 4),
        ),
    ],
)  # fmt: skip
def test_a_part_is_a_number_counted_from_zero_and_a_count(monkeypatch, text, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert parse_share(text) == expected


@pytest.mark.parametrize(
    ("text", "environment", "said"),
    [
        ("16/16", {}, "counted from 0"),
        ("1/0", {}, "counted from 0"),
        ("-1/4", {}, "counted from 0"),
        ("3", {}, "counted from 0"),
        ("1/2/3", {}, "counted from 0"),
        ("auto", {}, "SLURM_ARRAY_TASK_ID"),
        ("auto", {"RANK": "2", "WORLD_SIZE": "2"}, "found 2/2"),
        ("auto", {"RANK": "0"}, "found 0/None"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "x", "SLURM_ARRAY_TASK_COUNT": "2"}, "found x/2"),
    ],
)
def test_a_part_that_does_not_exist_is_refused(monkeypatch, text, environment, said):
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PipelineError, match=said):
        parse_share(text)


def test_all_parts_are_the_whole_and_share_nothing():
    names = [f"{i:05}.parquet" for i in range(23)]
    parts = [Share(i, 4).of(names) for i in range(4)]
    assert sorted(chain.from_iterable(parts)) == names
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# What they make


class Bench:
    """Parameters, a data/ before each command, and what one process makes of it."""

    def __init__(self, folder: Path, world: worlds.World):
        self.params = worlds.write_params(
            folder / "params.yaml",
            download=worlds.download_config(world.manifest, world.root, rows_per_shard=13),
            teacher_embed=worlds.teacher_config(world.card, world.prompts),
        )
        self.reference = folder / "reference"
        for command in OUTS:
            self.run(command, self.reference)

    def start(self, command: str, data: Path, *options: str) -> subprocess.Popen:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "pipeline.cli", command, *options),
                *("--params", self.params, "--data", data),
            ],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def run(self, command: str, data: Path, *options: str) -> str:
        process = self.start(command, data, *options)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return output

    def before(self, command: str, data: Path) -> Path:
        if command == "teacher-embed":
            shutil.copytree(self.reference / "images", data / "images")
        return data

    def judge(self, command: str, data: Path) -> str:
        """The plain command publishes what the parts made, byte for byte that of one process; what
        it said."""
        said = self.run(command, data)
        assert out_bytes(data / OUTS[command]) == out_bytes(self.reference / OUTS[command])
        return said


@pytest.fixture(scope="module")
def bench(small_world, tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), small_world)


@pytest.mark.parametrize("command", OUTS)
def test_parts_at_once_make_the_files_of_one_process_and_nothing_is_left_to_do(
    bench, tmp_path, command
):
    """Part 0 even twice."""
    data = bench.before(command, tmp_path / "data")
    parts = [bench.start(command, data, "--part", part) for part in ("0/2", "1/2", "0/2")]
    for process in parts:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and "After all parts" in output, output
    assert not (data / OUTS[command]).exists()
    before = {e.stored for e in store_of(data, command.replace("-", "_")).entries()}
    bench.judge(command, data)
    assert before == {e.stored for e in store_of(data, command.replace("-", "_")).entries()}
    if command == "teacher-embed":
        (record,) = (data / "runs").glob("teacher_embed-*.parquet")
        assert json.loads(pq.read_table(record)["metrics"][0].as_py())["embedded"] == 0


def test_a_part_does_its_part_alone_and_takes_no_lock(bench, tmp_path):
    from pipeline.core.provenance import lock

    data = bench.before("teacher-embed", tmp_path / "data")
    with lock(data, "another stage"):
        bench.run("teacher-embed", data, "--part", "1/3")
    names = sorted(str(p.relative_to(bench.reference / "teacher"))
                   for p in (bench.reference / "teacher").rglob("*.parquet"))  # fmt: skip
    assert sorted(e.name for e in store_of(data, "teacher_embed").entries()) == names[1::3]


def test_parts_of_another_plan_are_not_mixed_in(bench, tmp_path, small_world):
    """A part that ran with other parameters costs its own work, and changes nothing."""
    data = bench.before("teacher-embed", tmp_path / "data")
    right, wrong = bench.params, tmp_path / "wrong.yaml"
    config = worlds.teacher_config(small_world.card, small_world.prompts, seed=7)
    download = worlds.download_config(small_world.manifest, small_world.root, rows_per_shard=13)
    bench.params = worlds.write_params(wrong, download=download, teacher_embed=config)
    try:
        bench.run("teacher-embed", data, "--part", "0/2")
    finally:
        bench.params = right
    said = bench.judge("teacher-embed", data)
    assert "belong to another plan, whose crops.seed differ" in said


@pytest.mark.faults
@pytest.mark.parametrize("number", range(20))
@pytest.mark.parametrize("command", OUTS)
def test_parts_killed_at_random_and_run_again_make_the_files_of_one_process(
    bench, tmp_path, command, number
):
    draw = random.Random(f"{SEED} {command} {number}")
    data = bench.before(command, tmp_path / "data")
    parts = [bench.start(command, data, "--part", f"{part}/2") for part in (0, 1, 0)]
    for process in draw.sample(parts, 2):
        time.sleep(draw.random() * 6)
        os.killpg(process.pid, signal.SIGKILL)
    for process in parts:
        process.communicate(timeout=300)
    again = [bench.start(command, data, "--part", f"{part}/2") for part in (0, 1)]
    for process in again:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    bench.judge(command, data)
