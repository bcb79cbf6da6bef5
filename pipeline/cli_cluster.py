"""The options of commands whose work may be shared by many processes or machines."""

from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.core.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.cluster.parts import Share
    from pipeline.cluster.ray import Tasks

Part = Annotated[
    str | None,
    typer.Option(
        "--part",
        help="3/16 (counted from 0) or auto: make this part of the shards only, beside other "
        "processes; the command without it then publishes.",
    ),
]
Ray = Annotated[
    bool,
    typer.Option(
        "--ray",
        help="Make the shards on a Ray cluster, one task each: that of RAY_ADDRESS, or one of "
        "this machine alone.",
    ),
]
RayCpus = Annotated[float, typer.Option("--ray-cpus", min=0, help="Processors of a task.")]
RayGpus = Annotated[float, typer.Option("--ray-gpus", min=0, help="GPUs of a task.")]


def named_share(part: str | None) -> "Share | None":
    """The share of the shards that --part names; None without it."""
    from pipeline.cluster.parts import parse_share

    return None if part is None else parse_share(part)


def named_tasks(ray: bool, part: str | None, cpus: float, gpus: float) -> "Tasks | None":
    """What a task asks for with --ray; None without it.

    Raises PipelineError where --part is named too.
    """
    from pipeline.cluster.ray import Tasks

    if ray and part is not None:
        raise PipelineError("--ray or --part: one of the two. Ray shares out all shards itself.")
    return Tasks(cpus, gpus) if ray else None
