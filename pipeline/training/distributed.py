"""One process or several under torchrun: who am I, and what do we see together.

Losses that compare the rows of a batch compare the whole batch, so every rank computes the loss of
the gathered batch; only its own rows carry gradients, and the ranks' gradients are then added,
while the backward pass still runs.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.core.errors import PipelineError


class Ranks:
    """rank of size, and this rank's device. size is 1 without torchrun."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        if self.size > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            # numbers that are on the CPU are exchanged there, so that no GPU has to be waited for
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")

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

    def end(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()
