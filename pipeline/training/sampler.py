"""The order of training: which rows a step sees is a pure function of (seed, epoch, step).

An epoch is one stream: the row groups in an order drawn from (seed, epoch), the rows of each
shuffled. The stream is cut into equal lanes, and every step takes its next few rows from each, so
that a batch mixes as many row groups as there are lanes and memory holds one row group a lane. A
part of a batch needs the lanes of that part alone: whoever reads 1/R of each batch (a rank, a
loader process) reads 1/R of the row groups, and the order is the same for any R.
"""

from functools import lru_cache

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.core.records import StepPosition
from pipeline.training.dataset import Dataset

VERSION = 3  # raise it when a position means other rows or other parts of them


class Sampler:
    """A dataset's rows cut into steps; the last rows of an epoch, which fill no step, wait.

    Raises PipelineError where the rows are fewer than one batch.
    """

    def __init__(self, dataset: Dataset, seed: int, batch: int, lanes: int) -> None:
        if len(dataset) < batch:
            raise PipelineError(
                f"{len(dataset)} images to train on are fewer than one batch of {batch}. Lower "
                "distill.batch, or add images."
            )
        self.seed, self.batch = seed, batch
        self.steps = len(dataset) // batch  # per epoch
        self._starts, self._sizes = dataset.edges[:-1], np.diff(dataset.edges)  # of the row groups
        lanes = min(lanes, batch)
        self._cuts = np.arange(lanes + 1) * batch // lanes  # of a batch, between lanes
        self._epoch: tuple | None = None

    def position(self, step: int) -> StepPosition:
        """Where the step-th step of the run stands."""
        return StepPosition(self.seed, *divmod(step, self.steps))

    def rows(self, position: StepPosition, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Numbers of the rows that a step sees, in order; of the batch's part start:stop."""
        at = np.arange(self.batch)[start:stop]
        lane = np.searchsorted(self._cuts, at, side="right") - 1
        first, width = self._cuts[lane], np.diff(self._cuts)[lane]
        stream = self.steps * first + position.step * width + at - first
        groups, ends = self._order(position.epoch)
        visited = np.searchsorted(ends, stream, side="right")
        offsets = stream - ends[visited] + self._sizes[groups[visited]]
        rows = np.empty(len(at), np.int64)
        for visit in np.unique(visited):
            group, mine = int(groups[visit]), visited == visit
            shuffled = _shuffled(self.seed, position.epoch, group, int(self._sizes[group]))
            rows[mine] = self._starts[group] + shuffled[offsets[mine]]
        return rows

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Row groups as an epoch visits them, and where each ends in the stream of rows."""
        known = self._epoch
        if known is None or known[0] != epoch:
            groups = np.random.default_rng([self.seed, epoch]).permutation(len(self._sizes))
            known = self._epoch = epoch, groups, np.cumsum(self._sizes[groups])
        return known[1:]


@lru_cache(maxsize=1024)
def _shuffled(seed: int, epoch: int, group: int, size: int) -> np.ndarray:
    """(size,) the rows of one row group, shuffled."""
    return np.random.default_rng([seed, epoch, group]).permutation(size)
