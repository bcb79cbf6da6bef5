"""Vectors that no model made."""

import numpy as np


def unit(rows: int, size: int = 32, seed: int = 0, around: float = 0.0) -> np.ndarray:
    """Random unit vectors, in a cone around the first axis as CLIP's are."""
    vectors = np.random.default_rng(seed).normal(size=(rows, size))
    vectors[:, 0] += around
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
