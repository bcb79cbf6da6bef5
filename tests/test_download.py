"""manifest -> data/images with the real img2dataset: no row is lost, nothing is fetched twice,
and however a run ends, the next one ends in the same bytes.
"""

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import server as web
from support import worlds
from support.files import out_bytes

from pipeline.cluster.parts import Share
from pipeline.core.errors import PipelineError
from pipeline.core.plans import store_of
from pipeline.core.provenance import digest
from pipeline.core.store import Store
from pipeline.data import shards
from stages.download import download

ROOT = Path(__file__).parents[1]
REMOTE, LOCAL = 24, 6
GOOD = REMOTE + LOCAL + 1  # one more has boxes
BOXES = '[{"text": "it", "x0": 32, "y0": 16, "x1": 320, "y1": 160}]'
pause = {"s": 0.0}  # before the server answers


def slowly(data: bytes):
    def answer(request):
        request.server.closing.wait(pause["s"])
        web.body(data)(request)

    return answer


@pytest.fixture(scope="module")
def site():
    """Pictures 0.png to 39.png, a page that is none, a page for robots only to look away from."""
    pages = {f"/{i}.png": slowly(worlds.picture(i)) for i in range(40)}
    pages |= {"/page.png": b"<html>", "/robots.txt": b"User-agent: *\nDisallow: /private\n"}
    pages |= {"/private.png": worlds.picture(99), "/original.png": worlds.picture(5, 320, 160)}
    with web.serve(pages) as server:
        yield server


def world_rows(site) -> list[dict]:
    remote = [{"url": site.url(f"/{i}.png"), "caption": f"picture {i}"} for i in range(REMOTE)]
    local = [{"url": f"file:{i}.png", "caption": f"local {i}"} for i in range(LOCAL)]
    odd = {
        site.url("/none.png"): "not_found",
        site.url("/page.png"): "not_an_image",
        site.url("/private.png"): "robots",
        "file:missing.png": "not_found",
        "file:../secret.png": "refused",
        "http://10.0.0.1/x.png": "refused",
        "": "empty_url",
        site.url("/0.png"): "duplicate_url",
    }
    boxed = {"url": site.url("/original.png"), "caption": "picture with a box"}
    rows = remote + local + [{"url": url, "caption": status} for url, status in odd.items()]
    return [row | {"boxes": BOXES} for row in [*rows, boxed]]


def write_pictures(root: Path) -> Path:
    root.mkdir(parents=True)
    for i in range(LOCAL):
        (root / f"{i}.png").write_bytes(worlds.picture(100 + i))
    return root


def run(folder: Path, rows: list[dict], root: Path, **changes) -> dict[str, int]:
    """One download in folder/data; its parameters, but for changes, are those of every other here."""
    manifest = worlds.write_manifest(folder / "manifest.csv", rows)
    config = worlds.download_config(manifest, root, **changes)
    return download(config, folder / "data", processes=1, threads=4)


@pytest.fixture(scope="module")
def world(site, tmp_path_factory):
    """(folder with data/ after one undisturbed run, its rows, the pictures' root)."""
    folder = tmp_path_factory.mktemp("world")
    root = write_pictures(folder / "pictures")
    rows = world_rows(site)
    run(folder, rows, root)
    return folder, rows, root


