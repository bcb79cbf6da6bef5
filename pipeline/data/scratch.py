"""Large arrays that need no memory of their own: mapped files without a name."""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SMALL = 1 << 28  # bytes up to which an array simply is in memory


def scratch_array(shape: tuple[int, ...], dtype: Any, folder: Path | None = None) -> np.ndarray:
    """Zeros, writable; a large array lies in an unnamed file that is gone with the process.

    folder: where the file lies, the system's temporary folder by default (or where it cannot be
    written).
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size <= SMALL:
        return np.zeros(shape, dtype)
    try:
        return _mapped(shape, dtype, size, folder)
    except OSError:  # data/ may be read-only
        return _mapped(shape, dtype, size, None)


def _mapped(shape: tuple[int, ...], dtype: Any, size: int, folder: Path | None) -> np.ndarray:
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(
            file.fileno(), 0, size
        )  # a full disk is an error now, not a signal later
        return np.memmap(file, dtype, "r+", shape=shape)
