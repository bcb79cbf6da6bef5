"""What commands look at first: is data/ as the parameters ask, who is the teacher."""

import errno
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.layout import STAGES
from pipeline.core.terminal import say


def refuse_outdated(params: Path, data: Path, stage: str) -> None:
    """Raises PipelineError where a stage would read what is not as the parameters ask for."""
    from pipeline.verify.freshness import message, outdated

    require_data(data)
    if found := outdated(params, data, STAGES[stage].inputs):
        raise PipelineError(message(found))


def warn_outdated(params: Path, data: Path, card: Path | None = None) -> None:
    """Say, in one line, what of data/ is not as the parameters ask for.

    card: a teacher card that was named in place of the parameters' one.
    """
    from pipeline.verify.freshness import message, outdated

    if not params.is_file():  # a folder of results, without the project that made it
        return
    try:
        if found := outdated(params, data, card=card):
            say(f"warning: {message(found)}", err=True)
    except PipelineError as error:
        say(f"warning: {data} was not compared with {params}: {error}", err=True)


def require_data(data: Path) -> None:
    """Raises PipelineError where the folder of all results is not there; nothing is made."""
    if not data.is_dir():
        raise PipelineError(
            f"there is no folder {data}. Run `dvc repro` or `pipeline download` first, or name the "
            "folder that holds the results with --data."
        )


def named_card(card: Path | None, params: Path) -> Path | None:
    """The teacher card that was named, else the parameters'; None without either."""
    from pipeline.core.config import load_section

    if card is None and params.is_file():
        return Path(load_section(params, "teacher_embed").card)
    return card


_OURS = "PipelineError: "


def message_of(error: Exception) -> str | None:
    """What a user is told of what ended a command; None for a fault of this program.

    What reads shards for DuckDB raises inside of it, and DuckDB passes on nothing but the text.
    """
    if isinstance(error, PipelineError):
        return str(error)
    if _OURS in str(error):
        return str(error).rsplit(_OURS)[-1].strip()
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOSPC:
        return f"the disk is full ({error}). Free space and run the same command: it goes on."
    if number in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"{error}. Give this user the right to write there, or choose another --data."
    return None
