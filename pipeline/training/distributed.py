"""One process or several under torchrun: who am I, and what do we see together.

Losses that compare the rows of a batch compare the whole batch, so every rank computes the loss of
the gathered batch; only its own rows carry gradients, and the ranks' gradients are then added.
"""

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.core.errors import PipelineError


class Ranks:
    """rank of size, and this rank's device. size is 1 without torchrun."""

    def __init__(self, device: torch.device):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        if self.size > 1:
            if device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

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
        counts = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(own)], device=own.device))
        most = int(torch.stack(counts).max())
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own.detach()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded.contiguous())
        parts = [part[: int(count)] for part, count in zip(parts, counts, strict=True)]
        parts[self.rank] = own
        return torch.cat(parts)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up all ranks' gradients, in one message."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        together = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(together)
        for gradient, part in zip(
            gradients, together.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))

    def total(self, count: int) -> int:
        """A count over all ranks."""
        if self.size == 1:
            return count
        tensor = torch.tensor([count], device=self.device)
        dist.all_reduce(tensor)
        return int(tensor)

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def end(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()
