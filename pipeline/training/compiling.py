"""torch.compile where it helps and can: on a GPU, with the compilers that it needs."""

import importlib.util
import shutil

import torch
from torch import nn

from pipeline.core.terminal import say


def compiled(network: nn.Module, device: torch.device) -> nn.Module:
    """The network as one compiled graph of fixed shapes on a GPU; itself on a CPU, where it gained
    nothing (benchmarks/README.md), and with a warning where Triton or a C compiler is missing.
    """
    if device.type != "cuda":
        return network
    missing = [] if importlib.util.find_spec("triton") else ["the package triton"]
    missing += [] if any(map(shutil.which, ("cc", "gcc", "clang"))) else ["a C compiler"]
    if missing:
        say(f"distill: not compiled, for {', '.join(missing)} is missing: slower", err=True)
        return network
    return torch.compile(network, dynamic=False)  # ty: ignore[invalid-explicit-return]
