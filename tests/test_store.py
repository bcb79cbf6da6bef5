"""A store never overwrites, trusts nothing that was touched, and forgets only what was superseded."""

import errno
import os
import shutil
import time
from pathlib import Path

import pytest
from support.plans import FOLDER, NAMES, STAGE, Maker, origins, plan_of, put, run, texts
from support.worlds import run_code
from typer.testing import CliRunner

from pipeline import cli
from pipeline.core import outs
from pipeline.core.layout import STAMP_FILE
from pipeline.core.plans import (
    bring_in,
    carry_out,
    finished,
    publish,
    scratch_folder,
    store_of,
    unneeded,
)
from pipeline.core.provenance import PARTIAL, file_digest, read_stamp
from pipeline.core.store import Store, entry_of, may_live, process_name

# Names


@pytest.mark.parametrize("name", ["00000.parquet", "images/00012.parquet", "texts/a-b-1.parquet"])
def test_a_stored_name_says_everything_about_its_shard(tmp_path, name):
    store = Store(tmp_path)
    entry = store.commit(name, "a" * 32, 3, lambda path: path.write_text("shard"))
    assert entry_of(entry.stored, 5) == entry and store.entries() == [entry]
    assert entry.sha256 == file_digest(store.path(entry))


def test_what_is_no_shard_is_none(tmp_path):
    store = Store(tmp_path)
    entry = put(store, plan_of(1).parts[0])
    for name in ("notes.txt", f"{entry.stored}.x-1-0{PARTIAL}", f"a{PARTIAL}", "00000.parquet"):
        (tmp_path / name).write_text("")
    assert store.entries() == [entry]


def test_two_who_made_a_shard_leave_two_files_and_every_reader_takes_the_same(tmp_path):
    """The newest round, then the most good rows, then the smaller digest."""
    store, plan = Store(tmp_path), plan_of(1, NAMES[:1])
    (part,) = plan.parts
    entries = [
        put(store, part, round, good, f"{round} {good} {i}")
        for round, good in ((0, 9), (1, 3), (1, 4)) for i in range(2)
    ]  # fmt: skip
    assert len(store.entries()) == 6
    best = min(entries[4:], key=lambda entry: entry.sha256)
    assert finished(plan, store, Maker(plan, store)) == {part.name: best}


WRITER = """
    import sys, time
    from pathlib import Path
    from pipeline.core.store import Store
    def write(path):
        with path.open("w") as file:
            for _ in range(200):
                file.write(sys.argv[2] * 1000)
                file.flush()
        return 1
    Path(sys.argv[1], sys.argv[2]).touch()
    while len(list(Path(sys.argv[1]).glob("?"))) < 2:
        time.sleep(0.001)
    Store(Path(sys.argv[1])).commit("a.parquet", "0" * 32, 0, write)
"""


def test_two_writers_at_once_never_mix_their_bytes(tmp_path):
    writers = [run_code(WRITER, tmp_path, letter) for letter in "xy"]
    for writer in writers:
        _, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors
    store = Store(tmp_path)
    found = {store.path(entry).read_text() for entry in store.entries()}
    assert found == {"x" * 200_000, "y" * 200_000}


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(OSError, match="no space"):
        Store(tmp_path).commit("a.parquet", "0" * 32, 0, fail)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# Trust


def test_a_file_that_was_touched_is_hashed_again_and_removed_where_it_changed(tmp_path):
    store, (same, changed) = Store(tmp_path), plan_of(1).parts
    same, changed = put(store, same), put(store, changed)
    assert store.sound(same) and store.sound(changed)
    os.utime(store.path(same))
    path = store.path(changed)
    with path.open("r+") as file:  # through whatever link
        file.write("X")
    assert store.sound(same) and not store.sound(changed)
    assert not path.exists()
    assert not store.sound(changed)  # one that is not there


def test_a_sound_file_is_not_read_again(tmp_path, monkeypatch):
    store = Store(tmp_path)
    entry = put(store, plan_of(1).parts[0])
    monkeypatch.setattr("pipeline.core.store.file_digest", None)
    assert store.sound(entry)


def test_bytes_from_elsewhere_become_a_link_and_no_second_copy_stays(tmp_path):
    """As those of DVC's cache, which it copies from the out."""
    store = Store(tmp_path / "store")
    entry = put(store, plan_of(1).parts[0])
    cached = shutil.copyfile(store.path(entry), tmp_path / "cached")
    linked = tmp_path / "linked"
    linked.symlink_to(cached)
    assert store.reuse(linked, entry)
    assert os.path.samefile(store.path(entry), cached) and not store.path(entry).is_symlink()
    assert store.sound(entry)
    other = tmp_path / "other"
    other.write_text("other bytes")
    assert not store.reuse(other, entry) and os.path.samefile(store.path(entry), cached)


