"""Parquet shards -> batches: which image and view a step sees is a pure function of its place.

The place is four integers: seed, batch, epoch, step. An epoch visits all row groups in an order
drawn from (seed, epoch); `window` consecutive ones are pooled and their rows shuffled, so memory
is a window of JPEGs however many shards there are, plus 12 bytes an image for the index. Neither
the number of worker threads nor that of ranks changes what a step sees.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.core.threads import ahead
from pipeline.data import database
from pipeline.data.pixels import NotAnImage, decode
from pipeline.data.shards import embedding_matrix, open_shard, read_shard
from pipeline.data.views import view_pixels

VERSION = 2  # raise it when a place means other rows or other parts of them
BOX = ["left", "top", "right", "bottom"]


class Place(NamedTuple):
    """Where training stands; all that a resume needs to know of the data."""

    seed: int
    batch: int
    epoch: int
    step: int  # within the epoch


@dataclass(frozen=True)
class Batch:
    """Rows of one step, in order. A row that does not decode is missing here and named in lost."""

    ids: list[str]
    pixels: np.ndarray  # (b, S, S, 3) uint8
    targets: np.ndarray  # (b, E) float32, unit length
    texts: np.ndarray  # (b, E) float32: one caption's, unit length; zero where a row has none
    places: np.ndarray  # (b,) place of each row in the whole step
    lost: list[str]


class Rows:
    """The kept rows of one split (or of all, for None), as places in the shards, and the way to read them.

    image_size (px) and interpolation are what the student sees. views: how many stored views take
    turns, one an epoch for a whole row group, so that the others are not read. captions: read text
    embeddings too.

    Raises PipelineError where the split keeps no image, or fewer views are stored.
    """

    def __init__(
        self,
        data: Path,
        split: str | None,
        image_size: int,
        interpolation: str,
        *,
        views: int = 1,
        captions: bool = False,
        window: int = 16,
    ):
        self.data, self.views, self.captions = data, views, captions
        self.image_size, self.interpolation = image_size, interpolation
        self._groups_read: OrderedDict = OrderedDict()
        self._most_groups = 2 * window  # one window in use, one read ahead
        pattern = str(data.resolve() / "images/*.parquet")
        found = database.connect(data).execute(INDEX, [pattern, split]).fetchnumpy()
        if not len(found["row"]):
            raise PipelineError(
                f"data/selection keeps no image for {split}. Change select.where, val or test in "
                "params.yaml and run `pipeline select`."
            )
        self.places = np.zeros((len(found["row"]), 3), np.int32)  # shard, row group, row in group
        self.places[:, 0] = found["shard"]
        for shard in np.unique(found["shard"]):
            mine = self.places[:, 0] == shard
            starts = _group_starts(self._path("images", shard))
            group = np.searchsorted(starts, found["row"][mine], side="right") - 1
            self.places[mine, 1] = group
            self.places[mine, 2] = found["row"][mine] - starts[group]
        changes = np.any(np.diff(self.places[:, :2], axis=0), axis=1)
        self.edges = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(self.places)]])

    def __len__(self) -> int:
        return len(self.places)

    @property
    def group_count(self) -> int:
        """Row groups that hold at least one row of the split."""
        return len(self.edges) - 1

    def group_of(self, row: int) -> int:
        return int(np.searchsorted(self.edges, row, side="right") - 1)

    def read(self, row: int, epoch: int, seed: int) -> dict:
        """jpg, view box, flip, target and caption of one row as epoch shows it."""
        shard, group, place = map(int, self.places[row])
        view = (_mixed(seed, shard, group) + epoch) % self.views
        images, teacher = self._group(shard, group, view)
        key = images["image_id"][place].as_py()
        if key not in teacher["place"]:
            raise PipelineError(
                f"image {key} has no embedding of view {view} in data/teacher. Run "
                "`pipeline teacher-embed`."
            )
        at = teacher["place"][key]
        found = {"image_id": key, "jpg": images["jpg"][place].as_py()}
        found |= {"box": teacher["box"][at], "flip": teacher["flip"][at]}
        found["target"] = teacher["embedding"][at]
        found["text"] = self._text(shard, key, epoch) if self.captions else 0.0
        return found

    def pixels(self, row: dict) -> np.ndarray | None:
        """What the teacher saw of a row, at the student's size: (S, S, 3) uint8; None if damaged."""
        try:
            image = decode(row["jpg"])
        except NotAnImage:
            return None
        return view_pixels(image, row["box"], row["flip"], self.image_size, self.interpolation)

    def _path(self, room: str, shard: int) -> Path:
        return self.data / room / f"{shard:05}.parquet"

    def _group(self, shard: int, group: int, view: int) -> tuple:
        """One row group of images and its view's row group of the teacher, from a small cache."""
        key = shard, group, view
        if key in self._groups_read:
            self._groups_read.move_to_end(key)
        else:
            self._groups_read[key] = self._read_group(*key)
            if len(self._groups_read) > self._most_groups:
                self._groups_read.popitem(last=False)
        return self._groups_read[key]

    def _read_group(self, shard: int, group: int, view: int) -> tuple:
        with open_shard(self._path("images", shard), "download") as file:
            images = file.read_row_group(group, columns=["image_id", "jpg"])
            groups = file.num_row_groups
        with open_shard(self._path("teacher/images", shard), "teacher-embed") as file:
            if file.num_row_groups < groups * self.views:
                raise PipelineError(
                    f"data/teacher holds {file.num_row_groups // groups} views, distill.views asks "
                    f"for {self.views}. Lower distill.views, or raise teacher_embed.views and run "
                    "`pipeline teacher-embed` (imported embeddings have one view)."
                )
            table = file.read_row_group(
                view * groups + group, columns=["image_id", *BOX, "flip", "embedding"]
            )
        boxes = np.stack([table[name].to_numpy() for name in BOX], axis=1)  # (n, 4) float32
        ids = table["image_id"].to_pylist()
        return images, {
            "place": {key: i for i, key in enumerate(ids)},
            "box": [tuple(map(float, box)) for box in boxes],
            "flip": table["flip"].to_pylist(),
            "embedding": embedding_matrix(table["embedding"]),
        }

    def _text(self, shard: int, key: str, epoch: int) -> np.ndarray | float:
        """Unit embedding of one of an image's captions, in turn; 0 where it has none."""
        vectors = _texts(self._path("teacher/texts", shard)).get(key)
        return 0.0 if vectors is None else vectors[epoch % len(vectors)]


