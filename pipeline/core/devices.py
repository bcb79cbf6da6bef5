"""Which device and which dtype: decided by the hardware, never by a stop-watch."""

import os

import torch

from pipeline.core.errors import PipelineError


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one. Raises PipelineError for an unusable device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise PipelineError(
            f"--device {name} cannot be used: {reason}. Try --device cpu."
        ) from None
    return device


def own_device(name: str) -> torch.device:
    """The device that this process works on: under torchrun its own GPU, and no other is opened.

    Raises PipelineError for a device that cannot be used.
    """
    if name in ("auto", "cuda") and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    return pick_device(name)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else float32."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        able = torch.cpu.get_capabilities()
        native = bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16"))
    return torch.bfloat16 if native else torch.float32
