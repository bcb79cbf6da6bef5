"""The commands of `pipeline store`: what lies there that nothing needs."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.core.terminal import say

stores = typer.Typer(no_args_is_help=True, help="The finished shards of stage one.")


@stores.command("gc")
def gc(
    days: Annotated[float, typer.Option(min=0, help="Keep what is younger.")] = 14.0,
    delete: Annotated[bool, typer.Option("--delete", help="Delete what is named.")] = False,
    data: Annotated[Path, typer.Option("--data", help="Folder of all results.")] = Path("data"),
) -> None:
    """Name the shards that no published stamp names, such as those of runs that nobody will finish;
    with --delete, delete them.
    """
    from pipeline.core.plans import unneeded
    from pipeline.core.provenance import lock

    with lock(data, "store gc"):
        shards = unneeded(data, days)
        for path in shards:
            say(f"{path.stat().st_size:>14,} bytes  {path}")
        total = sum(path.stat().st_size for path in shards)
        for path in shards if delete else ():
            path.unlink()
    done = "deleted" if delete else "would be deleted; add --delete"
    say(f"{len(shards)} shards, {total:,} bytes {done}" if shards else "nothing to delete")
