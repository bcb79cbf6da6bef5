"""A store that is not on this disk: S3, Google Cloud, Azure, or whatever else fsspec reaches.

Its address comes from `--store` or the environment variable EXTRAHEAD_STORE, never from a parameter:
it is not hashed, not in a stamp, and no message shows it, for it may hold a password. Below it
shards lie as in data/.store: images/<stored name>, teacher/images/<stored name> ...

An object of a store is whole or not there, and its name says what its bytes are; so it is written by
one request, from a file that was hashed, and nothing that was written is ever changed.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.core.errors import PipelineError
from pipeline.core.layout import ADDRESS, BY_FOLDER, command

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure"}
_PARTIAL = ".partial"
_NAMED = f"the remote store (--store, or {ADDRESS})"


def has_address() -> bool:
    return bool(os.environ.get(ADDRESS))


def _opened() -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of the store, and the path of its root there."""
    if not has_address():
        raise PipelineError(
            "the shards lie in a remote store, whose address is not known. Name it, such as "
            f"`pipeline --store s3://bucket/folder ...`, or set {ADDRESS}; or write `store: local` "
            "in the section of the stage, and run it."
        )
    return _open(os.environ[ADDRESS], os.getpid())


@lru_cache(maxsize=4)
def _open(address: str, process: int) -> tuple[fsspec.AbstractFileSystem, str]:
    """process: what talks to a store in threads of its own does not survive a fork."""
    protocol = address.split("://")[0]
    if "://" not in address:
        raise PipelineError(
            f"{ADDRESS} is no address of a store; expected one like s3://bucket/folder."
        )
    try:
        return fsspec.core.url_to_fs(
            address, use_listings_cache=False, skip_instance_cache=True, **_options(protocol)
        )
    except ImportError:
        extra = _EXTRAS.get(protocol)
        install = (
            f"pip install 'extrahead[{extra}]'"
            if extra
            else f"a package of fsspec's for {protocol}"
        )
        raise PipelineError(f"stores of the kind {protocol}:// need {install}.") from None
    except ValueError:
        raise PipelineError(
            f"{ADDRESS}: no store of the kind {protocol}:// is known; expected s3://, gs://, az:// or file://."
        ) from None


def _options(protocol: str) -> dict[str, Any]:
    """Bounded waits where the library's own are not."""
    if protocol not in ("s3", "s3a"):
        return {}
    times = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 3}}
    return {"config_kwargs": times}


@contextmanager
def _asking(key: str) -> Iterator[tuple[fsspec.AbstractFileSystem, str]]:
    """The file system and a key's path in it, for one request.

    Raises PipelineError saying what is wrong with the store, without its address.
    """
    files, root = _opened()
    try:
        yield files, f"{root.rstrip('/')}/{key}".rstrip("/")
    except PipelineError:
        raise
    except FileNotFoundError:
        raise _lacks(key) from None
    except PermissionError as error:
        raise PipelineError(
            f"{_NAMED} does not allow this ({_said(error)}): it may be read-only, or the credentials are "
            "not its own. Nothing is lost: mend that, and run the same command again."
        ) from None
    except Exception as error:  # each library has its own: none of them is an OSError alone
        raise PipelineError(
            f"{_NAMED} cannot be used ({_said(error)}). Check its address, the network, the credentials "
            "and the space that is left there. Nothing is lost: run the same command again."
        ) from None


def _lacks(key: str) -> PipelineError:
    folder = key.split("/")[0]
    run = f"pipeline {command(BY_FOLDER[folder].name)}" if folder in BY_FOLDER else "dvc repro"
    return PipelineError(
        f"{_NAMED} lacks {key}. Is it another store than data/ was made with? If not, `{run}` makes "
        "what is missing and reuses the rest."
    )


def _said(error: Exception) -> str:
    """The kind of an error and its first line, without addresses: they may hold a password."""
    lines = str(error).splitlines() or [""]
    text = re.sub(r"\S*(://|@)\S*", "...", lines[0])
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search("KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL|CONNECTION", name):
            text = text.replace(value, "...")
    return f"{type(error).__name__}: {text}"[:300].removesuffix(": ")


class Listed(NamedTuple):
    """What a listing says of an object."""

    bytes: int
    time: float  # when it was written, s since 1970; 0 where the store does not say


def listed(prefix: str) -> dict[str, Listed]:
    """Key -> what is said of it, of all below a prefix, by one listing."""
    with _asking(prefix) as (files, path):
        try:
            found = files.find(path, detail=True)
        except FileNotFoundError:
            found = {}
        return {
            f"{prefix}/{name[len(path) :].lstrip('/')}": Listed(int(one["size"]), _time(one))
            for name, one in found.items()
        }


def _time(said: dict[str, Any]) -> float:
    """Of S3, Azure, Google Cloud, a folder: each has its own word for it."""
    for name in ("LastModified", "last_modified", "mtime", "updated"):
        value = said.get(name)
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return value.timestamp()
        if value:
            return float(value)
    return 0.0


def put(source: os.PathLike, key: str) -> None:
    """Send a file; the object is whole or not there."""
    with _asking(key) as (files, path):
        if isinstance(files, LocalFileSystem):  # which has no whole writes, but renames
            aside = f"{path}.{os.getpid()}{_PARTIAL}"
            files.makedirs(files._parent(path), exist_ok=True)
            files.put_file(os.fspath(source), aside)
            os.replace(aside, path)
        else:
            files.put_file(os.fspath(source), path)


def read(key: str, start: int | None = None, stop: int | None = None) -> bytes:
    """Bytes start:stop of an object, by one request."""
    with _asking(key) as (files, path):
        data = files.cat_file(path, start=start, end=stop)
        if start is not None and stop is not None and len(data) != stop - start:
            raise OSError(f"{len(data)} bytes came of {stop - start}")
        return data


def get(key: str, target: os.PathLike) -> None:
    """Bring an object to this disk."""
    with _asking(key) as (files, path):
        files.get_file(path, os.fspath(target))


def size(key: str) -> int:
    with _asking(key) as (files, path):
        return int(files.size(path))


def remove(key: str) -> None:
    with _asking(key) as (files, path), suppress(FileNotFoundError):
        files.rm_file(path)
