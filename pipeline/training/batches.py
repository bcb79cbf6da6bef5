"""A dataset and an order -> batches, decoded ahead of the consumer by threads or processes.

A batch is made in parts, one a worker; each writes its pixels into one of a few batches of shared
memory, so that the consumer's thread handles a few messages a step, whatever a batch holds. The
result does not depend on how many workers there are or whether they are threads or processes.

Threads start at once and suit a CPU, whose steps take longer than Python holds its lock. Processes
(torch's DataLoader: started once, watched, in order) keep a GPU fed: benchmarks/README.md.
"""

import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from pipeline.core.errors import PipelineError
from pipeline.core.records import Sample
from pipeline.core.threads import ahead
from pipeline.training.augment import cropped
from pipeline.training.dataset import Dataset
from pipeline.training.sampler import Sampler

AHEAD = 2  # batches that workers prepare while one is used
READ_AHEAD = 4  # steps before which row groups of a remote store are asked for
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Batch:
    """Rows of one step, in order. A row that does not decode is missing and named in undecodable."""

    ids: list[str]
    pixels: np.ndarray | torch.Tensor  # (b, S, S, 3) uint8
    targets: np.ndarray | torch.Tensor  # (b, E) float32, unit length
    texts: np.ndarray | torch.Tensor | None  # (b, E) float32, unit length; zero: has no caption
    position: np.ndarray  # (b,) of each row in the whole step
    undecodable: list[str]


class TrainingOrder:
    """Which samples a step shows, and how: part start:stop of each batch of a run.

    image_sizes (px): one of them a step, a function of seed and step.
    """

    def __init__(self, sampler: Sampler, min_crop_area: float, image_sizes: Sequence[int]):
        self.sampler, self.min_crop_area = sampler, min_crop_area
        self.image_sizes = image_sizes

    def image_size(self, step: int) -> int:
        if len(self.image_sizes) == 1:
            return self.image_sizes[0]
        return int(np.random.default_rng([self.sampler.seed, step]).choice(self.image_sizes))

    def rows(self, step: int, start: int, stop: int) -> tuple[np.ndarray, int, int]:
        """Numbers of the rows, epoch, seed."""
        position = self.sampler.position(step)
        return self.sampler.rows(position, start, stop), position.epoch, position.seed

    def samples(self, dataset: Dataset, step: int, start: int, stop: int) -> Iterator[Sample]:
        rows, epoch, seed = self.rows(step, start, stop)
        for row in map(int, rows):
            sample = dataset.sample(row, epoch, seed)
            if self.min_crop_area < 1:
                sample = cropped(sample, self.min_crop_area, seed, epoch, row)
            yield sample


class GivenOrder:
    """Rows of these numbers at view 0, cut into steps."""

    def __init__(self, numbers: Iterable[int], batch: int, image_size: int):
        self.numbers, self.batch = np.asarray(list(numbers), np.int64), batch
        self.image_sizes = [image_size]

    def image_size(self, step: int) -> int:
        return self.image_sizes[0]

    def rows(self, step: int, start: int, stop: int) -> tuple[np.ndarray, int, int]:
        """Numbers of the rows, epoch, seed."""
        first = step * self.batch
        return self.numbers[first + start : first + min(stop, self.batch)], 0, 0

    def samples(self, dataset: Dataset, step: int, start: int, stop: int) -> Iterator[Sample]:
        rows, _, _ = self.rows(step, start, stop)
        for row in map(int, rows):
            yield dataset.sample(row)


