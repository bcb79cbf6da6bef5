"""report.html: what was trained on what, how good it is and what it looks like, in one file.

Self-contained: pictures are data: URIs, there are no scripts, nothing is fetched. The same inputs
give the same bytes, so it may be a DVC out; times and speeds live in data/runs and come in only
when they are passed in.
"""

import csv
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from pipeline.core.config import EvaluateConfig
from pipeline.core.errors import PipelineError
from pipeline.core.provenance import evaluation_of, require_inputs, write_file
from pipeline.core.records import Evaluation, Metric, Sample
from pipeline.data import database
from pipeline.data.embeddings import load_text_embeddings
from pipeline.data.pixels import decode
from pipeline.explore import panels, plots, report_charts
from pipeline.explore.licenses import licenses
from pipeline.explore.metrics_table import (
    APART,
    cautions,
    headlines,
    in_words,
    number,
    reasons,
    titled_metrics,
)
from pipeline.explore.search import Collection, Hits, Query
from pipeline.explore.segmented_scenes import painted_scenes
from pipeline.explore.throughput import finished_runs, throughput
from pipeline.models.patches import PatchView
from pipeline.models.student import Student, read_card
from pipeline.training.dataset import Dataset

NAME = "report.html"
HITS = 6  # a side and prompt
LOOKED_AT = PAINTED = 6  # held-out images
THUMBNAIL = 160  # px
ELSEWHERE = "The teacher's attention and the speed of every run: run `pipeline report`."

MEANING = {
    "cosine": "between the student's and the teacher's embedding of the same image",
    "l1_norm100": "mean absolute difference of the two, times 100: the published loss",
    "centred_cosine": "after the mean training embedding is taken off both",
    "near_training": "share of these images whose nearest training image has a higher cosine than "
    "this, by the teacher: what training has almost seen",
    "student_to_teacher": "the student's vector of an image finds the teacher's of the same one",
    "text_to_image": "a caption finds its own image",
    "overlap@10": "share of the ten best images that student and teacher agree on",
    "rank_correlation": "Spearman's, of the student's and the teacher's order of all images",
    "pointing": "the patch that answers best to a text lies in its box; the ceiling is the share of "
    "texts with a patch in a box",
    "energy": "share of the positive activation that lies in the box",
    "pointing_centred": "pointing, after the mean of all prompts is taken off the text",
    "energy_centred": "energy, after the mean of all prompts is taken off the text",
    "mIoU": "patches name the class of each pixel; the floor is all background, the ceiling what a "
    "grid of patches can cover",
    "mIoU_with_image": "each class also gains from the whole image, by a weight chosen on val",
    "mIoU_image_level": "the class of the whole image, painted everywhere",
    "mIoU_teacher": "the teacher's own dense features",
    "accuracy": "the class prompts nearest to an image are its label's; the floor is the share of "
    "the most frequent label",
}


def write_report(
    path: Path,
    data: Path,
    student: Student,
    index: Path,
    measured: Evaluation,
    config: EvaluateConfig,
    *,
    by_teacher: Callable[[Sample], PatchView] | None = None,
    notes: list[str] | None = None,
    runs: list[dict] | None = None,
) -> None:
    """Write the report to path.

    index: folder of the student's index; measured: what `pipeline evaluate` found. by_teacher:
    what the teacher makes of a row, where its weights are here; notes: what is left out and why;
    runs: those that `pipeline.explore.throughput` finds.
    """
    dataset = Dataset(
        data, config.split, student.config.image_size, student.preprocessing.interpolation
    )
    parts, groups = panels.inside_views(student, dataset)
    values = {
        "found": measured,
        "summary": _summary(measured, student),
        "headlines": headlines(measured.to_json()),
        "cautions": cautions(measured.to_json()),
        "made": _made(data, student),
        "counts": _counts(data),
        "quality": _quality(measured),
        "curves": _curves(data / "student" / "training.csv"),
        "searches": _searches(Collection(data, index), config.prompts),
        "looked_at": panels.patch_groups(
            data, dataset, LOOKED_AT, student, config.prompts, by_teacher
        ),
        "scenes": painted_scenes(data, config, student, _segmentation(measured), PAINTED),
        "charts_inside": parts,
        "tiles_inside": groups,
        "runs": throughput(runs or [], measured.fidelity["cosine"].floor or 0.0),
        "notes": [ELSEWHERE] if notes is None else notes,
        "gradient": plots.gradient(),
    }
    template = files("pipeline.explore").joinpath(NAME).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.from_string(template).render(values)
    path.write_text(html, encoding="utf-8")