def out_rows(folder: Path) -> list[dict]:
    paths = sorted((folder / "data/images").glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def requested(site) -> list[str]:
    """Pictures that were asked for since the last call."""
    paths = [path for path in site.paths() if path != "/robots.txt"]
    site.requests.clear()
    return paths


def test_every_row_is_one_row_with_its_status(world):
    folder, rows, _ = world
    found = out_rows(folder)
    assert Counter(r["url"] for r in found) == Counter(r["url"] for r in rows)
    assert len({row["row_id"] for row in found}) == len(rows)
    for row in found:
        fine = row["caption"].startswith(("picture", "local"))
        assert row["status"] == ("ok" if fine else row["caption"]), row["url"]
        assert (row["jpg"] is not None) == fine == (row["error"] is None)
        assert row["attempts"] == (None if row["status"] in ("empty_url", "duplicate_url") else 1)


def test_boxes_follow_the_image_into_its_stored_size(world):
    stored = next(row for row in out_rows(world[0]) if row["caption"] == "picture with a box")
    assert (stored["width"], stored["height"]) == (64, 32)
    assert (stored["original_width"], stored["original_height"]) == (320, 160)
    (found,) = stored["boxes"]
    expected = {"x0": 6.4, "y0": 3.2, "x1": 64.0, "y1": 32.0}
    assert found.pop("text") == "it" and found == pytest.approx(expected, abs=1e-4)
    lost = next(row for row in out_rows(world[0]) if row["caption"] == "not_found")
    assert lost["boxes"] is None


def test_shards_are_sorted_and_hold_one_bucket_each(world):
    for path in (world[0] / "data/images").glob("*.parquet"):
        ids = pq.read_table(path)["image_id"].to_pylist()
        assert ids == sorted(ids)
        assert {int(key[:8], 16) % 2 for key in ids} == {int(path.stem)}


def test_a_second_run_asks_nothing_and_touches_nothing(world, site):
    folder, rows, root = world
    before = {p: p.stat().st_mtime_ns for p in (folder / "data/images").iterdir()}
    requested(site)
    assert run(folder, rows, root)["ok"] == GOOD
    assert not requested(site)
    assert {p: p.stat().st_mtime_ns for p in (folder / "data/images").iterdir()} == before


def test_nothing_of_the_work_is_left_but_the_finished_shards(world):
    """Which the out's files are links to, so that they take no room twice."""
    data = world[0] / "data"
    assert not list((data / ".work/download").iterdir())
    stored = {path.stat().st_ino for path in (data / ".store/images").glob("*.parquet")}
    assert stored == {path.stat().st_ino for path in (data / "images").glob("*.parquet")}


def test_a_changed_manifest_fetches_only_what_is_new_and_equals_a_run_from_scratch(
    world, site, tmp_path
):
    """Added, removed, reordered and edited rows; local files that appear, change and disappear."""
    folder, rows, _ = world
    root = write_pictures(tmp_path / "pictures")
    (root / "1.png").write_bytes(worlds.picture(201))
    (root / "2.png").unlink()
    (root / "missing.png").write_bytes(worlds.picture(202))
    changed = [row for row in rows if row["url"] != site.url("/3.png")]
    changed = [{"url": site.url("/30.png"), "caption": "new", "boxes": ""}, *changed[::-1]]
    changed = [r | {"caption": "edited"} if r["caption"] == "picture 7" else r for r in changed]
    shutil.copytree(folder / "data", tmp_path / "on/data")
    requested(site)
    run(tmp_path / "on", changed, root)
    assert requested(site) == ["/30.png"]
    run(tmp_path / "scratch", changed, root)
    assert len(requested(site)) > REMOTE
    assert out_bytes(tmp_path / "on" / "data/images") == out_bytes(
        tmp_path / "scratch" / "data/images"
    )
    found = {row["url"]: row for row in out_rows(tmp_path / "on") if row["attempts"]}
    assert found[site.url("/7.png")]["caption"] == "edited"
    assert found["file:2.png"]["status"] == "not_found"
    assert found["file:missing.png"]["status"] == "ok"
    before = {row["url"]: row for row in out_rows(folder)}
    assert found["file:1.png"]["sha256"] != before["file:1.png"]["sha256"]


# Interrupted


def started(folder: Path, rows: list[dict], root: Path) -> subprocess.Popen:
    """The command itself, in a process of its own."""
    manifest = worlds.write_manifest(folder / "manifest.csv", rows)
    params = folder / "params.yaml"
    worlds.write_params(params, download=worlds.download_config(manifest, root))
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "pipeline.cli", "download", "--params", params),
            *("--data", folder / "data", "--processes", "1", "--threads", "4"),
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_in_the_middle_goes_on_to_the_same_bytes(world, site, tmp_path, how):
    folder, rows, root = world
    requested(site)
    pause["s"] = 0.5
    try:
        process = started(tmp_path, rows, root)
        store = tmp_path / "data/.store/images"
        assert web.wait_until(lambda: len(list(store.glob("*.parquet"))) == 1, 300)
        os.kill(process.pid, how)
        _, errors = process.communicate(timeout=60)
    finally:
        pause["s"] = 0.0
        process.kill()
    assert process.returncode not in (0, None) and "Traceback" not in errors
    assert not (tmp_path / "data/images").exists()
    (done,) = store.glob("*.parquet")
    first = requested(site)
    assert run(tmp_path, rows, root)["ok"] == GOOD
    again = requested(site)
    asked = {row["url"] for row in pq.read_table(done).to_pylist() if row["attempts"]}
    assert not {site.url(path) for path in again} & asked  # a finished shard is not fetched again
    assert first
    assert out_bytes(tmp_path / "data/images") == out_bytes(folder / "data/images")
    assert not list((tmp_path / "data").rglob("*.partial"))


