"""Texts and image files -> vectors to search and look with.

A text that was embedded once (a prompt, a caption) costs nothing, not even torch's import; another
one needs the teacher's text tower, which is loaded only then.
"""

import difflib
import heapq
import logging
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import stamp_of, teacher_summary
from pipeline.data import database
from pipeline.data.embeddings import load_text_embeddings
from pipeline.data.pixels import NotAnImage, decode
from pipeline.data.views import canonical_view, view_pixels
from pipeline.explore.search import Query
from pipeline.fetch.decoding import TooManyPixels, canonical_jpeg

if TYPE_CHECKING:
    from pipeline.models.student import Student
    from pipeline.models.teacher import Teacher

TITLE = 80  # characters of a query that name it
PROBE = " x"  # appended to a text to see whether there is room for it


class Queries:
    """Makes queries for what lies in data.

    card: the teacher's card, or None. Its weights are asked for only where a stored vector does
    not do.
    """

    def __init__(self, data: Path, card: Path | None = None) -> None:
        self.data, self.card = data, card

    @cached_property
    def student(self) -> "Student":
        """Raises PipelineError before `pipeline distill`."""
        from pipeline.models.student import Student

        return Student.load(self.data / "student")

    @cached_property
    def teacher(self) -> "Teacher | None":
        """The teacher whose vectors are stored, or None: `no_teacher` then says why.

        Weights that are not on this machine are not here: looking at pictures downloads nothing.
        Raises PipelineError where the card names another teacher.
        """
        if self.card is None:
            self.no_teacher = "no teacher card was named (--card)."
            return None
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when open_clip is imported
        import torch

        from pipeline.models.teacher import Teacher, teacher_identity

        stored = teacher_summary(self.data)
        logging.disable(logging.ERROR)  # what open_clip logs of missing weights stands in the note
        try:
            teacher = Teacher(self.card, torch.device("cpu"))
            identity = teacher_identity(teacher.card, self.card)
        except PipelineError as error:
            self.no_teacher = f"{str(error).split('. ')[0].rstrip('.')}."
            return None
        finally:
            logging.disable(logging.NOTSET)
        same_config = stored.dtype == "imported" or identity.config == stored.teacher.config
        if identity.card != stored.teacher.card or not same_config:
            raise PipelineError(
                f"{self.card} is not the teacher of data/teacher, which is "
                f"{stored.teacher.card.name} ({stored.teacher.card.model}). Name its card with "
                "--card."
            )
        return teacher

    def text(self, text: str) -> Query:
        """The query for a text: its stored embedding, else the teacher's text tower.

        Raises PipelineError: a text without words, or one that is not stored where the teacher's
        weights are not here either.
        """
        text = text.strip()
        if not text:
            raise PipelineError("the text is empty: write what the images should show.")
        _, _, vectors = load_text_embeddings(self.data, "trim(text) = ?", [text])
        if len(vectors):
            return Query(_short(text), vectors[0], vectors[0])
        if self.teacher is None:
            raise PipelineError(
                f"{_short(text)!r} has no stored embedding (stored ones near it: "
                f"{', '.join(self._near(text))}), and the teacher's text tower is not here: "
                f"{self.no_teacher}"
            )
        words, nothing, longer = self.teacher.tokenize([text, "", text + PROBE])
        if words.equal(nothing):
            raise PipelineError(
                f"{text!r} holds no token the teacher knows: write what the images should show."
            )
        notes = []
        if words.equal(longer):
            notes.append(f"Only the first {len(words)} tokens of the text count.")
        vector = self.teacher.embed_texts([text])[0]
        return Query(_short(text), vector, vector, notes)

    def texts(self, texts: list[str]) -> tuple[list[Query], list[str]]:
        """Queries for the texts that can be embedded, and notes on them and on those left out."""
        queries, notes = [], []
        for text in texts:
            try:
                queries.append(self.text(text))
                notes += queries[-1].notes
            except PipelineError as error:
                notes.append(f"Left out: {error}")
        return queries, notes

    def image(self, file: Path) -> Query:
        """The query for an image file: each side's own vector of it.

        Without the teacher's weights the student's vector asks both sides. Raises PipelineError
        for a file that is no image, or one that is too large to decode.
        """
        from pipeline.models.patches import student_view

        image = read_image(self.data, file)
        pixels = self.view(image, self.student.config.image_size)
        mine = student_view(self.student, pixels).embedding
        if self.teacher is None:
            note = f"The student's vector asks both sides: {self.no_teacher}"
            return Query(file.name, mine, mine, [note])
        size = self.teacher.image_size
        own = self.teacher.embed_images(self.view(image, size)[None])[0]
        return Query(file.name, mine, own)

    def view(self, image: np.ndarray, size: int) -> np.ndarray:
        """(h, w, 3) uint8 -> (size, size, 3): what teacher and student see of an image."""
        preprocessing = teacher_summary(self.data).preprocessing
        view = canonical_view(
            image.shape[1], image.shape[0], preprocessing.resize_mode, preprocessing.image_size
        )
        return np.array(view_pixels(image, view.box, view.flip, size, preprocessing.interpolation))

    def _near(self, text: str) -> list[str]:
        """A few stored texts: those with the same words, then those that are written alike."""
        asked, words = text[:TITLE].lower(), set(text[:TITLE].lower().split())
        letters = difflib.SequenceMatcher(b=asked)

        def nearness(stored: str) -> tuple[float, float]:
            stored = stored[:TITLE].lower()
            letters.set_seq1(stored)
            others = set(stored.split())
            return len(words & others) / len(words | others), letters.ratio()

        stored = [t for (t,) in database.connect(self.data).execute(STORED).fetchall()]
        return [_short(t) for t in heapq.nlargest(5, stored, nearness)]


