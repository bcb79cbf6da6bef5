"""Does an image lie nearest to the text that names its class? Measured where images have labels."""

from pathlib import Path

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.core.records import MetricGroup
from pipeline.data.embeddings import labels_of, load_text_embeddings
from pipeline.data.shards import unit_rows
from pipeline.data.texts import class_prompts, labels
from pipeline.evaluation import metrics

ALIKE = 0.999  # cosine from which the vectors of two classes are one: near what float16 tells apart


def zero_shot_metrics(
    data: Path, ids: list[str], student: np.ndarray, teacher: np.ndarray, templates: list[str]
) -> MetricGroup | None:
    """Share of images whose nearest class is their label, or None where none has a label.

    ids: of n images; student, teacher: (n, E) their vectors. The classes are all labels of
    data/images. The floor is the share of the most frequent label: what the best answer that does
    not look at the image gets, and never less than chance. The ceiling is the teacher's share.
    Where a class has no vector the group says why it is left out; classes that the teacher embeds
    alike are counted.
    """
    label_of = labels_of(data, ids)
    labelled = [i for i, key in enumerate(ids) if key in label_of]
    if not labelled:
        return None
    names = labels(data / "images")
    try:
        classes = class_vectors(data, names, templates)
    except PipelineError as error:
        return MetricGroup(left_out=str(error))
    number = {name: i for i, name in enumerate(names)}
    own = np.array([number[label_of[ids[i]]] for i in labelled])
    right = metrics.zero_shot(student[labelled], classes, own)
    ceiling = metrics.zero_shot(teacher[labelled], classes, own).mean()
    accuracy = metrics.share_interval(right).beside(
        floor=float(np.bincount(own).max() / len(own)), ceiling=float(ceiling)
    )
    counts: dict[str, int | float | str] = {
        "images": len(own),
        "classes": len(names),
        "templates": len(templates),
    }
    return MetricGroup(metrics={"accuracy": accuracy}, facts=counts | _alike(names, classes))


def _alike(names: list[str], classes: np.ndarray) -> dict[str, int | float | str]:
    """How many classes have the vector of another one, and two of them; nothing where none has."""
    cosines = classes @ classes.T - 2 * np.eye(len(classes))
    if cosines.max() < ALIKE:
        return {}
    one, other = sorted(np.unravel_index(cosines.argmax(), cosines.shape))
    count = int((cosines.max(axis=1) >= ALIKE).sum())
    return {"alike": count, "alike_classes": f"{names[one]!r} and {names[other]!r}"}


def class_vectors(data: Path, names: list[str], templates: list[str]) -> np.ndarray:
    """(c, E) unit vectors of classes: the mean of those stored for a class's filled templates.

    Prompts are averaged as CLIP does it (Radford et al. 2021, section 3.1.4). A class may have
    fewer prompts stored than another. Raises PipelineError where one has none.
    """
    asked = {name: class_prompts(templates, name) for name in names}
    every = sorted({text for texts in asked.values() for text in texts})
    texts, _, vectors = load_text_embeddings(data, "text IN (SELECT unnest(?::VARCHAR[]))", [every])
    vector_of = dict(zip(texts, vectors, strict=True))
    stored = {
        name: [vector_of[text] for text in texts if text in vector_of]
        for name, texts in asked.items()
    }
    if without := [name for name, own in stored.items() if not own]:
        raise PipelineError(
            f"{len(without)} of {len(names)} labels have no stored class prompt, such as "
            f"{without[0]!r}. Name the same templates in teacher_embed.templates and "
            "evaluate.templates, or import vectors of such prompts."
        )
    return unit_rows(np.stack([np.mean(own, axis=0) for own in stored.values()]))
