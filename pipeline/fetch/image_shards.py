"""One shard of data/images: rows of a list, each with its image, fetched or reused, or its status.

Nothing here takes a lock or knows of other shards, so that any number of processes may make shards
of one plan at once.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipeline.core.config import DownloadConfig
from pipeline.core.provenance import digest, libraries
from pipeline.core.records import Entry, Part, Plan, Recipe
from pipeline.core.store import Store
from pipeline.core.terminal import say
from pipeline.data import shards
from pipeline.data.earlier import EarlierRows
from pipeline.fetch import decoding, forget, manifest, policy, segmentation_masks
from pipeline.fetch.forget import FORGOTTEN, Forgotten, judged
from pipeline.fetch.img2dataset import RETRYABLE, SIZE, FetchRules, fetch_lists, split_error
from pipeline.fetch.journal import FetchedRow, FetchedRows

STAGE = "download"
JUDGED = (
    *("status", "error", "attempts", "width", "height", "original_width", "original_height"),
    *("original_bytes", "sha256_original", "sha256"),
)
IMAGE_FACTS = (*JUDGED, "jpg")
LISTED = (
    *("row_id", "image_id", "url", "caption", "captions", "label", "license"),
    "sha256_expected",
)  # what a row takes from its manifest as it is
NO_IMAGE = dict.fromkeys(IMAGE_FACTS)
OF_LISTS = {"manifest", "root", "rows_per_shard", "columns", "forget"}  # decide the lists alone
NO_BYTES = {*OF_LISTS, "store"}  # and where shards lie decides nothing
NOT_OF_A_FETCH = {*NO_BYTES, "changed", "round", "image_size", "quality"}


def plan_images(config: DownloadConfig, lists: list[Path], forgotten: Forgotten) -> Plan:
    """The shards that a manifest's lists (NNNNN.parquet) ask for, and the origin of each.

    A shard that keeps its list keeps its origin, however many others there are.
    """
    contents = {path.name: manifest.list_digest(path) for path in lists}
    versions = {"shards": shards.VERSION, "masks": segmentation_masks.VERSION}
    if forgotten.sha256:
        versions["forget"] = forget.VERSION
    judges = {"changed": config.changed, "forgotten": digest(sorted(forgotten.sha256))}
    decides = {"rules": _rules(config), "pixels": _pixels(config), "versions": versions} | judges
    return Plan(
        stage=STAGE,
        recipe=Recipe(
            parameters=config.model_dump(exclude=NO_BYTES),
            versions=versions
            | {
                "manifest": manifest.VERSION,
                "policy": policy.VERSION,
                "pixels": decoding.VERSION,
            },
            inputs={"lists": contents, "forgotten": judges["forgotten"]},
        ),
        parts=tuple(
            Part(name=name, origin=digest(decides | {"list": content}))
            for name, content in contents.items()
        ),
        round=config.round,
    )


def _rules(config: DownloadConfig) -> dict:
    """What decides whether a fetch succeeds."""
    fields = config.model_dump(exclude=NOT_OF_A_FETCH)
    return fields | {"manifest": manifest.VERSION, "policy": policy.VERSION}


def _pixels(config: DownloadConfig) -> dict:
    """What decides the bytes of a stored image."""
    return {
        "image_size": config.image_size,
        "quality": config.quality,
        "pixels": decoding.VERSION,
    }


class ImageShards:
    """How the shards of a plan are made in a store.

    lists: folder of the manifest's lists; scratch: a folder of this run alone.
    """

    def __init__(
        self,
        config: DownloadConfig,
        plan: Plan,
        store: Store,
        lists: Path,
        scratch: Path,
        processes: int,
        threads: int,
        forgotten: Forgotten,
    ):
        self.forgotten = forgotten
        self.config, self.plan, self.store, self.lists = config, plan, store, lists
        self.scratch, self.processes, self.threads = scratch, processes, threads
        self.origins = {part.name: part.origin for part in plan.parts}
        self.tally = Counter()

    def is_settled(self, entry: Entry) -> bool:
        """Whether a shard of an earlier round has nothing that a retry would ask for."""
        statuses = shards.read_shard(self.store.path(entry), STAGE, ["status"])["status"]
        return not RETRYABLE.intersection(statuses.to_pylist())

    def differences(self, entry: Entry) -> list[str]:
        """What an entry of another plan was made with that this plan asks otherwise."""
        asked = {"rules": _rules(self.config), "pixels": _pixels(self.config)}
        asked["list"] = self.plan.recipe.inputs["lists"].get(entry.name)
        return shards.differences(shards.provenance(self.store.path(entry), STAGE), asked)

    def make(self, names: Iterable[str]) -> Iterator[Entry]:
        """Each shard as soon as it is finished and in the store, in no particular order."""
        if not (names := list(names)):
            return
        with TemporaryDirectory(dir=self.scratch) as own:
            yield from self._make(names, Path(own))

    def _make(self, names: Iterable[str], own: Path) -> Iterator[Entry]:
        """own: a folder of this call alone."""
        earlier, wanted, total, batches = self._earlier, own / "wanted", 0, {}
        wanted.mkdir()
        waiting: dict[str, list[dict]] = {}
        for name in names:
            rows = self._rows(name)
            known = earlier.facts(rows, JUDGED)
            missing = [row for row in rows if _has_image(row) and row["image_id"] not in known]
            total += len(missing)
            if not missing:
                yield self._commit(name, rows, earlier, FetchedRows([]))
                continue
            waiting[name] = missing
            if 2 * sum(map(len, waiting.values())) > self.config.rows_per_shard:
                batches[_write_wanted(wanted, waiting)] = list(waiting)
                waiting = {}
        if waiting:
            batches[_write_wanted(wanted, waiting)] = list(waiting)
        if not batches:
            return
        say(
            f"{STAGE}: {total} images to fetch; img2dataset starts, and the bar moves with every "
            f"{'list' if len(batches) == 1 else f'of the {len(batches)} lists'} that is done.",
            err=True,
        )
        with tqdm(total=total, unit="image", desc=STAGE, smoothing=0.05) as bar:
            for batch, came in fetch_lists(
                wanted,
                own / "raw",
                self._fetch_rules(),
                self.processes,
                self.threads,
                lambda hosts: bar.set_postfix_str(_slow(hosts)),
            ):
                for name in batches[batch]:
                    rows = self._rows(name)
                    yield self._commit(name, rows, earlier, came)
                    bar.update(sum(row["image_id"] in came for row in rows))
                came.delete()

    @cached_property
    def _earlier(self) -> "_EarlierImages":
        return _EarlierImages(self.store, self.config, self.forgotten)

    def _rows(self, name: str) -> list[dict]:
        return pq.read_table(self.lists / name).to_pylist()

    def _fetch_rules(self) -> FetchRules:
        config = self.config
        return FetchRules(
            timeout_s=config.timeout,
            retries=config.retries,
            max_bytes=config.max_bytes,
            max_pixels=config.max_pixels,
            max_redirects=config.max_redirects,
            per_host=config.per_host,
            allow=tuple(config.allow),
            ports=tuple(config.ports),
            root=Path(config.root).resolve(),
            respect_robots=config.robots,
            image_size=config.image_size,
            quality=config.quality,
        )

    def _commit(
        self, name: str, rows: list[dict], earlier: "_EarlierImages", came: FetchedRows
    ) -> Entry:
        """Write one canonical shard: the list's rows, each with its image or its status."""
        made = {
            "stage": STAGE,
            "rules": _rules(self.config),
            "pixels": _pixels(self.config),
            "list": self.plan.recipe.inputs["lists"][name],
            "libraries": libraries("img2dataset", "pillow", "pyarrow"),
        }

        statuses: Counter[str] = Counter()

        def groups() -> Iterator[pa.Table]:
            for start in range(0, len(rows), shards.ROWS_PER_GROUP):
                some = rows[start : start + shards.ROWS_PER_GROUP]
                complete = self._complete(some, earlier, came)
                statuses.update(row["status"] for row in complete)
                yield pa.Table.from_pylist(complete, schema=shards.IMAGES)

        def write(path: Path) -> int:
            shards.write_shard(path, shards.IMAGES, groups(), made)
            return statuses["ok"]

        return self.store.commit(name, self.origins[name], self.plan.round, write)

    def _complete(
        self, rows: list[dict], earlier: "_EarlierImages", came: FetchedRows
    ) -> list[dict]:
        """Rows of a list with their images; an image that img2dataset lost has a status too."""
        facts = earlier.facts(rows, IMAGE_FACTS)
        asked = [row for row in rows if _has_image(row) and row["image_id"] not in facts]
        tried = earlier.attempts(row["image_id"] for row in asked)
        for row in asked:
            key = row["image_id"]
            facts[key] = _facts(came.get(key)) | {"attempts": tried.get(key, 0) + 1}
        return [_row(row, facts, self.config, self.forgotten) for row in rows]


