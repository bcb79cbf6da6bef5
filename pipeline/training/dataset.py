"""The kept rows of a split, as addresses in the Parquet shards, and the way to read one.

Memory: 12 bytes a row, and the row groups that are in use.
"""

import math
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.core.errors import PipelineError
from pipeline.core.records import RowAddress, Sample
from pipeline.data import database
from pipeline.data.footers import Footers
from pipeline.data.pixels import NotAnImage, decode
from pipeline.data.remote_shards import READERS, are_remote
from pipeline.data.shards import embedding_matrix, shard_paths
from pipeline.data.views import view_pixels

BOX = ["left", "top", "right", "bottom"]


class _Group(NamedTuple):
    """One row group of images beside one view's row group of the teacher."""

    image_ids: pa.ChunkedArray
    jpgs: pa.ChunkedArray
    index: dict[str, int]  # image_id -> row of the following
    boxes: list[tuple[float, float, float, float]]
    flips: list[bool]
    embeddings: np.ndarray  # (n, E) float32, unit length
    texts: dict[str, np.ndarray]  # image_id -> (captions, E) float32, unit length


class Dataset:
    """The kept rows of one split (or of all, for None), numbered in the order of the shards.

    image_size (px) and interpolation are what the student sees. views: how many stored views take
    turns, one an epoch for a whole row group, so that the others are not read. captions: read text
    embeddings too. groups_in_use: row groups that are read from at about the same time.

    May be shared by threads, and pickled. Raises PipelineError where the split keeps no image.
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
        groups_in_use: int = 16,
    ) -> None:
        self.data, self.views, self.captions = data, views, captions
        self.image_size, self.interpolation = image_size, interpolation
        self.remote = are_remote(shard_paths(data / "images", "download"))
        self._cache_size = groups_in_use + 8  # some are about to be left
        if self.remote:
            self._cache_size += groups_in_use  # some are read ahead
        self.__setstate__({})
        connection = database.connect(data)
        files = database.parquet_files(connection, data / "images")
        kept = connection.execute(INDEX, [files, split]).fetchnumpy()
        if not len(kept["row"]):
            raise PipelineError(
                f"data/selection keeps no image for {split}. Change select.where, val or test in "
                "params.yaml and run `pipeline select`."
            )
        self.addresses = np.zeros((len(kept["row"]), 3), np.int32)  # the fields of RowAddress
        self.addresses[:, 0] = kept["shard"]
        for shard in np.unique(kept["shard"]):
            mine = self.addresses[:, 0] == shard
            starts = self._group_starts(shard)
            group = np.searchsorted(starts, kept["row"][mine], side="right") - 1
            self.addresses[mine, 1] = group
            self.addresses[mine, 2] = kept["row"][mine] - starts[group]
        changes = np.any(np.diff(self.addresses[:, :2], axis=0), axis=1)
        # numbers of the rows at which a row group starts, and the number of rows
        self.edges = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(self.addresses)]])

    def __getstate__(self) -> dict:
        own = ("_lock", "_groups", "_pool", "_footers")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._lock, self._groups, self._footers = threading.Lock(), OrderedDict(), Footers()
        self._pool = ThreadPoolExecutor(READERS)  # whose threads start when they are needed

    def __len__(self) -> int:
        return len(self.addresses)

    def address(self, row: int) -> RowAddress:
        return RowAddress(*map(int, self.addresses[row]))

    def sample(self, row: int, epoch: int = 0, seed: int = 0) -> Sample:
        """A row as an epoch shows it. Raises PipelineError where its view is not stored."""
        shard, group, at = self.address(row)
        view = self._view(shard, group, epoch, seed)
        row_group = self._group(shard, group, view)
        image_id = row_group.image_ids[at].as_py()
        if image_id not in row_group.index:
            raise PipelineError(
                f"image {image_id} has no embedding of view {view} in data/teacher. Run "
                "`pipeline teacher-embed`."
            )
        i, texts = row_group.index[image_id], row_group.texts.get(image_id)
        text = None if texts is None else texts[_caption(epoch, self.views, len(texts))]
        return Sample(
            image_id,
            row_group.jpgs[at].as_py(),
            row_group.boxes[i],
            row_group.flips[i],
            row_group.embeddings[i],
            text,
        )

    def read_ahead(self, rows: np.ndarray, epoch: int, seed: int) -> None:
        """Begin to read the row groups of rows that an epoch shows soon, from a remote store."""
        visited = np.unique(np.searchsorted(self.edges, rows, side="right") - 1)
        for row in self.edges[visited]:
            shard, group, _ = self.address(int(row))
            with self._lock:
                self._begun(shard, group, self._view(shard, group, epoch, seed))

    def pixels(self, sample: Sample, image_size: int | None = None) -> np.ndarray | None:
        """What the teacher saw, at image_size or the student's: (S, S, 3) uint8; None if damaged."""
        try:
            image = decode(sample.jpg)
        except NotAnImage:
            return None
        size = image_size or self.image_size
        return view_pixels(image, sample.box, sample.flip, size, self.interpolation)

    def _path(self, folder: str, shard: int) -> Path:
        return self.data / folder / f"{shard:05}.parquet"

    def _view(self, shard: int, group: int, epoch: int, seed: int) -> int:
        return (_mixed(seed, shard, group) + epoch) % self.views

    def _group(self, *key: int) -> _Group:
        """The row group of a shard, group and view, from a small cache."""
        with self._lock:
            begun = self._begun(*key)
        try:
            return begun.result()
        except PipelineError:
            with self._lock:
                self._groups.pop(key, None)
            raise

    def _begun(self, *key: int) -> "Future[_Group]":
        """Is read here, or by a thread where the shard lies far away; call it with the lock."""
        if key not in self._groups:
            if self.remote:
                begun = self._pool.submit(self._read_group, *key)
            else:
                begun = Future()
                begun.set_result(self._read_group(*key))
            self._groups[key] = begun
            if len(self._groups) > self._cache_size:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _group_starts(self, shard: int) -> np.ndarray:
        """Number of the first row of each row group."""
        with self._footers.open(self._path("images", shard), "download") as file:
            metadata = file.metadata
        counts = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        return np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)

    def _read_group(self, shard: int, group: int, view: int) -> _Group:
        with self._footers.open(self._path("images", shard), "download") as file:
            images = file.read_row_group(group, columns=["image_id", "jpg"], use_threads=False)
            groups = file.num_row_groups
        with self._footers.open(self._path("teacher/images", shard), "teacher_embed") as file:
            if file.num_row_groups < groups * self.views:
                raise PipelineError(
                    f"data/teacher holds {file.num_row_groups // groups} views, distill.views asks "
                    f"for {self.views}. Lower distill.views, or raise teacher_embed.views and run "
                    "`pipeline teacher-embed` (imported embeddings have one view)."
                )
            columns = ["image_id", *BOX, "flip", "embedding"]
            table = file.read_row_group(view * groups + group, columns=columns, use_threads=False)
        boxes = np.stack([table[name].to_numpy() for name in BOX], axis=1)  # (n, 4) float32
        ids = table["image_id"].to_pylist()
        texts = self._texts(shard, group, groups) if self.captions else {}
        return _Group(
            images["image_id"],
            images["jpg"],
            {image_id: i for i, image_id in enumerate(ids)},
            [(float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in boxes],
            table["flip"].to_pylist(),
            embedding_matrix(table["embedding"]),
            texts,
        )

    def _texts(self, shard: int, group: int, groups: int) -> dict[str, np.ndarray]:
        """image_id -> (captions, E) unit embeddings of a row group's images, of `groups` in all."""
        path = self._path("teacher/texts", shard)
        with self._footers.open(path, "teacher_embed") as file:
            if file.num_row_groups != groups:
                raise PipelineError(
                    f"{path} has {file.num_row_groups} row groups where data/images has {groups}: it "
                    "was written by an earlier version. Run `pipeline teacher-embed`."
                )
            columns = ["image_id", "embedding"]
            table = file.read_row_group(group, columns=columns, use_threads=False)
        vectors: dict[str, list[np.ndarray]] = {}
        for image_id, vector in zip(
            table["image_id"].to_pylist(), embedding_matrix(table["embedding"]), strict=True
        ):
            vectors.setdefault(image_id, []).append(vector)
        return {image_id: np.stack(of_one) for image_id, of_one in vectors.items()}


def _caption(epoch: int, views: int, captions: int) -> int:
    """Which caption an epoch shows: the next one each time, moved on by one whenever its pairs with
    the views, which take turns as well, would repeat. views * captions epochs show every pair.
    """
    return (epoch + epoch // math.lcm(views, captions)) % captions


@lru_cache(maxsize=1024)
def _mixed(*numbers: int) -> int:
    """A well-spread integer from some small ones: which view a row group starts with."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# Which rows a split keeps, in the shards' order.
INDEX = """
SELECT CAST(regexp_extract(filename, '(\\d+)[.]parquet$', 1) AS INTEGER) AS shard,
       file_row_number AS row
FROM read_parquet(?, filename = true, file_row_number = true) JOIN selection USING (image_id)
WHERE status = 'ok' AND keep AND split = coalesce(?, split) ORDER BY shard, row
"""
