"""`pipeline --store`: where the remote store is; `pipeline store`: what lies in stores unneeded."""

import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline.core.layout import ADDRESS
from pipeline.core.terminal import say

stores = typer.Typer(no_args_is_help=True, help="The finished shards of stage one.")


def name_store(
    store: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Where shards lie whose stage says `store: remote`, such as s3://bucket/folder; or "
            "set EXTRAHEAD_STORE.",
        ),
    ] = None,
) -> None:
    """Of all commands: `pipeline --store URL COMMAND`."""
    if store:
        os.environ[ADDRESS] = store


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
        for store, entry in shards:
            say(f"{entry.bytes:>14,} bytes  {store.path(entry)}")
        total = sum(entry.bytes for _, entry in shards)
        for store, entry in shards if delete else ():
            store.remove(entry)
    done = "deleted" if delete else "would be deleted; add --delete"
    say(f"{len(shards)} shards, {total:,} bytes {done}" if shards else "nothing to delete")
