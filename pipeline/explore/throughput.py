"""Quality against throughput: students, their teacher, and what other ways to pool gave, as far as
data/runs knows them. Speeds differ from run to run, so none of this is in an out of DVC.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from pipeline.core.records import Recipe, TeacherIdentity
from pipeline.data import database
from pipeline.explore import report_charts

OURS = "extra-head"  # other ways to pool are the baselines


def finished_runs(data: Path) -> list[dict]:
    """Evaluations and teacher's runs that saw images, the oldest first, as {series, what, stamp,
    device, images_per_second, cosine}. The teacher's cosine to itself is 1.
    """
    return [_run(*row) for row in database.connect(data).execute(RUNS).fetchall()]


def _run(stage: str, stamp: str, device: str, speed: float, recipe: str, metrics: str) -> dict:
    run = {"stamp": stamp, "device": device, "images_per_second": speed}
    if stage == "teacher_embed":
        return run | {"series": "teacher", "what": f"teacher{_name(recipe)}", "cosine": 1.0}
    values = json.loads(metrics)
    run |= {"series": "student", "what": "student", "cosine": values["fidelity.cosine"]}
    if "student.pool" in values:
        size = f"{values['student.parameters'] / 1e6:.2f} M, {values['student.image_size']} px"
        run["what"] = f"student, {values['student.pool']}, {size}"
        if values["student.pool"] != OURS:
            run["series"] = f"baseline: {values['student.pool']}"
    return run


def _name(recipe: str) -> str:
    """The teacher's name, but of runs of an earlier version."""
    try:
        identity = Recipe.model_validate_json(recipe).parameters.get("teacher")
        return f" {TeacherIdentity.model_validate(identity).card.name}"
    except ValidationError:
        return ""


def throughput(runs: list[dict], floor: float) -> dict | None:
    """The runs as rows and a chart, over the cosine of always answering the mean; None without any."""
    if not runs:
        return None
    series: dict[str, Sequence[tuple[float, float]]] = {}
    for run in runs:
        point = run["images_per_second"], run["cosine"]
        series[run["series"]] = [*series.get(run["series"], ()), point]
    best = "; ".join(
        f"{name}, {len(points)} run{'s' * (len(points) > 1)}: cosine {cosine:.3f} at "
        f"{speed:.0f} images per second"
        for name, points in series.items()
        for speed, cosine in [max(points, key=lambda point: point[1])]
    )
    alt = f"The best of each: {best}. Always answering the mean embedding: {floor:.3f}."
    draw = partial(report_charts.speed_chart, series, floor)
    return {"rows": runs, "alt": alt} | report_charts.in_both_lights(draw)


RUNS = """
SELECT stage, stamp, device, images_per_second, recipe, metrics FROM runs
WHERE stage IN ('evaluate', 'teacher_embed') AND images_per_second > 0 ORDER BY finished, stamp
"""
