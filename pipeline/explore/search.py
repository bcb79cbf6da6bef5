"""Nearest images of the collection to a vector, by student and by teacher, side by side.

Reads the stored vectors only: data/evaluation/index (the student's) and data/teacher (view 0).
Cost: the vectors are read once; then two matrix-vector products a search.
n images, E embedding size.
"""

import csv
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pipeline.core import terminal
from pipeline.core.choices import HitsFormat
from pipeline.core.errors import PipelineError
from pipeline.core.provenance import require_folders, write_file
from pipeline.data import database
from pipeline.data.pixels import decode
from pipeline.explore import plots
from pipeline.explore.nearest import load_sides, nearest

DRAWN = 12  # hits a side whose pictures are read and drawn, at most
WIDTH = 50  # columns of a cell in a table


@dataclass(frozen=True)
class Query:
    """What is searched for: unit vectors (E,), the same or each side's own, and what to know."""

    title: str
    student: np.ndarray
    teacher: np.ndarray
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Hit:
    """One image that was found; score: cosine to the query."""

    rank: int  # from 1
    score: float
    image_id: str
    caption: str | None  # or the label, where there is none
    url: str
    jpg: bytes | None = field(repr=False)  # of the first DRAWN hits at least


@dataclass(frozen=True)
class Hits:
    """The best images of a collection, best first, by each side."""

    title: str
    collection: int  # images that were searched
    student: list[Hit]
    teacher: list[Hit]
    notes: list[str]

    def rows(self) -> list[dict]:
        """One flat record per hit, without the pixels."""
        return [
            {"by": by} | {key: value for key, value in asdict(hit).items() if key != "jpg"}
            for by in ("student", "teacher")
            for hit in getattr(self, by)
        ]


class Collection:
    """The indexed images with their student (n, E) and teacher (n, E) vectors: see `nearest`.

    index: folder of the student's index, data/evaluation/index by default, which must then belong
    to the student and the teacher's vectors that lie in data. Raises PipelineError where it does
    not, or where a stage has not run.
    """

    def __init__(self, data: Path, index: Path | None = None):
        if index is None:
            index = data / "evaluation" / "index"
            require_folders(data, ("teacher", "student", "evaluation"))
        self.data, self._connection = data, database.connect(data)
        self._ids, self.student, self.teacher = load_sides(data, index)

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, image_id: str) -> bool:
        at = np.searchsorted(self._ids, key := image_id.encode())
        return bool(at < len(self) and self._ids[at] == key)

    def search(self, query: Query, k: int) -> Hits:
        """The best k images for a query; all of them, and a note, where there are fewer."""
        if k < 1:
            raise PipelineError(f"k is {k}: at least one image must be asked for.")
        if query.student.shape != self.student.shape[1:]:
            raise PipelineError(
                f"the query has {query.student.size} values, the index {self.student.shape[1]}: "
                "they come from different teachers. Run `pipeline evaluate`."
            )
        best = {
            "student": nearest(self.student, query.student, k),
            "teacher": nearest(self.teacher, query.teacher, k),
        }
        named = {by: [self._ids[row].decode() for row in rows] for by, (rows, _) in best.items()}
        wanted = [{key for keys in named.values() for key in keys[:n]} for n in (k, DRAWN)]
        facts = self.facts(*map(sorted, wanted))
        hits = {
            by: [
                Hit(rank, float(score), key, *facts[key])
                for rank, (key, score) in enumerate(zip(named[by], scores, strict=True), 1)
            ]
            for by, (_, scores) in best.items()
        }
        notes = list(query.notes)
        if k > len(self):
            notes.append(f"{k} images were asked for; the collection holds {len(self)}.")
        return Hits(query.title, len(self), **hits, notes=notes)

    def facts(self, ids: list[str], drawn: list[str]) -> dict[str, tuple]:
        """image_id -> (caption, url, jpg or None) of the images with these ids.

        drawn: those whose jpg is wanted. Any thread may ask.
        """
        rows = self._connection.cursor().execute(FACTS, [drawn, ids]).fetchall()
        return {key: tuple(facts) for key, *facts in rows}


def hits_text(hits: Hits, form: HitsFormat) -> str:
    rows = hits.rows()
    if form == "json":
        answer = {"query": hits.title, "collection": hits.collection, "notes": hits.notes}
        return json.dumps(answer | {"hits": rows}, ensure_ascii=False, indent=2)
    if form == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().rstrip("\n")
    shown = [{key: "" if value is None else value for key, value in row.items()} for row in rows]
    return terminal.table(list(rows[0]), [list(row.values()) for row in shown], WIDTH)


def search_figure(hits: Hits, out: Path) -> None:
    """Write a PNG: the student's best images above the teacher's, with scores and captions."""
    drawn = min(DRAWN, max(len(hits.student), len(hits.teacher)))
    with plots.style() as colours:
        size = max(1.5 * drawn, 4.5), 5.0
        figure = plots.Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.08))
        more = f", first {drawn} of {len(hits.student)}" if len(hits.student) > drawn else ""
        subtitle = f"best of {hits.collection} images{more}"
        title = plots.wrapped(hits.title, 16 * drawn, lines=2)
        figure.suptitle(f"{title}\n{subtitle}", fontsize=10)
        plots.footnotes(figure, hits.notes)
        strips: Any = figure.subfigures(2, 1)
        for strip, by in zip(strips, ("student", "teacher"), strict=True):
            strip.supylabel(f"by {by}", color=colours[by], fontsize=10)
            for ax, hit in zip(strip.subplots(1, drawn, squeeze=False)[0], getattr(hits, by)):  # noqa: B905
                caption = plots.wrapped(hit.caption or hit.url, 20, lines=3)
                plots.picture(ax, decode(hit.jpg), f"{hit.rank}: {hit.score:.3f}\n{caption}")
        write_file(out, lambda partial: partial.write_bytes(plots.png(figure)))


# A join with the ids would decode twice as much as a list that the reader can test row by row.
FACTS = """
SELECT image_id, coalesce(nullif(trim(caption), ''), label), url,
       CASE WHEN list_contains(?::VARCHAR[], image_id) THEN jpg END
FROM images
WHERE status = 'ok' AND list_contains(?::VARCHAR[], image_id)
"""