class Epochs:
    """Rows in the order of training, cut into steps; the last rows that fill no step wait.

    Raises PipelineError where the rows are fewer than one batch.
    """

    def __init__(self, rows: Rows, seed: int, batch: int, window: int):
        if len(rows) < batch:
            raise PipelineError(
                f"{len(rows)} images to train on are fewer than one batch of {batch}. Lower "
                "distill.batch, or add images."
            )
        self.rows, self.seed, self.batch, self.window = rows, seed, batch, window
        self.steps = len(rows) // batch  # per epoch
        self._order = lru_cache(maxsize=2)(self._order)
        self._shuffled = lru_cache(maxsize=4)(self._shuffled)

    def place(self, step: int) -> Place:
        """Where the step-th step of the run stands."""
        return Place(self.seed, self.batch, step // self.steps, step % self.steps)

    def row_numbers(self, place: Place) -> np.ndarray:
        """(batch,) numbers of the rows that a step sees, in order."""
        ends = self._order(place.epoch)[1]
        start, stop = place.step * self.batch, (place.step + 1) * self.batch
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        pooled = [self._shuffled(place.epoch, window) for window in range(first, last + 1)]
        skipped = ends[first - 1] if first else 0
        return np.concatenate(pooled)[start - skipped : stop - skipped]

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Row groups as an epoch visits them, and where each window ends in the stream of rows."""
        groups = np.random.default_rng([self.seed, epoch]).permutation(self.rows.group_count)
        sizes = np.diff(self.rows.edges)[groups]
        windows = np.add.reduceat(sizes, np.arange(0, len(groups), self.window))
        return groups, np.cumsum(windows)

    def _shuffled(self, epoch: int, window: int) -> np.ndarray:
        """Row numbers of one window, shuffled."""
        groups, edges = self._order(epoch)[0], self.rows.edges
        mine = groups[window * self.window : (window + 1) * self.window]
        pooled = np.concatenate([np.arange(edges[g], edges[g + 1]) for g in mine])
        return np.random.default_rng([self.seed, epoch, window]).permutation(pooled)


def training_batches(
    epochs: Epochs,
    start: int,
    stop: int,
    *,
    workers: int,
    rank: int = 0,
    ranks: int = 1,
    min_crop_area: float = 1.0,
) -> Iterator[Batch]:
    """Steps start..stop of a run; this rank's share of each, the same rows for any workers.

    min_crop_area: least share of a view's area that is shown, as a function of seed, epoch and row.
    """
    share = epochs.batch // ranks

    def wanted():
        for step in range(start, stop):
            place = epochs.place(step)
            numbers = epochs.row_numbers(place)[rank * share : (rank + 1) * share]
            for position, row in enumerate(numbers, rank * share):
                found = epochs.rows.read(int(row), place.epoch, epochs.seed)
                if min_crop_area < 1:
                    found |= _glimpse(found, min_crop_area, epochs.seed, place.epoch, int(row))
                yield position, found

    yield from _collected(epochs.rows, wanted(), share, workers)


def batches_of(rows: Rows, numbers: Iterable[int], batch: int, *, workers: int) -> Iterator[Batch]:
    """The rows of these numbers at view 0 (rows must have been made with views=1), in order."""
    wanted = ((i, rows.read(int(row), 0, 0)) for i, row in enumerate(numbers))
    yield from _collected(rows, wanted, batch, workers)


def _glimpse(row: dict, least: float, *place: int) -> dict:
    """Part of a row's view: least to 1 of its area, in its shape, anywhere in it; a fair flip.

    On whole pixels, outwards. For targets of which only one view is stored: the target stays, which
    is right for the whole.
    """
    rng = np.random.default_rng(place)
    left, top, right, bottom = row["box"]
    side = rng.uniform(least, 1) ** 0.5
    width, height = (right - left) * side, (bottom - top) * side
    left, top = rng.uniform(left, right - width), rng.uniform(top, bottom - height)
    flip = row["flip"] != (rng.random() < 0.5)
    box = math.floor(left), math.floor(top), math.ceil(left + width), math.ceil(top + height)
    return {"box": tuple(map(float, box)), "flip": flip}


def _collected(rows: Rows, wanted, size: int, workers: int) -> Iterator[Batch]:
    seen = ahead(lambda item: (*item, rows.pixels(item[1])), wanted, workers, 2 * size)
    while found := list(islice(seen, size)):
        good = [item for item in found if item[2] is not None]
        length = found[0][1]["target"].shape[0]
        texts = [np.broadcast_to(row["text"], length) for _, row, _ in good]
        side = rows.image_size
        yield Batch(
            ids=[row["image_id"] for _, row, _ in good],
            pixels=np.array([p for _, _, p in good], np.uint8).reshape(-1, side, side, 3),
            targets=np.array([r["target"] for _, r, _ in good], np.float32).reshape(-1, length),
            texts=np.array(texts, np.float32).reshape(-1, length),
            places=np.array([position for position, _, _ in good], np.int64),
            lost=[row["image_id"] for _, row, pixels in found if pixels is None],
        )


def _group_starts(path: Path) -> np.ndarray:
    """Number of the first row of each row group."""
    with open_shard(path, "download") as file:
        metadata = file.metadata
        counts = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
    return np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)


@lru_cache(maxsize=1024)
def _mixed(*numbers: int) -> int:
    """A well-spread integer from some small ones: which view a row group starts with."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@lru_cache(maxsize=4)
def _texts(path: Path) -> dict[str, np.ndarray]:
    """image_id -> (captions, E) unit embeddings of one shard's captions."""
    table = read_shard(path, "teacher-embed", ["image_id", "embedding"])
    vectors, found = embedding_matrix(table["embedding"]), {}
    for key, vector in zip(table["image_id"].to_pylist(), vectors, strict=True):
        found.setdefault(key, []).append(vector)
    return {key: np.stack(vectors) for key, vectors in found.items()}


# Which rows a split keeps, in the shards' order.
INDEX = """
SELECT CAST(regexp_extract(filename, '(\\d+)[.]parquet$', 1) AS INTEGER) AS shard,
       file_row_number AS row
FROM read_parquet(?, filename = true, file_row_number = true) JOIN selection USING (image_id)
WHERE status = 'ok' AND keep AND split = coalesce(?, split) ORDER BY shard, row
"""
