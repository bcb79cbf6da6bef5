"""Footers of shards that are read from again and again, each parsed once."""

import threading
from collections import OrderedDict
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.data.shards import open_shard

LIMIT = (
    1 << 25
)  # bytes as stored, of some 2 million images; parsed they take about seven times that


class Footers:
    """Opens shards with the footers that it has read before; the latest stay, up to LIMIT bytes.

    A footer grows with its shard's row groups: at 50,000 images it takes longer to parse than a row
    group of embeddings to read. May be shared by threads. The shards must not change meanwhile.
    """

    def __init__(self) -> None:
        self._lock, self._kept = threading.Lock(), OrderedDict[Path, pq.FileMetaData]()
        self._bytes = 0

    def open(self, path: Path, stage: str) -> pq.ParquetFile:
        """As open_shard, with the same errors."""
        with self._lock:
            known = self._kept.get(path)
        file = open_shard(path, stage, known)
        with self._lock:
            if path not in self._kept:
                self._kept[path] = file.metadata
                self._bytes += file.metadata.serialized_size
            self._kept.move_to_end(path)
            while self._bytes > LIMIT and len(self._kept) > 1:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= oldest.serialized_size
        return file
