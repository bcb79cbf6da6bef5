"""manifest -> data/images: every manifest row ends as exactly one row, with an image or a status.

Run:   pipeline download [--retry]
Cost:  the network, and one decode and encode per image; a killed run loses at most the shards that
       were being fetched. Unchanged images are not fetched again when the manifest changes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipeline.core.config import DownloadConfig
from pipeline.core.errors import PipelineError
from pipeline.core.provenance import Work, file_digest, libraries, lock
from pipeline.core.records import Recipe
from pipeline.data import shards
from pipeline.fetch import decoding, manifest, masks, policy
from pipeline.fetch.img2dataset import RETRYABLE, SIZE, FetchRules, fetch_lists, split_error

STAGE = "download"
IMAGE_FACTS = (
    *("status", "error", "attempts", "width", "height", "original_width", "original_height"),
    *("original_bytes", "sha256_original", "sha256", "jpg"),
)
LISTED = (
    *("row_id", "image_id", "url", "caption", "captions", "label", "license"),
    "sha256_expected",
)  # what a row takes from its manifest as it is
NO_IMAGE = dict.fromkeys(IMAGE_FACTS)


def download(
    config: DownloadConfig, data: Path, *, processes: int, threads: int, retry: bool = False
) -> dict[str, int]:
    """Fetch what is missing, write data/images; returns rows by status.

    retry: fetch again the rows whose status may change (RETRYABLE), and only those.
    Raises PipelineError for a bad manifest, and where no image at all could be had.
    """
    with lock(data, STAGE):
        lists = manifest.write_lists(
            Path(config.manifest), Path(config.root), config.buckets, data / ".work/download/lists"
        )
        work = Work(data, STAGE, data / "images", _recipe(config, lists))
        if retry or not work.published():
            work.begin()
            _fill(work, config, lists, processes, threads, retry)
            _check(work, lists)
            names = [path.name for path in lists]
            work.publish(names, {"rows": _statuses(work.folder, names)})
        work.clean("lists", "wanted", "raw")
        statuses = _statuses(work.out, [path.name for path in lists])
    if not statuses.get("ok"):
        found = ", ".join(f"{count} {status}" for status, count in statuses.items())
        raise PipelineError(
            f'not one image could be had: {found}. `pipeline query "SELECT url, status, error FROM '
            'images"` says why; then mend the manifest, or run `pipeline download --retry`.'
        )
    return statuses


def _recipe(config: DownloadConfig, lists: list[Path]) -> Recipe:
    """The manifest itself enters as lists."""
    return Recipe(
        parameters=config.model_dump(exclude={"manifest", "root", "buckets"}),
        versions={
            "manifest": manifest.VERSION,
            "policy": policy.VERSION,
            "pixels": decoding.VERSION,
            "masks": masks.VERSION,
            "shards": shards.VERSION,
        },
        inputs={"lists": {path.name: file_digest(path) for path in lists}},
    )


def _rules_recipe(config: DownloadConfig) -> dict:
    """What decides whether a fetch succeeds; the manifest itself enters as lists."""
    fields = config.model_dump(exclude={"manifest", "root", "buckets", "image_size", "quality"})
    return fields | {"manifest": manifest.VERSION, "policy": policy.VERSION}


def _pixels_recipe(config: DownloadConfig) -> dict:
    """What decides the bytes of a stored image."""
    return {
        "image_size": config.image_size,
        "quality": config.quality,
        "pixels": decoding.VERSION,
    }


def _fill(work, config, lists, processes, threads, retry) -> None:
    """Complete the work folder: take over what is known, fetch the rest, shard by shard."""
    wanted = work.room / "wanted"
    wanted.mkdir(exist_ok=True)
    for leftover in wanted.glob("*"):
        leftover.unlink()
    fetching = 0
    for path in lists:
        again = retry and work.has(path.name)
        if work.has(path.name) and not again:
            continue
        rows = pq.read_table(path).to_pylist()
        known = _known(work, path.name, config, rows, retry)
        missing = [row for row in rows if _has_image(row) and row["image_id"] not in known]
        if missing:
            fetching += len(missing)
            columns = {name: [row[name] for row in missing] for name in ("image_id", "url")}
            pq.write_table(pa.table(columns), wanted / path.name)
        elif not again:
            _commit(work, config, path, rows, known)
    if not fetching:
        return
    rules = FetchRules(
        timeout_s=config.timeout,
        retries=config.retries,
        max_bytes=config.max_bytes,
        max_pixels=config.max_pixels,
        max_redirects=config.max_redirects,
        per_host=config.per_host,
        allow=tuple(config.allow),
        root=Path(config.root).resolve(),
        respect_robots=config.robots,
        image_size=config.image_size,
        quality=config.quality,
    )
    by_name = {path.name: path for path in lists}
    with tqdm(total=fetching, unit="image", desc="download", smoothing=0.05) as bar:
        for raw in fetch_lists(wanted, work.room / "raw", rules, processes, threads):
            name = f"{raw.stem}.parquet"
            rows = pq.read_table(by_name[name]).to_pylist()
            known = _known(work, name, config, rows, retry)
            _, earlier = _earlier(work, name, config, retry)
            fetched = dict(_fetched(raw, wanted / name, earlier))
            _commit(work, config, by_name[name], rows, known | fetched)
            bar.update(len(fetched))


def _has_image(row: dict) -> bool:
    """False for rows that are settled without a fetch."""
    return bool(row["url"].strip()) and row["occurrence"] == 0


def _earlier(work: Work, name: str, config, retry: bool) -> tuple[dict, dict[str, dict]]:
    """Provenance and facts by image_id of the last earlier shard with the same kind of pixels."""
    for folder in [work.folder, *work.earlier()] if retry else work.earlier():
        if (folder / name).is_file():
            made = shards.provenance(folder / name, STAGE)
            made["pixels"].pop("shards", None)  # of earlier versions: decides columns, not pixels
            if made["pixels"] == _pixels_recipe(config):
                columns = ["image_id", *IMAGE_FACTS]
                table = shards.read_earlier(folder / name, STAGE, shards.IMAGES, columns)
                rows = table.to_pylist()
                return made, {row.pop("image_id"): row for row in rows if row["attempts"]}
    return {}, {}


def _known(work: Work, name: str, config, rows: list[dict], retry: bool) -> dict[str, dict]:
    """Facts about images, by image_id, that an earlier shard holds and that are still true."""
    made, earlier = _earlier(work, name, config, retry)
    same_rules = made.get("rules") == _rules_recipe(config)

    def still_true(row: dict) -> bool:
        facts = earlier[row["image_id"]]
        if facts["status"] == "ok":
            local = row["url"][:5].lower() == "file:"
            return not local or row["content"] == facts["sha256_original"]
        return same_rules and facts["status"] not in RETRYABLE and row["content"] is None

    asked = (row for row in rows if row["occurrence"] == 0 and row["image_id"] in earlier)
    return {row["image_id"]: earlier[row["image_id"]] for row in asked if still_true(row)}


def _fetched(raw: Path, wanted: Path, earlier: dict[str, dict]) -> Iterator[tuple[str, dict]]:
    """(image_id, facts) of every wanted image; what img2dataset lost becomes a row all the same."""
    rows = {row["image_id"]: row for row in pq.read_table(raw).to_pylist()}
    for key in pq.read_table(wanted)["image_id"].to_pylist():
        row = rows.get(key, {"status": None, "error_message": "lost: no row came back"})
        before = earlier.get(key, NO_IMAGE)  # what changed or has other rules begins anew
        tried = before["attempts"] if before["status"] in RETRYABLE else 0
        facts = NO_IMAGE | {"attempts": tried + 1}
        if row["status"] == "success":
            facts |= {
                "status": "ok",
                "sha256_original": row["sha256"],
                "sha256": hashlib.sha256(row["jpg"]).hexdigest(),
                "original_bytes": int(json.loads(row["exif"])[SIZE]),
                **{name: row[name] for name in ("jpg", *IMAGE_FACTS[3:7])},
            }
        else:
            status, detail = split_error(row["error_message"])
            facts |= {"status": status, "error": detail}
        yield key, facts


def _commit(work: Work, config, path: Path, rows: list[dict], known: dict[str, dict]) -> None:
    """Write one canonical shard: the list's rows, each with its image or its status."""
    root = Path(config.root)
    table = pa.Table.from_pylist([_row(row, known, root) for row in rows], schema=shards.IMAGES)
    made = {
        "stage": STAGE,
        "rules": _rules_recipe(config),
        "pixels": _pixels_recipe(config),
        "list": file_digest(path),
        "libraries": libraries("img2dataset", "pillow", "pyarrow"),
    }
    work.commit(
        path.name,
        lambda partial: shards.write_shard(partial, shards.IMAGES, shards.in_groups(table), made),
    )


