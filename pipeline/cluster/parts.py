"""A plan's work in n parts, for anything that starts n processes: Slurm, torchrun, Kubernetes."""

import os
import re
from typing import NamedTuple

from pipeline.core.errors import PipelineError


class Share(NamedTuple):
    """Every count-th shard of a plan, from the number-th on."""

    number: int
    count: int

    def of(self, names: list[str]) -> list[str]:
        return names[self.number :: self.count]


def parse_share(text: str) -> Share:
    """`3/16`: the fourth of sixteen; `auto`: as the launcher says in the environment.

    Raises PipelineError for anything else.
    """
    named = _launched() if text == "auto" else text
    match = re.fullmatch(r"(\d+)/(\d+)", named)
    if match is None or not int(match[1]) < int(match[2]):
        raise PipelineError(
            f"--part {text}: found {named}; expected NUMBER/COUNT, counted from 0 (0/16 to 15/16)."
        )
    return Share(int(match[1]), int(match[2]))


def _launched() -> str:
    """NUMBER/COUNT as Slurm's job arrays or torchrun say it."""
    if number := os.environ.get("SLURM_ARRAY_TASK_ID"):
        first = os.environ.get("SLURM_ARRAY_TASK_MIN", "0")
        step = os.environ.get("SLURM_ARRAY_TASK_STEP", "1")
        if all(part.isdigit() for part in (number, first, step)):
            number = str((int(number) - int(first)) // max(1, int(step)))
        return f"{number}/{os.environ.get('SLURM_ARRAY_TASK_COUNT')}"
    if number := os.environ.get("RANK"):
        return f"{number}/{os.environ.get('WORLD_SIZE')}"
    raise PipelineError(
        "--part auto: neither SLURM_ARRAY_TASK_ID (a Slurm job array) nor RANK (torchrun) is set. "
        "Name the part, such as --part 3/16."
    )