class _EarlierImages:
    """What shards of earlier runs say of images, where they were stored by the same rules."""

    def __init__(self, store: Store, config: DownloadConfig, forgotten: Forgotten):
        self.config, self.rules, self.round = config, _rules(config), config.round
        self.forgotten = forgotten
        files = {}
        newest_first = sorted(store.entries(), key=lambda e: (-e.round, -store.time(e)))
        for entry in filter(store.sound, newest_first):
            made = shards.provenance(store.path(entry), STAGE)
            if made["pixels"] == _pixels(config):
                files[store.path(entry)] = made | {"round": entry.round}
        self.rows = EarlierRows(files, "image_id", STAGE, shards.IMAGES)

    def facts(self, rows: list[dict], columns: Iterable[str]) -> dict[str, dict]:
        """By image_id, what is known of these rows of a list and still true.

        An image that is there stays, whatever became of its host, unless it is larger than is allowed
        now; another robots.txt or URL policy is not asked about it again. A failure stays where the same
        rules led to it, unless it may succeed now and a newer round asks for that.
        """
        asked = {row["image_id"]: row for row in rows if _has_image(row)}
        known: dict[str, dict] = {}
        for made, table in self.rows.find(asked, list(columns)):
            for facts in table.to_pylist():
                key = facts.pop("image_id")
                better = key not in known or (facts["status"] == "ok" != known[key]["status"])
                if better and self._still_true(asked[key], facts, made):
                    known[key] = self._judged(facts) if facts["status"] == "ok" else facts
        return known

    def _judged(self, facts: dict) -> dict:
        """A stored image under today's limits, as far as they can be known without its host."""
        most, pixels = self.config.max_bytes, self.config.max_pixels
        width, height = facts["original_width"], facts["original_height"]
        if (facts["original_bytes"] or 0) > most:
            reason = f"more than {most} bytes"
        elif width * height > pixels:
            reason = f"{width} x {height} px is more than {pixels} px in all"
        else:
            return facts | {"error": None}
        return NO_IMAGE | {"status": "too_large", "error": reason, "attempts": facts["attempts"]}

    def _still_true(self, row: dict, facts: dict, made: dict) -> bool:
        if facts["status"] == "forgotten":  # nobody asks a host again for what may not be kept
            return row["content"] is None and self.forgotten.still_names(facts["error"])
        if not facts["attempts"]:
            return False
        if facts["status"] == "ok":
            local = row["url"][:5].lower() == "file:"
            return not local or row["content"] == facts["sha256_original"]
        if facts["status"] == "changed":  # its bytes were not kept
            agreed = row["sha256_expected"] in (None, facts["sha256_original"])
            return self.config.changed == "refuse" and not agreed
        final = facts["status"] not in RETRYABLE or made["round"] >= self.round
        return final and made["rules"] == self.rules and row["content"] is None

    def attempts(self, keys: Iterable[str]) -> dict[str, int]:
        """How often images were asked for that may still be had."""
        tried: dict[str, int] = {}
        for _, table in self.rows.find(keys, ["status", "attempts"]):
            for row in table.to_pylist():
                if row["status"] in RETRYABLE:
                    tried[row["image_id"]] = max(tried.get(row["image_id"], 0), row["attempts"])
        return tried


