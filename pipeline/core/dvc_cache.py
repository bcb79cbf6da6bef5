"""What dvc.lock names and DVC's cache holds: an out that DVC deleted before it ran the stage."""

import contextlib
import functools
import json
import subprocess
import sys
from pathlib import Path

import yaml


def locked_out(data: Path, folder: str) -> tuple[str, dict[str, Path]] | None:
    """The digest of data/<folder> in dvc.lock, and its files: name below the folder -> its file in
    DVC's cache, which may be missing. None where no dvc.lock beside data/ names it.

    The files of an out whose list is not in the cache are {}.
    """
    root = data.resolve().parent
    digest = _locked_digest(root / "dvc.lock", f"{data.resolve().name}/{folder}")
    if digest is None or (cache := _cache_folder(root)) is None:
        return None
    listed = cache / digest[:2] / digest[2:]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        rows = json.loads(listed.read_text())
        return digest, {r["relpath"]: cache / r["md5"][:2] / r["md5"][2:] for r in rows}
    return digest, {}


def _locked_digest(lock: Path, out: str) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        for stage in (
            yaml.safe_load(lock.read_text(encoding="utf-8")).get("stages") or {}
        ).values():
            for entry in stage.get("outs") or []:
                if entry.get("path") == out and str(entry.get("md5", "")).endswith(".dir"):
                    return entry["md5"]
    return None


def locks_other_images(data: Path) -> bool:
    """Whether dvc.lock was written for another manifest than params.yaml beside it names, as the
    demo's is in a fresh clone: what it names then was never here."""
    root = data.resolve().parent
    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        lock = yaml.safe_load((root / "dvc.lock").read_text(encoding="utf-8"))
        params = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
        was = lock["stages"]["download"]["params"]["params.yaml"]["download"]["manifest"]
        return was != params["download"]["manifest"]
    return False


@functools.cache
def _cache_folder(root: Path) -> Path | None:
    """DVC's cache of files, wherever its configuration puts it; None where DVC is not in use."""
    command = [sys.executable, "-m", "dvc", "cache", "dir"]
    try:
        answer = subprocess.run(
            command, cwd=root, capture_output=True, text=True, check=True, timeout=120
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return Path(root, answer.stdout.strip().splitlines()[-1], "files/md5")