# Trying again


def test_retry_fetches_what_may_succeed_now_and_nothing_else(tmp_path):
    answers = web.in_turn(web.status(503), web.body(worlds.picture(1)))
    pages = {"/busy.png": answers, "/good.png": worlds.picture(2), "/page.png": b"<html>"}
    with web.serve(pages) as site:
        rows = [{"url": site.url(path), "caption": path} for path in [*pages, "/none.png"]]

        def statuses() -> dict[str, tuple]:
            return {r["caption"]: (r["status"], r["attempts"]) for r in out_rows(tmp_path)}

        expected = {"/good.png": ("ok", 1), "/page.png": ("not_an_image", 1)}
        expected |= {"/none.png": ("not_found", 1)}
        run(tmp_path, rows, tmp_path)
        assert statuses() == expected | {"/busy.png": ("server_error", 1)}
        requested(site)
        run(tmp_path, rows, tmp_path)
        assert not requested(site)
        run(tmp_path, rows, tmp_path, round=1)
        assert requested(site) == ["/busy.png"]
        assert statuses() == expected | {"/busy.png": ("ok", 2)}
        for round in (1, 2):  # asked in this round; nothing that a further one could ask
            run(tmp_path, rows, tmp_path, round=round)
            assert not requested(site)


def test_what_failed_is_asked_once_a_round_however_often_the_manifest_changes(tmp_path):
    pages = {"/busy.png": web.status(503), **{f"/{i}.png": worlds.picture(i) for i in range(4)}}
    with web.serve(pages) as site:
        for count in (1, 2, 3):
            names = ["/busy.png", *(f"/{i}.png" for i in range(count))]
            run(tmp_path, [{"url": site.url(name)} for name in names], tmp_path)
            asked = [f"/{count - 1}.png"] if count > 1 else names
            assert sorted(requested(site)) == sorted(asked)


# Other shards


@pytest.mark.parametrize("rows_per_shard", [7, 1000])
def test_other_shards_of_the_same_rows_cost_no_fetch(world, site, tmp_path, rows_per_shard):
    folder, rows, root = world
    shutil.copytree(folder / "data", tmp_path / "data")
    requested(site)
    assert run(tmp_path, rows, root, rows_per_shard=rows_per_shard)["ok"] == GOOD
    assert not requested(site)
    assert len(list((tmp_path / "data/images").glob("*.parquet"))) == -(
        -len(rows) // rows_per_shard
    )
    run(tmp_path / "scratch", rows, root, rows_per_shard=rows_per_shard)
    assert out_bytes(tmp_path / "data/images") == out_bytes(tmp_path / "scratch" / "data/images")