def _slow(hosts: dict[str, float]) -> str:
    """For the progress bar: hosts and the seconds that each has cost."""
    return "slowest: " + ", ".join(f"{host} {seconds:.0f} s" for host, seconds in hosts.items())


def _has_image(row: dict) -> bool:
    """False for rows that are settled without a fetch."""
    return not row["forgotten"] and bool(row["url"].strip()) and row["occurrence"] == 0


def _write_wanted(folder: Path, waiting: dict[str, list[dict]]) -> str:
    """One list for the fetcher of what several shards lack: it starts processes every few lists.

    Returns its name, that of its first shard.
    """
    missing = [row for rows in waiting.values() for row in rows]
    missing.sort(key=lambda row: row["url"])  # images inside one file are read in its order
    columns = {name: [row[name] for row in missing] for name in ("image_id", "url")}
    name = next(iter(waiting))
    pq.write_table(pa.table(columns), folder / name)
    return name


def _facts(row: FetchedRow | None) -> dict:
    """A row as img2dataset left it, or none where it lost it -> what we store of it."""
    if row is None or row.status != "success":
        said = row.error_message if row else None
        status, detail = split_error(said or "lost: no row came back")
        return NO_IMAGE | {"status": status, "error": detail}
    assert row.jpg and row.exif, row.url
    return NO_IMAGE | {
        "status": "ok",
        "original_bytes": int(json.loads(row.exif)[SIZE]),
        "sha256_original": row.sha256,
        "sha256": hashlib.sha256(row.jpg).hexdigest(),
        "jpg": row.jpg,
        "width": row.width,
        "height": row.height,
        "original_width": row.original_width,
        "original_height": row.original_height,
    }