def _row(row: dict, known: dict[str, dict], root: Path) -> dict:
    if not row["url"].strip():
        facts = NO_IMAGE | {"status": "empty_url", "error": "the manifest row has no url"}
    elif row["occurrence"]:
        facts = NO_IMAGE | {"status": "duplicate_url", "error": "an earlier row has this url"}
    else:
        facts = known[row["image_id"]]
    made = {name: row[name] for name in LISTED} | facts
    made["boxes"] = _scaled(row["boxes"], facts)
    if row["mask"] and facts["status"] == "ok":
        try:
            made["mask"] = masks.stored_mask(row["mask"], root, facts)
        except masks.MaskError as error:  # the image is good all the same
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


def _check(work: Work, lists: list[Path]) -> None:
    """Rows in = rows out, shard by shard, before anything is called done."""
    for path in lists:
        asked = pq.read_table(path, columns=["row_id"])["row_id"]
        got = shards.read_shard(work.folder / path.name, STAGE, ["row_id"])["row_id"]
        if not got.equals(asked):
            raise PipelineError(
                f"{work.folder / path.name} holds {len(got)} rows where the manifest has "
                f"{len(asked)}. Delete it and run `pipeline download` again."
            )


def _statuses(folder: Path, names: list[str]) -> dict[str, int]:
    counts = Counter()
    for name in names:
        counts.update(shards.read_shard(folder / name, STAGE, ["status"])["status"].to_pylist())
    return dict(counts.most_common())