def test_one_shard_more_rewrites_one_and_keeps_the_files_of_the_others(world, tmp_path):
    _, rows, root = world
    run(tmp_path, rows, root, rows_per_shard=8)  # 5
    before = out_bytes(tmp_path / "data/images")
    run(tmp_path, rows, root, rows_per_shard=7)  # 6: shard 1 is split
    after = out_bytes(tmp_path / "data/images")
    assert len(after) == len(before) + 1
    changed = {name for name in before if before[name] != after[name]}
    (new,) = set(after) - set(before)
    # the urls have a port of their own in each run: once in a while no row of shard 1 moves
    moved = pq.read_metadata(tmp_path / "data/images" / new).num_rows
    assert changed == ({"00001.parquet", "_stamp.json"} if moved else {"_stamp.json"})


def test_an_image_stays_when_its_host_is_gone(tmp_path):
    with web.serve({f"/{i}.png": worlds.picture(i) for i in range(6)}) as site:
        rows = [{"url": site.url(f"/{i}.png"), "caption": "a"} for i in range(6)]
        assert run(tmp_path, rows, tmp_path) == {"ok": 6}
    edited = [row | {"caption": "b"} for row in rows]
    for changes in ({}, {"rows_per_shard": 2}, {"timeout": 2.0}, {"round": 1}):
        assert run(tmp_path, edited, tmp_path, **changes) == {"ok": 6}