# Publishing


def test_an_out_is_links_into_the_store_and_hashes_nothing_again(tmp_path, monkeypatch):
    plan, store = plan_of(1), store_of(tmp_path, STAGE)
    entries = carry_out(plan, Maker(plan, store), store, tmp_path)
    monkeypatch.setattr("pipeline.core.store.file_digest", None)
    monkeypatch.setattr("pipeline.core.provenance.file_digest", None)
    stamp = publish(plan, store, tmp_path, entries, {"n": 2})
    assert read_stamp(tmp_path / FOLDER, STAGE) == stamp
    assert texts(tmp_path) == origins(plan)
    for name, file in stamp.files.items():
        assert os.path.samefile(tmp_path / FOLDER / name, store.folder / file.stored)
    assert {p.name for p in (tmp_path / FOLDER).iterdir()} == {*NAMES, STAMP_FILE}


def test_publishing_removes_what_it_superseded_and_nothing_unpublished(tmp_path):
    store = store_of(tmp_path, STAGE)
    died = put(store, plan_of(9).parts[0])  # of a run that was killed
    run(tmp_path, plan_of(1))
    lost = put(store, plan_of(2).parts[1], good=1, text="fewer good rows")
    assert run(tmp_path, plan_of(2)) == NAMES[:1]
    kept = {entry.stored for entry in store.entries()}
    published = {file.stored for file in read_stamp(tmp_path / FOLDER, STAGE).files.values()}
    assert kept == {died.stored} | published and lost.stored in published
    assert run(tmp_path, plan_of(9)) == NAMES[1:]


def test_a_racer_that_lost_goes_with_the_publishing_of_the_one_that_won(tmp_path):
    store, plan = store_of(tmp_path, STAGE), plan_of(1)
    winner, loser = (put(store, plan.parts[0], good=good, text=str(good)) for good in (7, 6))
    run(tmp_path, plan)
    stored = {entry.stored for entry in store.entries()}
    assert winner.stored in stored and loser.stored not in stored


def test_a_retry_makes_again_only_what_is_not_settled(tmp_path):
    run(tmp_path, plan_of(1))
    assert run(tmp_path, plan_of(1, round=1)) == []
    assert run(tmp_path, plan_of(1, round=2), settled=False) == NAMES
    assert {entry.round for entry in store_of(tmp_path, STAGE).entries()} == {2}
    assert run(tmp_path, plan_of(1, round=2), settled=False) == []


@pytest.mark.parametrize("lost", ["out", "store", "both but the cache"])
def test_shards_are_found_wherever_they_still_are(tmp_path, lost, monkeypatch):
    data, plan = tmp_path / "data", plan_of(1)
    run(data, plan)
    if lost == "both but the cache":
        cache = shutil.move(data / FOLDER, tmp_path / "cache")
        files = {path.name: path for path in Path(cache).iterdir()}
        monkeypatch.setattr("pipeline.core.plans.locked_out", lambda *_: ("digest", files))
        shutil.rmtree(data)
    else:
        shutil.rmtree(data / FOLDER if lost == "out" else store_of(data, STAGE).folder)
    assert run(data, plan) == [] and texts(data) == origins(plan)


def test_a_stamp_that_was_damaged_in_the_cache_brings_nothing_in(tmp_path, monkeypatch):
    data, plan = tmp_path / "data", plan_of(1)
    run(data, plan)
    stamp = data / FOLDER / STAMP_FILE
    changed = stamp.read_text().replace('"good', '"bad').replace("00001", "00002")
    stamp.unlink()
    stamp.write_text(changed)
    files = {path.name: path for path in (data / FOLDER).iterdir()}
    monkeypatch.setattr("pipeline.core.plans.locked_out", lambda *_: ("digest", files))
    shutil.rmtree(store_of(data, STAGE).folder)
    bring_in(data, STAGE, store_of(data, STAGE))
    assert store_of(data, STAGE).entries() == []


