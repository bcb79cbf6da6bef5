"""The metrics of an evaluation that matter, in words, as a table for people."""

import re
import textwrap
from typing import NamedTuple

from pipeline.core.records import Evaluation, Metric
from pipeline.core.terminal import table

WORDS = {  # group and name of a metric -> what it says, in the order in which people ask
    ("fidelity", "cosine"): "cosine to the teacher's vector of the same image",
    ("text_to_image", "R@1"): "a caption finds its own image first",
    ("text_to_image", "R@10"): "a caption finds its own image among ten",
    ("text_to_image", "overlap@10"): "best ten images of a text, shared with the teacher",
    ("box_search", "precision@8"): "best eight images of a named thing that hold it",
    ("box_search", "worst_precision@8"): "the same, of the thing that is found worst",
    ("zero_shot", "accuracy"): "the right label, from its name alone",
    ("pointing", "pointing"): "the patch that answers best to a text lies in its box",
    ("segmentation", "mIoU"): "classes painted patch by patch, against their masks (mIoU)",
}
FEW = 50  # held-out images below which the metrics are said to mean little
WIDTH = 100  # columns of a terminal
APART = 0.02  # floor and ceiling, for the way between them to mean something
GROUPS = list(dict.fromkeys(group for group, _ in WORDS))
COLUMNS = ("on held-out images", "student", "95 % interval", "floor", "ceiling")


class Headline(NamedTuple):
    """One metric as people read it; a floor or ceiling that does not exist is empty."""

    words: str
    value: str
    interval: str
    floor: str
    ceiling: str


def headlines(metrics: dict) -> list[Headline]:
    """The metrics of `pipeline evaluate` that matter most; those that were not measured are out."""
    rows = []
    for (group, name), words in WORDS.items():
        metric = metrics.get(group, {}).get(name)
        if isinstance(metric, dict):
            interval = f"{metric['low']:.3f} - {metric['high']:.3f}"
            ends = (metric.get(end) for end in ("floor", "ceiling"))
            floor, ceiling = ("" if end is None else f"{end:.3f}" for end in ends)
            rows.append(Headline(words, f"{metric['value']:.3f}", interval, floor, ceiling))
    return rows


def metrics_text(metrics: dict) -> str:
    """The headlines as lines of at most 100 characters; then what is left out, and why."""
    left_out = [
        f"left out: {' '.join([group, *key.split('_')[:-2]])}, for {reason}"
        for group in GROUPS
        for key, reason in metrics.get(group, {}).items()
        if key.endswith("left_out")
    ]
    notes = [textwrap.fill(f"note: {caution}", WIDTH) for caution in cautions(metrics)]
    return "\n".join([table(COLUMNS, headlines(metrics)), *left_out, *notes])


def cautions(metrics: dict) -> list[str]:
    """Sentences on what of an evaluation's metrics means little or nothing, and why."""
    warnings = []
    if (count := metrics.get("images", FEW)) < FEW:
        warnings.append(
            f"{count} held-out images are few: the intervals are wide, and a search among {count} is "
            "easy. Raise select.test, or add images."
        )
    zero_shot = metrics.get("zero_shot", {})
    if zero_shot.get("classes") == 1:
        warnings.append("all labels are one, so that every answer of zero_shot is right.")
    elif alike := zero_shot.get("alike"):
        warnings.append(
            f"the teacher embeds {alike} of {zero_shot['classes']} classes like another one (cosine 1), "
            f"such as {zero_shot['alike_classes']}: it cannot tell them apart, nor can zero_shot."
        )
    for (group, name), words in WORDS.items():
        metric = metrics.get(group, {}).get(name)
        if not isinstance(metric, dict):
            continue
        floor, ceiling = metric.get("floor"), metric.get("ceiling")
        if floor is not None and ceiling is not None and ceiling - floor < APART:
            warnings.append(
                f"{words!r}: the ceiling is {ceiling:.3f} and the floor {floor:.3f}, so that the value "
                "says nothing of the student."
            )
    return warnings


def titled_metrics(measured: Evaluation) -> list[tuple[str, Metric]]:
    """All metrics under their titles, such as `fidelity cosine`; R@5 before R@10."""
    return [
        (name if name.startswith(kind) else f"{kind} {name}", group[name])
        for kind, group in measured.groups().items()
        for name in sorted(group.metrics, key=_natural)
    ]


def reasons(measured: Evaluation) -> dict[str, str]:
    """What is left out -> why: groups, and parts of them such as `segmentation teacher`."""
    left_out = {}
    for kind, group in measured.groups().items():
        if group.left_out:
            left_out[kind] = group.left_out
        for name, fact in group.facts.items():
            if name.endswith("_left_out"):
                left_out[f"{kind} {name.removesuffix('_left_out')}"] = str(fact)
    return left_out


def in_words(name: str) -> str:
    """A name of the records as people read it: without underscores."""
    return name.replace("_", " ")


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def number(value: float | None) -> str:
    """Three digits, or nothing."""
    return "" if value is None else f"{value:.3f}"