def read_image(data: Path, file: Path) -> np.ndarray:
    """An image file as the download stage would have stored it: (h, w, 3) uint8, upright RGB.

    Raises PipelineError for what it would have refused, with the reason.
    """
    rules = stamp_of(data, "images").recipe.parameters
    try:
        jpg, *_ = canonical_jpeg(
            file.read_bytes(), rules["image_size"], rules["quality"], rules["max_pixels"]
        )
        return decode(jpg)
    except OSError as error:
        raise PipelineError(f"{file} cannot be read: {error.strerror}.") from None
    except (NotAnImage, TooManyPixels) as error:
        raise PipelineError(
            f"{file} is no image that can be used: {error}. Expected a whole JPEG, PNG, WebP, GIF, "
            f"BMP or TIFF of at most {rules['max_pixels']} pixels."
        ) from None


def named_image(data: Path, named: Path | str) -> np.ndarray:
    """An image file, or an image of the collection by its image_id or url, as `pipeline search`
    prints them: (h, w, 3) uint8. Raises PipelineError where there is neither, or no usable image."""
    file = Path(named)
    return read_image(data, file) if file.exists() else stored_image(data, named)


def stored_image(data: Path, named: Path | str) -> np.ndarray:
    """An image of the collection by its image_id or url: (h, w, 3) uint8.

    Raises PipelineError where there is none.
    """
    row = database.connect(data).execute(STORED_IMAGE, [str(named), str(named)]).fetchone()
    if row is None:
        raise PipelineError(
            f"{named}: no such file, and no image of the collection has it for an image_id or url. "
            "`pipeline search TEXT` prints both."
        )
    return decode(row[0])


def _short(text: str) -> str:
    """A query's text as its title: one line."""
    line = " ".join(text.split())
    return line if len(line) <= TITLE else line[: TITLE - 1] + "…"


STORED = """
SELECT DISTINCT text FROM (SELECT text FROM texts ORDER BY image_id NULLS FIRST, text LIMIT 5000)
ORDER BY text
"""
STORED_IMAGE = """
SELECT jpg FROM images WHERE status = 'ok' AND (image_id = ? OR url = ?) ORDER BY image_id LIMIT 1
"""