def training_batches(
    dataset: Dataset,
    sampler: Sampler,
    start: int,
    stop: int,
    *,
    workers: int,
    rank: int = 0,
    ranks: int = 1,
    min_crop_area: float = 1.0,
    image_sizes: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """Steps start..stop of a run, of each the part of this rank.

    workers: threads, or processes where device is a GPU, which the pixels are copied to a batch
    ahead. min_crop_area: least fraction of a view's area that is shown, a function of seed, epoch
    and row. image_sizes (px): one of them a step; None: the dataset's own. Raises PipelineError
    where a worker ends or shared memory is too small.
    """
    part = sampler.batch // ranks
    order = TrainingOrder(sampler, min_crop_area, image_sizes or [dataset.image_size])
    on_gpu = device is not None and device.type == "cuda"
    with Loader(dataset, order, rank * part, part, workers, processes=on_gpu) as loader:
        batches = loader.batches(range(start, stop))
        yield from on_device(batches, device) if on_gpu else batches


def held_out_batches(
    dataset: Dataset, numbers: Sequence[int], batch: int, *, workers: int
) -> Iterator[Batch]:
    """The rows of these numbers at view 0 (the dataset must be made with views=1), in order."""
    order = GivenOrder(numbers, batch, dataset.image_size)
    with Loader(dataset, order, 0, batch, workers) as loader:
        yield from loader.batches(range(-(-len(order.numbers) // batch)))


class Loader:
    """Workers that fill a few batches of shared memory, in turn, each its part of every batch.

    first: position in the whole batch of this loader's first row; size: rows of a batch it makes.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: TrainingOrder | GivenOrder,
        first: int,
        size: int,
        workers: int,
        processes: bool = False,
    ) -> None:
        self.workers, self.processes = workers, processes
        self.parts = max(1, min(workers, size))
        slots, side = AHEAD + 3, max(order.image_sizes)  # one is used, one copied, one given back
        shape = slots, size, side, side, 3
        if processes:
            _check_shared_memory(int(np.prod(shape)))
        self.pixels = torch.empty(shape, dtype=torch.uint8)
        if processes:
            self.pixels.share_memory_()
        self.pinned = processes and torch.cuda.is_available()
        self.filler = Filler(dataset, order, self.pixels, first, self.parts)

    def __enter__(self) -> "Loader":
        if self.pinned:  # copies to the device then run beside it
            size = self.pixels.numel()
            torch.cuda.check_error(
                torch.cuda.cudart().cudaHostRegister(self.pixels.data_ptr(), size, 0)
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.pinned:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self.pixels.data_ptr())

    def batches(self, steps: Iterable[int]) -> Iterator[Batch]:
        """In order. In pinned memory the pixels of a batch are valid until the next but one."""
        wanted = ((step, part) for step in steps for part in range(self.parts))
        filled = self._by_processes(wanted) if self.processes else self._by_threads(wanted)
        with closing(filled):  # ty: ignore[invalid-argument-type]  # ends the workers
            while parts := list(islice(filled, self.parts)):
                for part in parts:
                    if isinstance(part, PipelineError):
                        raise part
                yield self._batch(parts)

    def _by_threads(self, wanted: Iterator[tuple[int, int]]) -> Iterator:
        return ahead(self.filler.__getitem__, wanted, self.workers, AHEAD * self.parts)

    def _by_processes(self, wanted: Iterator[tuple[int, int]]) -> Iterator:
        loader = DataLoader(
            self.filler,  # ty: ignore[invalid-argument-type]
            batch_size=None,
            sampler=wanted,
            num_workers=self.parts,
            collate_fn=_as_it_is,
            prefetch_factor=AHEAD,
            multiprocessing_context="spawn",
            worker_init_fn=_end_with_parent,
        )
        try:
            yield from loader
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise PipelineError(
                f"a loader process has ended ({str(error).splitlines()[0]}). Where memory was "
                "short, give fewer --workers or lower distill.batch or distill.shuffle_row_groups. "
                "Run the command again: it goes on from its last checkpoint."
            ) from None

    def _batch(self, parts: list["Part"]) -> Batch:
        slot = sized(self.pixels[parts[0].slot], parts[0].side)
        position = np.concatenate([part.position for part in parts])
        if len(position) < len(slot):
            slot = slot[torch.from_numpy(position - self.filler.first)]
        parts = [part for part in parts if part.targets is not None]
        texts = [part.texts for part in parts if part.texts is not None]
        return Batch(
            ids=[image_id for part in parts for image_id in part.ids],
            pixels=slot if self.pinned else slot.clone().numpy(),
            targets=np.concatenate([part.targets for part in parts]),
            texts=np.concatenate(texts) if texts else None,
            position=position,
            undecodable=[image_id for part in parts for image_id in part.undecodable],
        )


@dataclass(frozen=True)
class Part:
    """What a worker says of the pixels that it has written."""

    slot: int
    side: int  # px of its pixels
    ids: list[str]
    targets: np.ndarray | None  # (n, E); None where this part of the batch has no rows
    texts: np.ndarray | None  # (n, E), where captions are read
    position: np.ndarray  # (n,)
    undecodable: list[str]


class Filler:
    """(step, part) -> that part's pixels, written into shared memory, and the Part that says so.

    Runs in a worker. A PipelineError is returned, since one that is raised loses its form on the
    way between processes.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: TrainingOrder | GivenOrder,
        pixels: torch.Tensor,
        first: int,
        parts: int,
    ) -> None:
        self.dataset, self.order, self.pixels = dataset, order, pixels
        self.first, self.parts = first, parts

    def __getitem__(self, wanted: tuple[int, int]) -> Part | PipelineError:
        step, part = wanted
        slots, size = self.pixels.shape[:2]
        start, stop = size * part // self.parts, size * (part + 1) // self.parts
        try:
            return self._fill(step % slots, step, start, stop)
        except PipelineError as error:
            return error

    def _fill(self, slot: int, step: int, start: int, stop: int) -> Part:
        side = self.order.image_size(step)
        seen = sized(self.pixels[slot], side).numpy()
        shown, position, undecodable, length = [], [], [], 0
        part = self.first + start, self.first + stop
        if self.dataset.remote:
            self.dataset.read_ahead(*self.order.rows(step + READ_AHEAD, *part))
        samples = self.order.samples(self.dataset, step, *part)
        for at, sample in enumerate(samples, start):
            pixels, length = self.dataset.pixels(sample, side), len(sample.target)
            if pixels is None:
                undecodable.append(sample.image_id)
                continue
            seen[at] = pixels
            shown.append(sample)
            position.append(self.first + at)
        targets = texts = None
        if length:
            targets = np.zeros((len(shown), length), np.float32)
            texts = np.zeros_like(targets) if self.dataset.captions else None
        for i, sample in enumerate(shown):
            if targets is not None:
                targets[i] = sample.target
            if texts is not None and sample.text is not None:
                texts[i] = sample.text
        ids = [sample.image_id for sample in shown]
        return Part(slot, side, ids, targets, texts, np.array(position, np.int64), undecodable)


def sized(slot: torch.Tensor, side: int) -> torch.Tensor:
    """The first bytes of a slot (b, S, S, 3) as a batch of smaller pixels (b, side, side, 3)."""
    return slot.flatten()[: len(slot) * side * side * 3].view(len(slot), side, side, 3)


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches whose tensors lie on a GPU, copied there while the batch before is worked on.

    Work on at most two batches is queued on the device, so that memory does not grow.
    """
    copies, working = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    waiting, queued = None, []
    for batch in batches:
        if waiting:
            waiting[1].synchronize()  # its slot of shared memory may be filled again
        with torch.cuda.stream(copies):
            tensors = {
                name: torch.as_tensor(value).to(device, non_blocking=True)
                for name in ("pixels", "targets", "texts")
                if (value := getattr(batch, name)) is not None
            }
            copied = copies.record_event()
        ready, waiting = waiting, (replace(batch, **tensors), copied)
        if ready:
            yield from _handed_over(*ready, working, queued)
    if waiting:
        yield from _handed_over(*waiting, working, queued)


def _handed_over(
    batch: Batch, copied: torch.cuda.Event, working: torch.cuda.Stream, queued: list
) -> Iterator[Batch]:
    working.wait_event(copied)
    for tensor in (batch.pixels, batch.targets, batch.texts):
        if tensor is not None:
            tensor.record_stream(working)  # ty: ignore[missing-union-attribute]
    yield batch
    queued.append(working.record_event())
    if len(queued) > 2:
        queued.pop(0).synchronize()


def _as_it_is(item: object) -> object:
    return item


def _end_with_parent(_: int) -> None:
    """A worker whose parent was killed ends; torch's own watch misses a parent that died early."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()  # ty: ignore[missing-union-attribute]
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _check_shared_memory(needed: int) -> None:
    """Raises PipelineError now, since a process that fills it up later is killed (SIGBUS)."""
    if not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        size = f"{needed / 2**20:.0f} MB"
        raise PipelineError(
            f"the loader's processes hand over pixels in {size} of shared memory, and "
            f"{SHARED_MEMORY} has {free / 2**20:.0f} MB free. In a container set --shm-size="
            f"{2 * needed // 2**20 + 1}m (Kubernetes: an emptyDir of medium Memory on "
            f"{SHARED_MEMORY}), or lower distill.batch."
        )
