"""Paid for once: through real DVC, what a clone pulled, a cache holds or a retry brought is neither
fetched nor embedded again.
"""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from support import object_store, worlds
from support import server as web
from support.checkout import ROOT, Checkout

from pipeline.core.dvc_cache import locks_other_images
from pipeline.core.errors import PipelineError
from pipeline.core.presets import write_preset
from pipeline.core.provenance import stamp_of
from pipeline.fetch.retry import begin_round

COUNT = 12


def write_urls(checkout: Checkout, urls: list[str]) -> None:
    rows = [{"url": url, "caption": f"picture {url[-6:]}"} for url in urls]
    worlds.write_manifest(checkout.folder / "manifests/urls.csv", rows)


def requested(site) -> list[str]:
    paths = [path for path in site.paths() if path != "/robots.txt"]
    site.requests.clear()
    return paths


def embedded(checkout: Checkout) -> int:
    """Views that the teacher saw in all recorded runs of this checkout; the records go."""
    paths = list((checkout.folder / "data/runs").glob("teacher_embed-*.parquet"))
    metrics = [json.loads(pq.read_table(path)["metrics"][0].as_py()) for path in paths]
    for path in paths:
        path.unlink()
    return sum(found["embedded"] for found in metrics)


def statuses(checkout: Checkout) -> list[str]:
    paths = (checkout.folder / "data/images").glob("*.parquet")
    return sorted(status for path in paths for status in pq.read_table(path)["status"].to_pylist())


def clone(of: Checkout, folder: Path) -> Checkout:
    """What git would bring, and nothing of data/ or of DVC's cache."""
    shutil.copytree(
        of.folder,
        folder,
        ignore=lambda at, names: {"data"} if Path(at) == of.folder else {"cache", "tmp"},
    )
    made = Checkout.__new__(Checkout)
    made.folder = folder
    return made


@pytest.fixture
def site():
    pages = {f"/{i:02}.png": worlds.picture(i) for i in range(COUNT + 5)}
    with web.serve(pages) as server:
        server.pages = pages
        yield server


def with_remote(folder: Path, site, card: Path, store: str = "local") -> Checkout:
    """A checkout whose parameters name COUNT images of the site, and which knows a remote of DVC."""
    folder.mkdir()
    checkout = Checkout(folder)
    write_urls(checkout, [site.url(f"/{i:02}.png") for i in range(COUNT)])
    checkout.set(
        download={
            "manifest": "manifests/urls.csv", "root": "manifests/prompts", "rows_per_shard": 4,
            "image_size": 32, "retries": 0, "timeout": 2.0, "allow": ["127.0.0.0/8"], "store": store,
        },
        teacher_embed={"card": str(card), "batch": 4, "store": store},
    )  # fmt: skip
    checkout.run("dvc", "remote", "add", "--default", "store", str(folder.parent / "remote"))
    return checkout


@pytest.fixture
def first(site, tmp_path, tiny_teacher) -> Checkout:
    """A checkout whose stage one has run and was pushed to a remote."""
    checkout = with_remote(tmp_path / "first", site, tiny_teacher)
    checkout.run("dvc", "repro", "teacher_embed")
    checkout.run("dvc", "push")
    assert len(requested(site)) == COUNT and embedded(checkout) == COUNT
    return checkout


def test_a_clone_pays_for_the_difference_alone_and_a_dead_host_costs_nothing(first, site, tmp_path):
    second = clone(first, tmp_path / "second")
    second.run("dvc", "pull", "download", "teacher_embed")
    write_urls(second, [site.url(f"/{i:02}.png") for i in range(COUNT + 1)])
    second.run("dvc", "repro", "teacher_embed")
    assert requested(site) == [f"/{COUNT}.png"] and embedded(second) == 1

    for folder in (".store", ".work"):  # the cache is enough
        shutil.rmtree(second.folder / "data" / folder)
    site.pages.clear()
    write_urls(second, [site.url(f"/{i:02}.png") for i in reversed(range(COUNT + 1))])
    second.set(download={"rows_per_shard": 7, "timeout": 0.5})
    second.run("dvc", "repro", "teacher_embed")
    assert statuses(second) == ["ok"] * (COUNT + 1)
    assert not requested(site) and embedded(second) == 0


def test_a_cache_that_lost_its_files_is_named_before_anything_is_fetched(first, site, tmp_path):
    second = clone(first, tmp_path / "second")  # nothing pulled
    said = second.run("dvc", "repro", "download")
    assert "note: dvc.lock names data/images" in said and "dvc fetch download" in said
    assert len(requested(site)) == COUNT


def test_a_retry_lasts(site, tmp_path, first):
    """The next repro, a status and the run cache agree with what was retried."""
    answers = web.in_turn(web.status(503), web.body(worlds.picture(99)))
    with web.serve({"/busy.png": answers}) as busy:
        urls = [site.url(f"/{i:02}.png") for i in range(COUNT)]
        write_urls(first, [*urls, busy.url("/busy.png")])
        first.run("dvc", "repro", "download")
        assert statuses(first).count("server_error") == 1
        said = first.run("pipeline", "download", "--retry")
        assert "download.round is 1 now; 1 rows are asked again" in said
        assert statuses(first) == ["ok"] * (COUNT + 1)
        requested(site), requested(busy)
        first.run("dvc", "repro", "download")
        assert statuses(first) == ["ok"] * (COUNT + 1)
        assert "up to date" in first.run("dvc", "status", "download")
        said = first.run("pipeline", "download", "--retry")
        assert "nothing to ask again" in said
        assert "up to date" in first.run("dvc", "status", "download")
        assert not requested(site) and not requested(busy)


