"""One image, painted by what each place shows: classes that are named by texts, in the student's eyes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import write_file
from pipeline.evaluation.dense import sliding_cosines
from pipeline.evaluation.segmentation import segment
from pipeline.explore import plots
from pipeline.explore.query_vectors import Queries, named_image

MOST = 12  # classes in a picture


@dataclass(frozen=True)
class Segmented:
    """An image, the label of each of its pixels, and the names of the labels from 1."""

    title: str
    image: np.ndarray  # (S, S, 3) uint8
    labels: np.ndarray  # (S, S), 0 where no class answers
    names: list[str]
    notes: list[str]


def segment_image(
    queries: Queries, named: Path | str, prompts: list[str], size: int, threshold: float | None
) -> Segmented:
    """The centre square of an image at size px, painted by the prompt that answers best.

    The student looks through windows of its own size, half a window apart; size is rounded up to
    its patches. threshold: cosine up to which a place is no class; None: every place is one.
    named: as of `look`. Prompts that can be embedded neither from store nor by the teacher are left
    out with a note.

    Raises PipelineError: no prompts or too many, none with a vector, a file that is no image.
    """
    if not 0 < len(prompts) <= MOST:
        raise PipelineError(f"{len(prompts)} prompts: name 1 to {MOST}, one a class to paint.")
    student = queries.student
    asked, notes = queries.texts(prompts)
    if not asked:
        raise PipelineError(f"none of the prompts has a vector. {' '.join(notes)}")
    config = student.config
    size = max(config.image_size, -(-size // config.patch_size) * config.patch_size)
    image = queries.view(named_image(queries.data, named), size)
    stride = max(1, config.grid // 2) * config.patch_size
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
    vectors = torch.from_numpy(np.stack([query.student for query in asked]))
    cosines = sliding_cosines(student, pixels, vectors, stride)
    groups = [[], *([i] for i in range(len(asked)))]
    labels = segment(*cosines, groups, (size, size), threshold=threshold)[0].cpu().numpy()
    return Segmented(Path(named).name, image, labels, [query.title for query in asked], notes)


def segment_figure(segmented: Segmented, out: Path) -> None:
    """Write one PNG: the image, and the classes painted over it, with a legend."""
    shares = [float((segmented.labels == i + 1).mean()) for i in range(len(segmented.names))]
    with plots.style():
        figure = plots.Figure(
            figsize=(8.4, 4.6 + 0.3 * len(segmented.notes) + 0.12 * len(segmented.names)),
            layout="constrained",
        )
        figure.suptitle(plots.wrapped(segmented.title, 100, 1), fontsize=9)
        plots.footnotes(figure, segmented.notes)
        left, right = figure.subplots(1, 2)
        side = f"{len(segmented.image)} px, as the student sees it"
        plots.picture(left, segmented.image, side)
        plots.picture(
            right, plots.painted(segmented.image, segmented.labels), "the class that answers best"
        )
        names = [
            f"{name}: {share:.0%}" for name, share in zip(segmented.names, shares, strict=True)
        ]
        plots.legend(figure, names)
        write_file(out, lambda partial: partial.write_bytes(plots.png(figure)))
