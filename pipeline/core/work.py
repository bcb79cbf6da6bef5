"""The work folder of a stage: what is finished survives a kill, and the out is replaced at the end."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.core.layout import STAMP_FILE, WORK
from pipeline.core.outs import (
    is_published,
    make_stamp,
    place_out,
    recipe_digest,
    refuse_unexpected,
)
from pipeline.core.provenance import PARTIAL, file_digest, stored_file, write_file, write_json
from pipeline.core.records import Recipe


class Work:
    """One stage's run: its lock, its work folder, and the way its files reach the out.

    stage: its name; out: the DVC out, a folder below data; recipe: all that determines the bytes.
    """

    def __init__(self, data: Path, stage: str, out: Path, recipe: Recipe):
        self.data, self.stage, self.out, self.recipe = data, stage, out, recipe
        self.stamp = recipe_digest(recipe)
        self.stage_folder = data / WORK / stage
        self.folder = self.stage_folder / self.stamp

    def published(self) -> bool:
        """True if the out already holds this run, complete, and nothing else."""
        return is_published(self.out, self.stage, self.recipe)

    def begin(self) -> None:
        """Refuse an out that holds unexpected files; open the work folder.

        What was damaged since an earlier run finished goes: its out shares the bytes (hard links),
        so that deleting the damaged out alone would bring them back. Even a damaged stamp vouches
        for a file whose digest it holds.
        """
        refuse_unexpected(self.out, self.stage)
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.rglob("*" + PARTIAL):
            leftover.unlink()
        if (self.folder / STAMP_FILE).is_file():
            vouched = (self.folder / STAMP_FILE).read_text(errors="replace")
            for path in filter(Path.is_file, self.folder.rglob("*")):
                named = json.dumps(str(path.relative_to(self.folder))) in vouched
                if named and file_digest(path) not in vouched:
                    path.unlink()

    def earlier(self) -> list[Path]:
        """Folders whose finished files may be reused: other stamps' work, then the out."""
        return [*self._other_stamps(), *([self.out] if (self.out / STAMP_FILE).is_file() else [])]

    def _other_stamps(self) -> list[Path]:
        folders = [
            path
            for path in self.stage_folder.glob("*")
            if path.is_dir() and len(path.name) == len(self.stamp)
        ]
        folders = [path for path in folders if path != self.folder]
        return sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def commit(self, name: str, write: Callable[[Path], object]) -> None:
        """Finish one file of the work folder; the only door through which one gets there."""
        (self.folder / STAMP_FILE).unlink(missing_ok=True)  # a finished run's no longer
        write_file(self.folder / name, write)

    def publish(self, names: list[str], summary: dict[str, Any]) -> None:
        """Make the out exactly these files of the work folder plus the stamp file, by links.

        The out is built aside and renamed into place: it is never half of two runs. Older work
        folders are removed then.
        """
        files = {name: stored_file(self.folder / name) for name in names}
        stamp = make_stamp(self.stage, self.recipe, files, summary)
        write_json(self.folder / STAMP_FILE, stamp.model_dump())
        place_out(
            self.data, self.stage, self.out, {n: self.folder / n for n in [*files, STAMP_FILE]}
        )
        for folder in self._other_stamps():
            shutil.rmtree(folder)