def _row(row: dict, known: dict[str, dict], config: DownloadConfig, forgotten: Forgotten) -> dict:
    if row["forgotten"]:
        by_bytes = forgotten.reason(row["content"], row["sha256_expected"])
        facts = NO_IMAGE | {"status": "forgotten", "error": by_bytes or FORGOTTEN}
    elif not row["url"].strip():
        facts = NO_IMAGE | {"status": "empty_url", "error": "the manifest row has no url"}
    elif row["occurrence"]:
        facts = NO_IMAGE | {"status": "duplicate_url", "error": "an earlier row has this url"}
    else:
        expected = row["sha256_expected"]
        facts = judged(known[row["image_id"]], expected, forgotten, config.changed)
    if facts["status"] == "forgotten":
        return {"row_id": row["row_id"], "image_id": row["image_id"], "captions": []} | facts
    made = {name: row[name] for name in LISTED} | facts
    made["boxes"] = _scaled(row["boxes"], facts)
    if row["mask"] and facts["status"] == "ok":
        try:
            made["mask"] = segmentation_masks.stored_mask(row["mask"], Path(config.root), facts)
        except segmentation_masks.MaskError as error:  # the image is good all the same
            made["error"] = f"mask: {error}"
    return made


def _scaled(boxes: list[dict] | None, facts: dict) -> list[dict] | None:
    """Boxes in px of the original image -> px of the stored one."""
    if boxes is None or facts["status"] != "ok":
        return None
    x = facts["width"] / facts["original_width"]
    y = facts["height"] / facts["original_height"]
    scale = {"x0": x, "y0": y, "x1": x, "y1": y}
    return [{"text": b["text"]} | {c: b[c] * s for c, s in scale.items()} for b in boxes]
