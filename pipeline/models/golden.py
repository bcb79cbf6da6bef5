"""Golden vectors: a teacher is asked what its card says it once answered.

A text tower can be recognised by vectors that others published, without its weights; the image tower
only by what the weights themselves answered, which `pipeline import teacher` writes.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.models.card import Golden

if TYPE_CHECKING:
    from pipeline.models.teacher import Teacher

log = logging.getLogger(__name__)

TEXTS = ("a photo of a cat", "a red bicycle", "two zebras on a green field")
DIGITS = 4  # decimals of a stored value: 1 - cos < 1e-5 at 512 values
SAME = 0.995  # the least cosine of the same tower on another machine, or rounded
OTHER = (
    0.95  # below: other weights. GELU for QuickGELU moves less: the activation is checked itself
)


def golden_of(teacher: "Teacher") -> Golden:
    """What a card records to recognise this teacher: unit vectors, float32, rounded."""
    image = teacher.embed_images(test_pattern(teacher.image_size)[None])[0]
    texts = teacher.embed_texts(list(TEXTS))
    return Golden(
        source="these weights, as they were when the card was written",
        texts={text: _rounded(vector) for text, vector in zip(TEXTS, texts, strict=True)},
        image=_rounded(image),
    )


def test_pattern(size: int) -> np.ndarray:
    """(S, S, 3) uint8: three ramps, the same for every teacher of this size."""
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    return np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], ramp[::-1][None]), -1)


def recognise(teacher: "Teacher", card_path: Path, *, accept: bool) -> None:
    """Compare the teacher's answers with its card's; say what is not known or not quite equal.

    Raises PipelineError for a cosine below OTHER, unless it is to be accepted.
    """
    card, golden, known = teacher.card, teacher.card.golden, "nothing recognises its weights"
    if golden is not None:
        vectors, expected = teacher.embed_texts(list(golden.texts)), list(golden.texts.values())
        cosine = _compare("text", vectors, expected, card_path, accept=accept)
        known = f"only the text tower was recognised, with a cosine of {cosine:.5f}"
        if golden.image is not None:
            image = teacher.embed_images(test_pattern(teacher.image_size)[None])
            _compare("image", image, [golden.image], card_path, accept=accept)
    if card.sha256 is None and (golden is None or golden.image is None):
        log.warning(
            "%s: %s. `pipeline import teacher %s --pretrained %s --out %s`, run once where you trust "
            "the weights, writes their digest and an image vector into the card.",
            *(card_path, known, card.model, card.pretrained, card_path),
        )


def _compare(
    tower: str, vectors: np.ndarray, expected: list[list[float]], path: Path, *, accept: bool
) -> float:
    """The least cosine between answers and golden vectors."""
    if any(len(vector) != vectors.shape[1] for vector in expected):
        raise PipelineError(
            f"{path}: the {tower} tower answers {vectors.shape[1]} values, the card's golden vector "
            f"has {len(expected[0])}. This is another model; correct the card."
        )
    wanted = np.array(expected) / np.linalg.norm(expected, axis=1, keepdims=True)
    cosine = float((vectors * wanted).sum(1).min())
    if not cosine >= OTHER and not accept:
        raise PipelineError(
            f"{path}: the {tower} tower's answers have a cosine of {cosine:.3f} to the card's golden "
            f"vectors (at least {OTHER} is wanted; the same weights give more than {SAME}). These are "
            "other weights: use the right ones, write the card anew, or say "
            "`pipeline teacher-embed --accept-other-vectors`."
        )
    if not cosine >= SAME:
        log.warning(
            "%s: the %s tower's answers have a cosine of %.4f to the card's golden vectors; the same "
            "weights give more than %s.",
            *(path, tower, cosine, SAME),
        )
    return cosine


def _rounded(vector: np.ndarray) -> list[float]:
    return [round(float(value), DIGITS) for value in vector]