# The parameter file


def finished(data: Path, status: str, round: int) -> None:
    """data/images with one row."""
    from pipeline.core.outs import make_stamp
    from pipeline.core.provenance import stored_file, write_json
    from pipeline.core.records import Recipe
    from pipeline.data import shards

    path = data / "images/00000.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = shards.IMAGES.empty_table().from_pylist([{"status": status}], schema=shards.IMAGES)
    shards.write_shard(path, shards.IMAGES, [table], {})
    recipe = Recipe(parameters={"round": round})
    stamp = make_stamp("download", recipe, {path.name: stored_file(path)}, {})
    write_json(path.parent / "_stamp.json", stamp.model_dump())


@pytest.mark.parametrize("preset", ["demo", "clip-vit-b32"])
def test_a_round_is_begun_in_its_line_alone(tmp_path, preset):
    params = tmp_path / "params.yaml"
    write_preset(preset, params, force=False)
    before = params.read_text()
    finished(tmp_path / "data", "timeout", 0)
    begin_round(params, tmp_path / "data")
    changed = [
        (old, new)
        for old, new in zip(before.splitlines(), params.read_text().splitlines(), strict=True)
        if old != new
    ]
    (line,) = [line for line in before.splitlines() if "round: 0" in line]
    assert changed == [(line, line.replace("round: 0", "round: 1"))]


@pytest.mark.parametrize(
    ("status", "round", "said"),
    [("ok", 0, "nothing to ask"), ("timeout", -1, "round 0 goes on"), (None, 0, "no finished")],
)
def test_a_round_is_not_begun_while_one_is_under_way_or_for_nothing(tmp_path, status, round, said):
    params = tmp_path / "params.yaml"
    write_preset("demo", params, force=False)
    before = params.read_text()
    if status:
        finished(tmp_path / "data", status, round)
    assert said in begin_round(params, tmp_path / "data")
    assert params.read_text() == before


def test_a_round_that_cannot_be_written_is_said_and_nothing_is_changed(tmp_path):
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    params = tmp_path / "params.yaml"
    params.write_text(yaml.safe_dump(values, default_flow_style=True))
    before = params.read_text()
    finished(tmp_path / "data", "timeout", 0)
    with pytest.raises(PipelineError, match="Write `round: 1` there yourself"):
        begin_round(params, tmp_path / "data")
    assert params.read_text() == before


@pytest.mark.parametrize("manifest,other", [("demo.parquet", True), ("images.csv", False)])
def test_a_lock_of_another_manifest_is_told_apart(tmp_path, manifest, other):
    """In a fresh clone dvc.lock is the demo's, and nothing of it is missed."""
    locked = {
        "stages": {"download": {"params": {"params.yaml": {"download": {"manifest": manifest}}}}}
    }
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump(locked))
    (tmp_path / "params.yaml").write_text("download: {manifest: images.csv}\n")
    assert locks_other_images(tmp_path / "data") is other
    (tmp_path / "dvc.lock").write_text("no lock")
    assert not locks_other_images(tmp_path / "data")


@pytest.mark.slow
def test_through_dvc_a_clone_pulls_stamps_and_pays_for_one_image(
    site, monkeypatch, tmp_path, tiny_teacher
):
    with object_store.server() as port:
        object_store.named(
            monkeypatch, object_store.ObjectStore(port, f"s3://{object_store.BUCKET}/x")
        )
        through_dvc(site, tmp_path, tiny_teacher)


def through_dvc(site, tmp_path, tiny_teacher) -> None:
    first = with_remote(tmp_path / "first", site, tiny_teacher, "remote")
    first.set(select={"val": 0.4, "test": 0.3})
    first.run("dvc", "repro", "select")
    first.run("dvc", "push")
    assert len(requested(site)) == COUNT
    pushed = [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]
    assert sum(path.read_bytes().startswith(b"PAR1") for path in pushed) == 1  # the selection

    second = clone(first, tmp_path / "second")
    second.run("dvc", "pull", "download", "teacher_embed", "select")
    assert "up to date" in second.run("dvc", "status", "download", "teacher_embed", "select")
    write_urls(second, [site.url(f"/{i:02}.png") for i in range(COUNT + 1)])
    second.run("dvc", "repro", "select")
    assert requested(site) == [f"/{COUNT}.png"] and embedded(second) == 1

    second.set(download={"store": "local"}, teacher_embed={"store": "local"})
    names = ("images", "teacher", "selection")
    stamps = [stamp_of(second.folder / "data", name) for name in names]
    assert "'select' didn't change" in second.run("dvc", "repro", "select")
    assert not requested(site) and embedded(second) == 0
    assert len(list((second.folder / "data/images").glob("*.parquet"))) > 1
    assert stamps == [stamp_of(second.folder / "data", name) for name in names]
