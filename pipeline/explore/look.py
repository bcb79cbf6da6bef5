"""One image through the student (and its teacher): which patches count, and where a text is.

Reads data/student, stored texts and, where its weights are here, the teacher.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import write_file
from pipeline.explore import plots
from pipeline.explore.query_vectors import Queries, named_image
from pipeline.explore.search import Query
from pipeline.models.patches import (
    PatchView,
    agreement,
    entropy,
    in_shares,
    on_grid,
    student_view,
)

SHOWN = 256  # px a side of a panel
MOST = 12  # prompts in a figure
LOWEST = 2  # percent of the cosines share the lowest colour: one odd patch would flatten all maps


@dataclass(frozen=True)
class Look:
    """Everything one picture shows."""

    title: str
    image: np.ndarray  # (SHOWN, SHOWN, 3) uint8
    student: PatchView
    teacher: PatchView | None  # None without the teacher's weights
    queries: list[Query]
    notes: list[str]  # what is left out, and why


def look(queries: Queries, named: Path | str, prompts: list[str]) -> Look:
    """What student and teacher make of an image and some texts.

    named: an image file, or an image_id or url of the collection, as `pipeline search` prints them.
    A prompt that can be embedded neither from store nor by the teacher is left out with a note.
    Raises PipelineError: no student yet, a file that is no usable image, too many prompts.
    """
    if len(prompts) > MOST:
        raise PipelineError(f"{len(prompts)} prompts: at most {MOST} fit into one picture.")
    student, teacher = queries.student, None
    image = named_image(queries.data, named)
    asked, notes = queries.texts(prompts)
    try:
        teacher = _teacher_view(queries, image)
    except PipelineError as error:
        notes.append(f"Left out, the teacher's panels: {error}")
    patch_view = student_view(student, queries.view(image, student.config.image_size))
    return Look(Path(named).name, queries.view(image, SHOWN), patch_view, teacher, asked, notes)


def _teacher_view(queries: Queries, image: np.ndarray) -> PatchView:
    if queries.teacher is None:
        raise PipelineError(queries.no_teacher)
    from pipeline.models.teacher_patches import teacher_view

    return teacher_view(queries.teacher, queries.view(image, queries.teacher.image_size))


def look_figure(shown: Look, out: Path) -> None:
    """Write one PNG: image, patch weights (and the teacher's attention); a row per prompt.

    Weights and attention share one colour scale, all activation maps another.
    """
    columns, rows = (4 if shown.teacher else 2), 1 + len(shown.queries)
    with plots.style():
        size = 2.1 * columns + 0.9, 2.35 * rows + 0.3 + 0.3 * len(shown.notes)
        figure = plots.Figure(figsize=size, layout="constrained")
        figure.suptitle(plots.wrapped(shown.title, 30 * columns, 1), fontsize=9)
        plots.footnotes(figure, shown.notes)
        axes = figure.subplots(rows, columns, squeeze=False)
        _weights_row(figure, axes[0], shown)
        if shown.queries:
            _activation_rows(figure, axes[1:], shown)
        write_file(out, lambda partial: partial.write_bytes(plots.png(figure)))


def _weights_row(figure: Figure, axes: np.ndarray, shown: Look) -> None:
    """The image, then every map of weights, with what can be measured of it."""
    mine = shown.student.weights
    panels = {f"student: patch weights\n{_entropy(mine)}": mine}
    if shown.teacher:
        attention = shown.teacher.weights
        grid = len(attention)
        alike = f"correlation with the teacher's {agreement(mine, attention):.2f}"
        panels[f"student: patch weights on {grid} x {grid}\n{alike}"] = on_grid(mine, grid)
        panels[f"teacher: class token's attention\n{_entropy(attention)}"] = attention
    high = max(2.0, *(in_shares(weights).max() for weights in panels.values()))
    plots.picture(axes[0], shown.image, "image, as the student sees it")
    for ax, (title, weights) in zip(axes[1:], panels.items(), strict=True):
        plots.picture(ax, plots.overlay(shown.image, in_shares(weights), 0, high), title)
    plots.colour_bar(figure, axes, 0, high, "times the equal share")


def _entropy(weights: np.ndarray) -> str:
    return f"entropy {entropy(weights):.2f} of {np.log2(weights.size):.2f} bits"


def _activation_rows(figure: Figure, axes: np.ndarray, shown: Look) -> None:
    """A row per prompt: the image, then the cosine of each patch to it by each side."""
    sides = {"student": shown.student} | ({"teacher": shown.teacher} if shown.teacher else {})
    maps = [
        {who: view.patches @ getattr(query, who) for who, view in sides.items()}
        for query in shown.queries
    ]
    values = np.concatenate([cosines.ravel() for row in maps for cosines in row.values()])
    low, high = float(np.percentile(values, LOWEST)), float(values.max())
    for line, row, query in zip(axes, maps, shown.queries, strict=True):
        plots.picture(line[0], shown.image, plots.wrapped(query.title, 30, 3))
        for ax, (who, cosines) in zip(line[1:], row.items(), strict=False):
            whole = sides[who].embedding @ getattr(query, who)
            title = f"{who}: cosine at most {cosines.max():.3f}\nwhole image {whole:.3f}"
            plots.picture(ax, plots.overlay(shown.image, cosines, low, high), title)
        for ax in line[1 + len(row) :]:
            ax.axis("off")
    plots.colour_bar(figure, axes, low, high, "cosine of patch and text", extend="min")