def test_stricter_limits_judge_stored_images_again_as_a_fetch_would(world, site, tmp_path):
    """One by its pixels, some by their bytes, both as they were fetched; nothing is asked again."""
    folder, rows, root = world
    sizes = sorted(row["original_bytes"] for row in out_rows(folder) if row["status"] == "ok")
    stricter = {"max_bytes": sizes[len(sizes) // 2], "max_pixels": 50_000}
    shutil.copytree(folder / "data", tmp_path / "data")
    requested(site)
    run(tmp_path, rows, root, **stricter)
    # failures are asked again under other rules, images are not
    assert not {f"/{i}.png" for i in range(REMOTE)} & set(requested(site))
    run(tmp_path / "scratch", rows, root, **stricter)
    assert out_rows(tmp_path) == out_rows(tmp_path / "scratch")
    assert Counter(row["status"] for row in out_rows(tmp_path))["too_large"] > 3


@pytest.mark.parametrize("lost", ["images", ".store"])
def test_either_of_the_out_and_the_store_brings_the_other_back(world, site, tmp_path, lost):
    folder, rows, root = world
    shutil.copytree(folder / "data", tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / lost)
    requested(site)
    run(tmp_path, [*rows, {"url": site.url("/31.png"), "caption": "new", "boxes": ""}], root)
    assert requested(site) == ["/31.png"]


def test_a_run_that_died_is_still_there_after_another_was_published(world, site, tmp_path):
    folder, rows, root = world
    commit, finished = Store.commit, []

    def one_alone(*arguments):
        if finished:
            raise KeyboardInterrupt
        finished.append(commit(*arguments))
        return finished[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "commit", one_alone)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, rows, root)
    assert run(tmp_path, rows, root, quality=80)["ok"] == GOOD
    requested(site)
    run(tmp_path, rows, root)
    again = {site.url(path) for path in requested(site)}
    assert out_bytes(tmp_path / "data/images") == out_bytes(folder / "data/images")
    done = pq.read_table(tmp_path / "data/images" / finished[0].name)["url"].to_pylist()
    assert again and not again & set(done)


def test_a_damaged_file_is_never_taken_for_what_it_was(world, site, tmp_path):
    """Out and store share their bytes: damage is in both, and is noticed by the file's time."""
    folder, rows, root = world
    shutil.copytree(folder / "data", tmp_path / "data")
    for path in (tmp_path / "data/.store/images").glob("*.parquet"):
        (tmp_path / "data/images" / f"{path.name[:5]}.parquet").unlink()
        os.link(path, tmp_path / "data/images" / f"{path.name[:5]}.parquet")
    with (tmp_path / "data/images/00000.parquet").open("r+b") as file:
        file.seek(1000)
        file.write(b"X")
    shutil.rmtree(tmp_path / "data/images")  # as every message about damage advises
    requested(site)
    run(tmp_path, rows, root)
    assert out_bytes(tmp_path / "data/images") == out_bytes(folder / "data/images")
    assert 0 < len(requested(site)) < REMOTE


# Refusals


def test_not_one_image_is_an_error_that_says_what_was_found(tmp_path):
    rows = [{"url": "", "caption": "a"}, {"url": " ", "caption": "b"}]
    for _ in range(2):  # the second run finds it published, and says so again
        with pytest.raises(PipelineError, match="not one image could be had: 2 empty_url"):
            run(tmp_path, rows, tmp_path)
    assert len(out_rows(tmp_path)) == 2


def test_unexpected_files_in_the_out_are_refused_before_anything_is_fetched(world, site, tmp_path):
    (tmp_path / "data/images").mkdir(parents=True)
    (tmp_path / "data/images/holiday.jpg").write_bytes(b"mine")
    requested(site)
    with pytest.raises(PipelineError, match=r"holiday\.jpg"):
        run(tmp_path, world[1], world[2])
    assert not requested(site)
    assert (tmp_path / "data/images/holiday.jpg").read_bytes() == b"mine"


# What stands beside an image


def grey(path: Path, values: np.ndarray, mode: str | None = None) -> None:
    Image.fromarray(values.astype(np.uint8)).convert(mode).save(path)


def test_licence_mask_expected_hash_and_byte_count_stand_beside_the_image(tmp_path):
    """The mask is of the stored size, each pixel one of its indices; a bad one costs itself."""
    indices = np.repeat(np.repeat(np.arange(20).reshape(4, 5), 20, axis=0), 20, axis=1)  # 80 x 100
    grey(tmp_path / "good.png", indices)
    grey(tmp_path / "small.png", indices[:10])
    grey(tmp_path / "colours.png", indices, "RGB")
    photo = worlds.picture(1, 100, 80)
    rows = []
    for name in ("good", "small", "colours", "missing"):
        (tmp_path / f"{name}.jpg").write_bytes(photo)
        row = {"url": f"file:{name}.jpg", "mask": f"file:{name}.png", "license": "CC0"}
        rows.append(row | {"sha256": hashlib.sha256(photo).hexdigest().upper()})
    data = tmp_path / "data"
    manifest = worlds.write_manifest(tmp_path / "manifest.csv", rows)
    config = worlds.download_config(manifest, tmp_path, rows_per_shard=10_000)
    download(config, data, processes=1, threads=2)
    table = shards.read_shard(data / "images/00000.parquet", "download")
    found = {row["url"]: row for row in table.to_pylist()}
    for row in found.values():
        assert row["status"] == "ok" and row["license"] == "CC0"
        assert row["original_bytes"] == len(photo)
        assert row["sha256_expected"] == row["sha256_original"]
    good = found["file:good.jpg"]
    stored = np.asarray(Image.open(io.BytesIO(good["mask"])))
    assert stored.shape == (good["height"], good["width"]) == (32, 40)
    np.testing.assert_array_equal(np.unique(stored), np.arange(20))
    np.testing.assert_array_equal(stored[::8, ::8], np.arange(20).reshape(4, 5))
    for name, reason in {
        "small": "mask: 100 x 10 px, its image has 40 x 32 or 100 x 80",
        "colours": "mask: mode RGB has no class indices; expected grey or palette",
        "missing": "mask: not_found",
    }.items():
        assert found[f"file:{name}.jpg"]["mask"] is None
        assert found[f"file:{name}.jpg"]["error"].startswith(reason)


def test_a_shard_of_an_earlier_version_is_read_and_nothing_is_fetched_again(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(worlds.picture(1, kind="JPEG"))
    manifest = worlds.write_manifest(tmp_path / "manifest.csv", [{"url": "file:a.jpg"}])
    config, data = worlds.download_config(manifest, tmp_path), tmp_path / "data"
    download(config, data, processes=1, threads=1)
    path = data / "images/00000.parquet"
    table, made = shards.read_shard(path, "download"), shards.provenance(path, "download")
    older = table.drop_columns(["license", "mask", "sha256_expected", "original_bytes"])
    schema = older.schema.remove_metadata()
    store = store_of(data, "download")
    for entry in store.entries():
        store.path(entry).unlink()
    entry = store.commit(
        path.name, digest("of version 1"), 0,
        lambda partial: shards.write_shard(partial, schema, [older], made),
    )  # fmt: skip
    with pytest.raises(PipelineError, match=r"earlier version .*license.* Run `pipeline download`"):
        shards.read_shard(store.path(entry), "download", ["license"])
    shutil.rmtree(data / "images")
    monkeypatch.setattr("pipeline.fetch.image_shards.fetch_lists", None)
    assert download(config, data, processes=1, threads=1) == {"ok": 1}
    again = shards.read_shard(path, "download")
    assert again.schema.names == shards.IMAGES.names
    assert again["jpg"] == table["jpg"] and again["original_bytes"].to_pylist() == [None]


# What was agreed, and what must be forgotten


def local_world(folder: Path, count: int = 6, **changes):
    """Pictures 0.jpg ... below folder, a manifest of them with captions, and what downloads it."""
    table = []
    for i in range(count):
        data = worlds.picture(i, kind="JPEG")
        (folder / f"{i}.jpg").write_bytes(data)
        digest_ = hashlib.sha256(data).hexdigest()
        table.append({"url": f"file:{i}.jpg", "caption": f"caption {i}", "sha256": digest_})
    for i, change in changes.pop("rows", {}).items():
        table[i] |= change
    manifest = worlds.write_manifest(folder / "manifest.csv", table)
    forget = folder / "forget.txt"
    forget.touch()
    values = {"rows_per_shard": 3, "forget": str(forget)} | changes
    return worlds.download_config(manifest, folder, **values), forget


def by_url(data: Path) -> dict[str, dict]:
    tables = [shards.read_shard(p, "download") for p in sorted((data / "images").glob("*.parquet"))]
    return {row["url"] or row["image_id"]: row for t in tables for row in t.to_pylist()}


def test_other_bytes_than_agreed_are_refused_or_kept_and_counted(tmp_path):
    other = {2: {"sha256": "ab" * 32}}
    config, _ = local_world(tmp_path, rows=other)
    data = tmp_path / "data"
    assert download(config, data, processes=1, threads=1) == {"ok": 5, "changed": 1}
    row = by_url(data)["file:2.jpg"]
    assert row["jpg"] is None and row["sha256_expected"] == "ab" * 32
    assert row["sha256_original"] and row["error"].startswith("changed: the manifest names")
    config = config.model_copy(update={"changed": "keep"})
    assert download(config, data, processes=1, threads=1) == {"ok": 6}
    row = by_url(data)["file:2.jpg"]
    assert row["jpg"] is not None and row["error"].startswith("changed: ")


def test_a_forgotten_image_leaves_no_byte_url_or_caption_and_the_rest_is_not_fetched_again(
    tmp_path, monkeypatch
):
    """By url, by image_id and by the SHA-256 of its bytes."""
    config, forget = local_world(tmp_path)
    data = tmp_path / "data"
    download(config, data, processes=1, threads=1)
    before = by_url(data)
    gone = [before[f"file:{i}.jpg"] for i in (0, 1, 2)]
    forget.write_text(
        f"{gone[0]['url']}\n{gone[1]['image_id']}\n{gone[2]['sha256_original'].upper()}\n"
    )
    monkeypatch.setattr("pipeline.fetch.image_shards.fetch_lists", None)
    assert download(config, data, processes=1, threads=1) == {"ok": 3, "forgotten": 3}
    after = by_url(data)
    for row in gone:
        left = {name: value for name, value in after[row["image_id"]].items() if value}
        assert left.keys() == {"row_id", "image_id", "status", "error"}
    for i in (3, 4, 5):
        assert after[f"file:{i}.jpg"] == before[f"file:{i}.jpg"]
    held = [path.read_bytes() for path in data.rglob("*") if path.is_file()]
    for row in gone:
        for secret in (row["jpg"], row["caption"].encode(), row["url"].encode()):
            assert not any(secret in content for content in held)


def test_a_sha256_to_forget_that_no_image_has_is_said_and_one_that_names_an_image_is_not(
    site, tmp_path, capsys
):
    """Over several shards, when nothing changed, and when all shards are made anew; who was
    forgotten by bytes that were fetched is not asked for again, until the line goes."""
    sent = [hashlib.sha256(worlds.picture(i)).hexdigest() for i in range(40)]
    rows = [{"url": site.url(f"/{i}.png"), "sha256": sent[i] if i == 2 else ""} for i in range(8)]
    forget = tmp_path / "forget.txt"

    def forgetting(*numbers: int) -> tuple[dict, set[int], list[str]]:
        """Rows by status, pictures that were said to be named in vain, what was asked for."""
        forget.write_text("\n".join(sent[i] for i in numbers))
        counts = run(tmp_path, rows, tmp_path, rows_per_shard=2, forget=str(forget))
        notes = [line for line in capsys.readouterr().err.splitlines() if "forgotten (" in line]
        named = {i for i in range(40) for line in notes if sent[i] in line}
        assert len(notes) == len(named)
        return counts, named, sorted(requested(site))

    requested(site)
    expected = {"ok": 6, "forgotten": 2}
    asked = [f"/{i}.png" for i in range(8) if i != 2]  # whose bytes the manifest names
    assert forgetting(1, 2, 20) == (expected, {20}, asked)
    assert forgetting(1, 2, 20) == (expected, {20}, [])
    assert forgetting(1, 2, 20, 21) == (expected, {20, 21}, [])
    assert forgetting(2, 20) == ({"ok": 7, "forgotten": 1}, {20}, ["/1.png"])


def test_what_forget_txt_names_in_vain_is_said_when_all_parts_are_there(
    tmp_path, capsys, monkeypatch
):
    """A part knows its own shards alone, and says nothing of the others'."""
    config, forget = local_world(tmp_path)
    data, vain = tmp_path / "data", "cd" * 32
    download(config, data, processes=1, threads=1)
    stored = by_url(data)["file:4.jpg"]["sha256"]
    forget.write_text(f"{stored}\n{vain}\n")
    monkeypatch.setattr("pipeline.fetch.image_shards.fetch_lists", None)
    for part in range(2):
        download(config, data, processes=1, threads=1, share=Share(part, 2))
    assert vain not in capsys.readouterr().err
    assert download(config, data, processes=1, threads=1) == {"ok": 5, "forgotten": 1}
    said = capsys.readouterr().err
    assert said.count(vain) == 1 and stored not in said


def test_a_disk_that_fills_while_images_arrive_is_named_as_such(disk, tmp_path):
    """By the command itself, on a real full file system; the same command then goes on."""
    folder, leave = disk
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    Image.fromarray(noise).save(file := io.BytesIO(), "JPEG")

    def fill_the_disk(request):
        leave(0)
        web.body(file.getvalue())(request)

    pages = dict.fromkeys([f"/{i}.jpg" for i in range(6)], file.getvalue())
    scripted = pages | {"/3.jpg": fill_the_disk}
    with web.serve(scripted) as server:
        rows = [{"url": server.url(path)} for path in pages]
        manifest = worlds.write_manifest(tmp_path / "manifest.csv", rows)
        config = worlds.download_config(manifest, tmp_path, image_size=400)
        params = worlds.write_params(tmp_path / "params.yaml", download=config)
        command = [sys.executable, "-m", "pipeline.cli", "download", "--processes", "1"]
        command += ["--threads", "1", "--params", params, "--data", folder / "data"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
        assert ended.returncode == 1, ended.stderr
        assert "error: the disk is full (" in ended.stderr, ended.stderr
        assert "Traceback" not in ended.stderr and "ended (" not in ended.stderr
        (folder / "filler").unlink()
        scripted |= pages
        again = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
        assert again.returncode == 0, again.stderr
