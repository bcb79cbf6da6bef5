"""Rows of finished shards, found by a key of their own: what was paid for once is not paid again,
in whatever shards it lies now.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data import shards


class EarlierRows:
    """An index over a text column of some shards. It holds 16 bytes a row, and reads the column of
    every shard once, when it is made.

    files: shard -> what its footer says of its making; schema: of the newest version of them.
    """

    def __init__(self, files: dict[Path, dict], key: str, stage: str, schema: pa.Schema):
        self.files, self.key, self.stage, self.schema = list(files.items()), key, stage, schema
        hashes, sizes = [], []
        for path in files:
            column = shards.read_shard(path, stage, [key])[key].to_pylist()
            hashes.append(np.fromiter(map(hash, column), np.int64, len(column)))
            sizes.append(len(column))
        every = np.concatenate(hashes) if hashes else np.zeros(0, np.int64)
        self.order = np.argsort(every, kind="stable")  # row numbers counted through all shards
        self.hashes = every[self.order]
        self.starts = np.cumsum([0, *sizes])

    def find(self, keys: Iterable[str], columns: list[str]) -> Iterator[tuple[dict, pa.Table]]:
        """(footer of their shard, rows that have one of these keys), by row group, in the order in
        which the shards were given. Columns that an earlier version did not know are null.
        """
        keys = list(keys)
        for path, made, rows in self._places(keys):
            with shards.open_shard(path, self.stage) as file:
                sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
                known = [name for name in columns if name in file.schema_arrow.names]
                starts = np.cumsum([0, *sizes])
                for group in np.unique(np.searchsorted(starts, rows, side="right") - 1):
                    here = rows[(rows >= starts[group]) & (rows < starts[group + 1])]
                    table = file.read_row_group(int(group), [self.key, *known])
                    table = table.take(pa.array(here - starts[group]))
                    same = pc.is_in(  # ty: ignore[missing-attribute]
                        table[self.key], value_set=pa.array(keys, pa.string())
                    )
                    yield made, self._complete(table.filter(same), columns)  # a hash may be shared

    def _complete(self, table: pa.Table, columns: list[str]) -> pa.Table:
        for name in columns:
            if name not in table.column_names:
                nulls = pa.nulls(table.num_rows, self.schema.field(name).type)
                table = table.append_column(name, nulls)
        return table.select([self.key, *columns])

    def _places(self, keys: list[str]) -> Iterator[tuple[Path, dict, np.ndarray]]:
        """Row numbers of these keys, shard by shard."""
        wanted = np.unique(np.fromiter(map(hash, keys), np.int64, len(keys)))
        first = np.searchsorted(self.hashes, wanted, side="left")
        last = np.searchsorted(self.hashes, wanted, side="right")
        ranges = [self.order[a:b] for a, b in zip(first, last, strict=True) if b > a]
        rows = np.sort(np.concatenate(ranges)) if ranges else np.zeros(0, np.int64)
        of_file = np.searchsorted(self.starts, rows, side="right") - 1
        for i in np.unique(of_file):
            yield *self.files[i], rows[of_file == i] - self.starts[i]
