"""One process or several under torchrun: who am I, and what do we see together.

Losses that compare the rows of a batch compare the whole batch, so every rank computes the loss of
the gathered batch; only its own rows carry gradients, and the ranks' gradients are then added,
while the backward pass still runs.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import digest

SILENCE = timedelta(minutes=10)  # of a rank, after which the others take it for dead


class Ranks:
    """rank of size, and this rank's device. size is 1 without torchrun."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        if self.size > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            # numbers that are on the CPU are exchanged there, so that no GPU has to be waited for
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=SILENCE)

    @property
    def first(self) -> bool:
        """True on the one rank that writes files."""
        return self.rank == 0

    def check_batch(self, batch: int) -> None:
        """Raises PipelineError where a batch cannot be shared out evenly."""
        if batch % self.size:
            raise PipelineError(
                f"distill.batch {batch} cannot be shared by {self.size} ranks. Choose a multiple."
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """What the ranks do together. Raises PipelineError where another one has ended."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _lost_a_rank(error):
                raise
            raise PipelineError(
                f"rank {self.rank} of {self.size}: another rank has ended, or did not answer for "
                f"{SILENCE.seconds // 60} minutes; its own output says why. Start the same command "
                "on all machines again: it goes on from the last checkpoint."
            ) from None
        finally:
            if self.size > 1:
                dist.destroy_process_group()

    def require_same(self, **facts: object) -> None:
        """Raises PipelineError, on every rank, where the ranks do not see the same of something."""
        if self.size == 1:
            return
        own = torch.tensor([int(digest(fact)[:15], 16) for fact in facts.values()])
        seen = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(seen, own)
        same = [len(set(column)) == 1 for column in zip(*(s.tolist() for s in seen), strict=True)]
        if wrong := [name for name, equal in zip(facts, same, strict=True) if not equal]:
            raise PipelineError(
                f"the {self.size} ranks do not see the same {' and '.join(wrong)}. All machines "
                "need one data folder that all of them see, the same params.yaml and the same "
                "version of this project."
            )

    def gather(self, own: Tensor) -> Tensor:
        """(b, ...) of each rank -> (B, ...) of all, in rank order; own rows keep their gradient.

        Ranks may bring different numbers of rows (rows that did not decode are missing).
        """
        if self.size == 1:
            return own
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(own)]))
        most = int(torch.stack(counts).max())
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own.detach()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded.contiguous())
        parts = [part[: int(count)] for part, count in zip(parts, counts, strict=True)]
        parts[self.rank] = own
        return torch.cat(parts)

    def summing_gradients(self, network: nn.Module) -> nn.Module:
        """The network, whose gradients are the sum over ranks of those of `sized` losses."""
        if self.size == 1:
            return network
        on_gpu = self.device.type == "cuda"
        return DistributedDataParallel(network, device_ids=[self.device] if on_gpu else None)

    def sized(self, loss: Tensor) -> Tensor:
        """A loss whose gradients, averaged over ranks, are the sum that is wanted."""
        return loss * self.size

    def total(self, count: int) -> int:
        """A count over all ranks."""
        if self.size == 1:
            return count
        tensor = torch.tensor([count])
        dist.all_reduce(tensor)
        return int(tensor)

    def wait(self) -> None:
        """Until every rank is here."""
        self.total(0)


def _lost_a_rank(error: RuntimeError) -> bool:
    """Whether an error says that the connection to another rank has gone."""
    said = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in said or "nccl" in said
