"""Where results come from and how files become final: digests, stamps, the lock.

DVC deletes a stage's outs before it runs the stage, so a stage works outside them, file by file
(temporary name, fsync, rename), and hard-links what is finished into its out at the end: whole
files of a small stage in `work`, shards that were paid for in the `store`.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Generator, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from pipeline.core.errors import PipelineError
from pipeline.core.layout import BY_FOLDER, STAGES, STAMP_FILE, command
from pipeline.core.records import Evaluation, Stamp, StoredFile, TeacherSummary

PARTIAL = ".partial"
Written = TypeVar("Written")
FULL = 1 << 16  # bytes free after a failed write: some libraries hide that the disk is full


def digest(value: Any) -> str:
    """32 hex digits of the SHA-256 of a JSON-able value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """32 hex digits of the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def stored_file(path: Path) -> StoredFile:
    """What a stamp says of a file."""
    return StoredFile(sha256=file_digest(path), bytes=path.stat().st_size)


def libraries(*names: str) -> dict[str, str]:
    """Installed versions: recorded beside results, never part of a stamp."""
    return {name: version(name) for name in names}


def read_text(file: Path, name: str, expected: str) -> str:
    """A text file that a person wrote. Raises PipelineError where it is missing or not UTF-8.

    name: what to call it; expected: sentences that say what it should hold and who names it.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"{name} cannot be read ({error}). {expected}") from None


def write_file(path: Path, write: Callable[[Path], Written]) -> Written:
    """The one way a file becomes final: written under another name, fsynced, renamed.

    write: gets the temporary path; what it returns is returned. A file under its final name is
    therefore complete.
    """
    _make_folder(path.parent)
    partial = path.with_name(path.name + PARTIAL)
    try:
        written = write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        return written
    except BaseException as error:
        full = shutil.disk_usage(path.parent).free < FULL
        partial.unlink(missing_ok=True)
        if full and isinstance(error, Exception) and getattr(error, "errno", None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise PipelineError(
            f"{folder} cannot be made: a file is in the way. Move it, or name another place."
        ) from None


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_file(path, lambda partial: partial.write_text(text))


@contextlib.contextmanager
def lock(data: Path, stage: str) -> Generator[None]:
    """Hold data/ for one writing command. The kernel lets go of it when the process dies.

    Raises PipelineError naming who holds it.
    """
    path = data / ".work" / "lock"
    _make_folder(path.parent)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise PipelineError(
                f"{data} is in use by {file.read().strip() or 'another process'}. "
                "Wait for it to end, or end it, and run the command again."
            ) from None
        file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"{stage} (process {os.getpid()} on {socket.gethostname()}, since {started})\n")
        file.flush()
        yield


def sealed(stamp: dict[str, Any]) -> dict[str, Any]:
    """A stamp's values with the digest of all the rest of them, by which damage is noticed."""
    rest = {key: value for key, value in stamp.items() if key != "digest"}
    return rest | {"digest": digest(rest)}


def read_stamp(out: Path, stage: str) -> Stamp:
    """The stamp file of a finished stage; `stamp_of` reads that of a folder of data/.

    Raises PipelineError where the stage has not finished, and for a stamp that is damaged.
    """
    try:
        values = json.loads((out / STAMP_FILE).read_text())
        stamp = Stamp.model_validate(values)
    except (FileNotFoundError, NotADirectoryError):
        raise PipelineError(
            f"no {out / STAMP_FILE}. Run `pipeline {command(stage)}` first."
        ) from None
    except ValidationError as error:
        raise _damaged(out, stage, _wrong_keys(error)) from None
    except ValueError as error:
        raise _damaged(out, stage, str(error)) from None
    if sealed(values)["digest"] != stamp.digest:
        raise _damaged(out, stage, "it does not fit its own digest")
    return stamp


def _wrong_keys(error: ValidationError) -> str:
    keys = sorted({".".join(map(str, e["loc"])) or "all" for e in error.errors()})
    return f"missing, unknown or wrong in it: {', '.join(keys)}"


def _damaged(out: Path, stage: str, reason: str) -> PipelineError:
    return PipelineError(
        f"{out / STAMP_FILE} is damaged, or of another version ({reason}). Delete {out} and run "
        f"`pipeline {command(stage)}`."
    )


def stamp_of(data: Path, folder: str) -> Stamp:
    """The stamp of a folder of data/. Raises PipelineError as `read_stamp` does."""
    return read_stamp(data / folder, BY_FOLDER[folder].name)


def teacher_summary(data: Path) -> TeacherSummary:
    """What data/teacher says of its teacher. Raises PipelineError where it has not been made."""
    return summary_of(stamp_of(data, "teacher"))


def summary_of(stamp: Stamp) -> TeacherSummary:
    """The summary of data/teacher's stamp. Raises PipelineError for one that was edited."""
    try:
        return TeacherSummary.model_validate(stamp.summary)
    except ValidationError as error:
        raise PipelineError(
            f"the summary in data/teacher's {STAMP_FILE} is damaged ({_wrong_keys(error)}). Delete "
            f"data/teacher and run `pipeline {command(stamp.stage)}`."
        ) from None


def evaluation_of(data: Path) -> Evaluation:
    """The metrics of data/evaluation. Raises PipelineError where it has not been made."""
    stamp = stamp_of(data, "evaluation")
    try:
        return Evaluation.model_validate(stamp.summary)
    except ValidationError as error:
        raise _damaged(data / "evaluation", stamp.stage, _wrong_keys(error)) from None


def content(stamp: Stamp) -> str:
    """What a later stage's stamp chains: a digest of every file of a folder."""
    return digest({name: file.sha256 for name, file in stamp.files.items()})


def contents(stamps: dict[str, Stamp]) -> dict[str, Any]:
    """Folder -> content: the inputs of a recipe."""
    return {folder: content(stamp) for folder, stamp in stamps.items()}


def require_inputs(data: Path, stage: str) -> dict[str, Stamp]:
    """Folder -> stamp of all that a stage reads, each made from what lies in data/ now.

    Raises PipelineError where one is missing, damaged or made from something else.
    """
    return require_folders(data, STAGES[stage].inputs)


def require_folders(data: Path, folders: Iterable[str]) -> dict[str, Stamp]:
    """Folder -> stamp of these folders of data/, which are of one run.

    Raises PipelineError as `require_inputs` does.
    """
    stamps = {folder: stamp_of(data, folder) for folder in folders}
    for folder, stamp in stamps.items():
        if changed := outdated_inputs(stamp, stamps):
            raise PipelineError(
                f"data/{folder} was not made from the {' and '.join(changed)} that data/ holds now. "
                f"Run `pipeline {command(stamp.stage)}` first."
            )
    return stamps


def outdated_inputs(stamp: Stamp, stamps: dict[str, Stamp]) -> list[str]:
    """Which of its inputs, of those in stamps, changed since a folder was made from them."""
    inputs = [name for name in STAGES[stamp.stage].inputs if name in stamps]
    return [name for name in inputs if stamp.recipe.inputs.get(name) != content(stamps[name])]


def command_line() -> str:
    """How this process was started, for the record of a run."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