def report(
    data: Path,
    path: Path,
    config: EvaluateConfig,
    by_teacher: Callable[[Sample], PatchView] | None,
    notes: list[str],
) -> None:
    """The report of what lies in data, with what the evaluate stage leaves out: the teacher's
    attention, and quality against throughput.

    Raises PipelineError before `pipeline evaluate`.
    """
    measured = evaluation_of(data)
    student, index = Student.load(data / "student"), data / "evaluation" / "index"
    runs = finished_runs(data)
    write = partial(write_report, data=data, student=student, index=index, measured=measured)
    write_file(path, partial(write, config=config, by_teacher=by_teacher, notes=notes, runs=runs))


def _segmentation(measured: Evaluation) -> dict[str, Any]:
    """Its metrics and thresholds in one object; nothing where there are no masks."""
    return measured.segmentation.model_dump() if measured.segmentation else {}


def _summary(measured: Evaluation, student: Student) -> str:
    cosine = measured.fidelity["cosine"]
    size = sum(parameter.numel() for parameter in student.parameters())
    return (
        f"A student of {size / 1e6:.2f} million parameters. On {measured.images} held-out images "
        f"its embedding has a cosine of {cosine.value:.3f} to the teacher's; always answering "
        f"the mean training embedding would give {cosine.floor:.3f}."
    )


def _made(data: Path, student: Student) -> dict[str, Any]:
    """Tables of names and values: teacher, student, training, and the stamps of every stage."""
    card = read_card(data / "student")
    stamps = require_inputs(data, "evaluate")
    parameters = stamps["student"].recipe.parameters
    training = {name: value for name, value in parameters.items() if name != "student"}
    return {
        "Teacher": _in_words(_flat(card.teacher or {})),
        "Student": _in_words(student.config.model_dump())
        | {"licence": card.license or "not recorded"},
        "Training": _in_words(_flat(training)),
        "Stamps of the stages": {folder: stamp.stamp for folder, stamp in stamps.items()},
        "Libraries at training": card.provenance.get("libraries", {}),
    }


def _in_words(values: dict) -> dict:
    """Names as people read them: what stands in what, without underscores."""
    names = (in_words(" \u203a ".join(name.split("."))) for name in values)
    return dict(zip(names, values.values(), strict=True))


def _flat(values: dict, prefix: str = "") -> dict:
    """Nested dictionaries -> one, with dots."""
    flat = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def _counts(data: Path) -> dict:
    """What became of every row of the manifest, and of every image."""
    connection = database.connect(data)
    statuses = connection.execute(STATUSES).fetchall()
    total = sum(count for _, count, _ in statuses)
    splits = connection.execute(SPLITS).fetchall()
    embedded, texts = (connection.execute(sql).fetchall() for sql in (VIEWS, TEXTS))
    return {
        "total": total,
        "good": sum(count for status, count, _ in statuses if status == "ok"),
        "statuses": [(s, n, f"{n / total:.2%}", error or "") for s, n, error in statuses],
        "splits": splits,
        "embedded": [*embedded, *texts],
        "licenses": licenses(data),
    }


def _quality(measured: Evaluation) -> dict:
    """The metrics as rows, and a chart of those with floor and ceiling."""
    rows = titled_metrics(measured)
    drawn = [(in_words(title), metric) for title, metric in rows if _has_a_way(metric)]
    shares = ", ".join(f"{title} {metric.share(metric.value):.0%}" for title, metric in drawn)
    groups = measured.groups()
    counts = {"images": measured.images, "undecodable": measured.undecodable} | {
        in_words(f"{name}, {key}"): count
        for name, group in groups.items()
        for key, count in group.facts.items()
        if isinstance(count, int)
    }
    return {
        "table": [_row(title, metric) for title, metric in rows],
        "counts": counts,
        "left_out": reasons(measured),
        "apart": APART,
        "alt": f"Share of the way from floor to ceiling: {shares}.",
    } | report_charts.in_both_lights(partial(report_charts.quality_chart, drawn))


