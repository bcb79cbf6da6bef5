"""What a shard costs on Ray beside its work: tasks that do nothing, and `pipeline download --ray` beside
the plain command, on a cluster of this machine, one task at a time.

Run:  unshare --net sh -c 'ip link set lo up && python benchmarks/ray_overhead.py PHOTOS'

(a network of its own, since Ray listens on every address). PHOTOS: a folder of JPEGs, 8 shards of 30.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

from pipeline.cluster.ray import OnRay, Tasks
from pipeline.core.config import load_section
from pipeline.core.presets import write_preset
from pipeline.core.records import Plan, Recipe
from pipeline.core.store import Store
from pipeline.fetch.folder import write_folder_manifest

EMPTY, SHARDS, PHOTOS = 1000, 8, 30
ALL = float(os.cpu_count() or 1)  # processors: what a task asks for


class Nothing:
    """Makes shards of a few bytes."""

    def __init__(self, folder: Path):
        self.store, self.tally = Store(folder), Counter()
        self.plan = Plan(stage="nothing", recipe=Recipe(), parts=())

    def make(self, names):
        for name in names:
            yield self.store.commit(name, "0" * 32, 0, partial(Path.write_text, data=name))


def tasks_that_do_nothing(folder: Path) -> tuple[float, float, float]:
    """Seconds until the first shard; of a further one; of one in this process."""
    names = [f"{i:05}.parquet" for i in range(EMPTY)]
    began, times = time.perf_counter(), []
    for _ in OnRay(Nothing(folder / "ray"), Tasks(ALL, 0.0)).make(names):
        times.append(time.perf_counter() - began)
    began = time.perf_counter()
    list(Nothing(folder / "here").make(names))
    here = (time.perf_counter() - began) / EMPTY
    return times[0], (times[-1] - times[0]) / (EMPTY - 1), here


def downloads(photos: Path, folder: Path) -> dict[str, float]:
    """Seconds of the plain command, and with --ray."""
    chosen = folder / "photos"
    chosen.mkdir()
    for path in sorted(photos.rglob("*.jpg"))[: SHARDS * PHOTOS]:
        shutil.copy(path, chosen)
    params = folder / "params.yaml"
    write_preset("clip-vit-b32", params, force=True)
    config, text = load_section(params, "download"), params.read_text()
    for old, new in [
        (f"manifest: {config.manifest}", f"manifest: {folder / 'photos.csv'}"),
        (f"root: {config.root}", f"root: {chosen}"),
        (f"rows_per_shard: {config.rows_per_shard}", f"rows_per_shard: {PHOTOS}"),
    ]:
        assert old in text
        text = text.replace(old, new)
    params.write_text(text)
    write_folder_manifest(chosen, folder / "photos.csv", None, force=True)
    taken = {}
    for name, options in {"plain": [], "ray": ["--ray", "--ray-cpus", str(ALL)]}.items():
        command = ["download", *options, "--params", params, "--data", folder / name]
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "pipeline.cli", *command], check=True)
        taken[name] = time.perf_counter() - began
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("photos", type=Path)
    with tempfile.TemporaryDirectory() as scratch:
        first, further, here = tasks_that_do_nothing(Path(scratch))
        print(f"first shard after {first:.1f} s; a further one {1000 * further:.0f} ms on Ray, ")
        print(f"{1000 * here:.1f} ms in this process")
        taken = downloads(parser.parse_args().photos, Path(scratch))
        a_shard = (taken["ray"] - first - taken["plain"]) / SHARDS
        print(
            f"download of {SHARDS} shards of {PHOTOS}: {taken}; on Ray {a_shard:.1f} s a shard more"
        )


if __name__ == "__main__":
    main()
