"""manifest -> data/images: every manifest row ends as exactly one row, with an image or a status.

Run:   pipeline download [--retry] [--part 3/16 | --ray]
Cost:  the network, and one decode and encode per image; a killed run loses at most the shards that
       were being fetched. An image that an earlier run holds is not fetched again, in whatever
       shard it lies.
"""

from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pyarrow.compute as pc

from pipeline.cluster.parts import Share
from pipeline.cluster.ray import OnRay, Tasks
from pipeline.core.config import DownloadConfig
from pipeline.core.errors import PipelineError
from pipeline.core.outs import refuse_unexpected
from pipeline.core.plans import carry_out, publish, scratch_folder, store_of
from pipeline.core.provenance import lock, stamp_of
from pipeline.core.terminal import say
from pipeline.data import shards
from pipeline.data.remote_shards import of_each, shards_in
from pipeline.fetch.forget import Forgotten, read_forgotten
from pipeline.fetch.image_shards import ImageShards, plan_images
from pipeline.fetch.listing import listing
from pipeline.fetch.manifest import write_lists
from pipeline.fetch.manifest_urls import check_urls

STAGE = "download"


def download(
    config: DownloadConfig,
    data: Path,
    *,
    processes: int,
    threads: int,
    share: Share | None = None,
    tasks: Tasks | None = None,
) -> dict[str, int]:
    """Fetch what is missing and write data/images; returns rows by status.

    share: fetch only this share of the shards, into the store, beside other processes and without
    the lock; the plain command then finds them and publishes. tasks: fetch on a Ray cluster, in
    tasks that ask for so much.

    Raises PipelineError for a bad manifest, and where no image at all could be had.
    """
    store, out = store_of(data, STAGE, config.store), data / "images"
    with lock(data, STAGE) if share is None else nullcontext(), scratch_folder(data, STAGE) as own:
        forgotten = read_forgotten(Path(config.forget))
        lists = write_lists(
            Path(config.manifest),
            Path(config.root),
            config.rows_per_shard,
            own / "lists",
            columns=dict(config.columns),
            forgotten=forgotten,
            max_bytes=config.max_bytes,
            say=partial(say, err=True),
        )
        check_urls(lists, config, partial(say, err=True))
        plan, listed = plan_images(config, lists, forgotten), listing(config, forgotten)
        if (
            share is None
            and store.has_published(out, STAGE, plan.recipe)
            and listed == _listed(data)
        ):
            paths = shards_in(out)
            _name_unmatched(config, forgotten, paths)
            return _require_images(_statuses(paths))
        refuse_unexpected(out, STAGE)
        maker = ImageShards(config, plan, store, own / "lists", own, processes, threads, forgotten)
        engine = OnRay(maker, tasks) if tasks else maker
        entries = carry_out(plan, engine, store, data, share and share.of)
        paths = [store.path(entry) for entry in entries.values()]
        statuses = _statuses(paths)
        if share is not None:
            return statuses
        _name_unmatched(config, forgotten, paths)
        publish(plan, store, data, entries, {"rows": statuses, "listing": listed})
    return _require_images(statuses)


def _listed(data: Path) -> dict | None:
    """By what data/images was listed."""
    return stamp_of(data, "images").summary.get("listing")


def _statuses(paths: Iterable[Path]) -> dict[str, int]:
    """How many rows of all shards have which status."""

    def of_one(path: Path) -> Counter:
        return Counter(shards.read_shard(path, STAGE, ["status"])["status"].to_pylist())

    counts = sum(of_each(sorted(paths), of_one), Counter())
    return dict(counts.most_common())


def _name_unmatched(config: DownloadConfig, forgotten: Forgotten, paths: Iterable[Path]) -> None:
    """Say which SHA-256 of the list of images to forget name no row of these shards; of its other
    lines the manifest's rows tell."""
    errors = set()
    for path in paths if forgotten.sha256 else ():
        table = shards.read_shard(path, STAGE, ["status", "error"])
        gone = table.filter(pc.field("status") == "forgotten")
        errors.update(gone["error"].unique().to_pylist())
    for digest in forgotten.unmatched(errors):
        say(
            f"{config.forget}: no image has bytes with the SHA-256 {digest}, which are to be "
            "forgotten (one that could not be fetched, or that another line names, may have them).",
            err=True,
        )


def _require_images(statuses: dict[str, int]) -> dict[str, int]:
    if statuses.get("ok"):
        return statuses
    found = ", ".join(f"{count} {status}" for status, count in statuses.items())
    raise PipelineError(
        f'not one image could be had: {found}. `pipeline query "SELECT url, status, error FROM '
        'images"` says why; then mend the manifest, or run `pipeline download --retry`.'
    )