def _has_a_way(metric: Metric) -> bool:
    """Floor and ceiling are far enough apart for a share of the way between them."""
    if metric.floor is None or metric.ceiling is None:
        return False
    return abs(metric.ceiling - metric.floor) >= APART


def _row(title: str, metric: Metric) -> dict[str, str]:
    return {
        "name": in_words(title),
        "meaning": next((MEANING[word] for word in title.split()[::-1] if word in MEANING), ""),
        "value": number(metric.value),
        "interval": f"{number(metric.low)} to {number(metric.high)}",
        "floor": number(metric.floor),
        "ceiling": number(metric.ceiling),
        "centre": number(metric.centre),
    }


def _curves(log: Path) -> list[dict]:
    """Charts of the training log: the loss, and the validation cosine beside its floor."""
    try:
        with log.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError:
        raise PipelineError(f"no {log}. Run `pipeline distill` first.") from None
    curves = []
    for title, (label, names) in CURVES.items():
        points = {
            name: [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
            for name in names
        }
        points = {name: line for name, line in points.items() if line}
        if points:
            steps: dict[str, Sequence[float]] = {
                name: [step for step, _ in line] for name, line in points.items()
            }
            values: dict[str, Sequence[float]] = {
                name: [value for _, value in line] for name, line in points.items()
            }
            ends = ", ".join(
                f"{name} from {line[0]:.3f} to {line[-1]:.3f}" for name, line in values.items()
            )
            steps_in_all = max(map(max, steps.values()))
            alt = f"{title} over {steps_in_all} steps: {ends}."
            draw = partial(report_charts.training_curve, steps, values, label)
            curves.append({"title": title, "alt": alt} | report_charts.in_both_lights(draw))
    return curves


def _searches(collection: Collection, prompts: list[str]) -> list[dict]:
    searches = []
    for prompt in prompts:
        _, _, vectors = load_text_embeddings(collection.data, "trim(text) = ?", [prompt.strip()])
        if len(vectors):
            hits = collection.search(Query(prompt, vectors[0], vectors[0]), HITS)
            shared = len({h.image_id for h in hits.student} & {h.image_id for h in hits.teacher})
            searches.append({"title": prompt, "shared": shared, "sides": _tiles(hits)})
        else:
            searches.append({"title": prompt, "shared": 0, "sides": {}})
    return searches


def _tiles(hits: Hits) -> dict[str, list[panels.Tile]]:
    return {
        by: [
            panels.Tile(
                plots.data_uri(plots.thumbnail(decode(hit.jpg), THUMBNAIL)),
                f"Number {hit.rank} by the {by}, cosine {hit.score:.3f}: "
                f"{hit.caption or 'no caption'}",
                f"{hit.score:.3f} {hit.caption or ''}",
            )
            for hit in getattr(hits, by)
        ]
        for by in ("student", "teacher")
    }


CURVES = {
    "Training loss": ("loss", ["loss"]),
    "Cosine to the teacher, validation split": ("cosine", ["val_cosine", "val_floor"]),
}
STATUSES = """
SELECT status, count(*) AS count, min(error) FROM images
GROUP BY status ORDER BY status <> 'ok', count DESC, status
"""
SPLITS = """
SELECT part, reason, count(*) AS count
FROM (SELECT CASE WHEN keep THEN split ELSE 'left out' END AS part, reason FROM selection)
GROUP BY part, reason ORDER BY part = 'left out', count DESC, part, reason
"""
VIEWS = """
SELECT CASE WHEN view = 0 THEN 'images, whole view' ELSE 'images, view ' || view END, count(*)
FROM teacher GROUP BY view ORDER BY view
"""
TEXTS = """
SELECT CASE WHEN image_id IS NULL THEN 'prompts' ELSE 'captions' END AS kind, count(*)
FROM texts GROUP BY kind ORDER BY kind
"""