@pytest.mark.parametrize("step", range(0, 24, 2))
def test_a_run_killed_at_any_step_leaves_one_whole_out_or_none_and_goes_on(tmp_path, step):
    """The process ends without warning at its n-th change of a name on disk."""
    run(tmp_path, plan_of(1))
    code = """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from support import plans, worlds
        worlds.end_at_step(int(sys.argv[3]), "rename", "replace", "link", "rmdir", "mkdir", "unlink")
        plans.run(Path(sys.argv[2]), plans.plan_of(2))
    """
    run_code(code, Path(__file__).parent, tmp_path, step).communicate()
    if (tmp_path / FOLDER).exists():
        value = read_stamp(tmp_path / FOLDER, STAGE).recipe.parameters["value"]
        assert texts(tmp_path) == origins(plan_of(value))
    run(tmp_path, plan_of(2))
    assert texts(tmp_path) == origins(plan_of(2))
    assert not list(tmp_path.rglob("*" + PARTIAL))
    stored = {entry.stored for entry in store_of(tmp_path, STAGE).entries()}
    assert len(stored) == len(NAMES)


def test_shards_are_copied_where_the_file_system_has_no_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    run(tmp_path, plan_of(1))
    shutil.rmtree(tmp_path / FOLDER)
    assert run(tmp_path, plan_of(1)) == [] and texts(tmp_path) == origins(plan_of(1))


# Collecting


def test_only_what_no_published_stamp_names_and_is_old_may_be_collected(tmp_path):
    run(tmp_path, plan_of(1))
    store = store_of(tmp_path, STAGE)
    old, young = (put(store, part) for part in plan_of(9).parts)
    for entry in store.entries():
        if entry != young:
            os.utime(store.path(entry), (time.time() - 15 * 24 * 3600,) * 2)
    assert [entry for _, entry in unneeded(tmp_path, 14)] == [old]
    assert {entry.stored for _, entry in unneeded(tmp_path, 0)} == {old.stored, young.stored}


def test_the_command_names_first_and_deletes_only_when_told(tmp_path):
    run(tmp_path, plan_of(1))
    store = store_of(tmp_path, STAGE)
    left = put(store, plan_of(9).parts[0])

    def collect(*options: str) -> str:
        arguments = ["store", "gc", "--days", "0", "--data", str(tmp_path), *options]
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 0, result.output
        return result.output

    assert left.stored in collect() and "add --delete" in collect()
    assert store.path(left).exists()
    assert "1 shards" in collect("--delete") and not store.path(left).exists()
    assert "nothing to delete" in collect("--delete")
    assert run(tmp_path, plan_of(1)) == []


# Leftovers


def test_of_a_process_elsewhere_only_the_age_is_known():
    assert may_live(process_name(), 1e9)
    assert not may_live(f"{process_name().split('-')[0]}-{2**22 + 1}", 0.0)  # no such number here
    assert may_live("0123456789ab-1", 3600.0) and not may_live("0123456789ab-1", 1e6)


def test_what_a_killed_process_left_half_written_is_swept_and_a_living_ones_is_not(tmp_path):
    store = Store(tmp_path / "store")
    code = """
        import os, sys
        from pathlib import Path
        from pipeline.core.plans import scratch_folder
        from pipeline.core.store import Store
        def half(path):
            path.write_text("half")
            os.kill(os.getpid(), 9)
        with scratch_folder(Path(sys.argv[2]), "download"):
            Store(Path(sys.argv[1])).commit("00000.parquet", "0" * 32, 0, half)
    """
    run_code(code, store.folder, tmp_path).communicate()
    assert len(list(store.folder.rglob("*" + PARTIAL))) == 1
    alive = store.folder / f"00001.parquet.{process_name()}-0{PARTIAL}"
    elsewhere = store.folder / f"00002.parquet.0123456789ab-1-0{PARTIAL}"
    for path in (alive, elsewhere):
        path.write_text("half")
    store.sweep()
    assert set(store.folder.rglob("*" + PARTIAL)) == {alive, elsewhere}
    os.utime(elsewhere, (time.time() - 1e6,) * 2)
    store.sweep()
    assert set(store.folder.rglob("*" + PARTIAL)) == {alive}
    assert len(list((tmp_path / ".work/download").iterdir())) == 1
    with scratch_folder(tmp_path, "download") as mine:
        assert list((tmp_path / ".work/download").iterdir()) == [mine]


def test_links_follow_symbolic_links_to_the_file_itself(tmp_path):
    (tmp_path / "file").write_text("bytes")
    (tmp_path / "symbolic").symlink_to("file")
    outs.link(tmp_path / "symbolic", tmp_path / "hard")
    assert not (tmp_path / "hard").is_symlink() and os.path.samefile(
        tmp_path / "hard", tmp_path / "file"
    )
