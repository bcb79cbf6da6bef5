"""Zero-shot accuracy: each label's prompts make its class, and what cannot be measured says why."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support import seeing, worlds
from support.finished import distill_config, evaluate_config

from pipeline.core.provenance import evaluation_of
from pipeline.core.records import MetricGroup
from pipeline.data import database, shards
from pipeline.evaluation.zero_shot import zero_shot_metrics
from pipeline.explore.metrics_table import metrics_text

TEMPLATES = ["a {}", "a photo of a {}"]
FRUIT, BREAD = np.eye(3, dtype=np.float16)[:2]


def labelled(data: Path, labels: list[str | None], texts: dict[str, np.ndarray]) -> list[str]:
    """data/images with these labels and data/teacher/texts with these vectors; the image_ids."""
    ids = [f"i{n}" for n in range(len(labels))]
    rows = [
        {"row_id": key, "image_id": key, "url": key, "label": label, "status": "ok"}
        for key, label in zip(ids, labels, strict=True)
    ]
    seeing.write(data / "images/00000.parquet", shards.IMAGES, rows)
    stored = [{"text_id": t, "text": t, "embedding": vector} for t, vector in texts.items()]
    seeing.write(data / "teacher/texts/prompts.parquet", shards.texts_schema(3), stored)
    return ids


def test_a_class_is_the_mean_of_its_prompts(tmp_path):
    """The image lies nearer to each single prompt of bread than to one of fruit's, but nearest to
    the mean of fruit's two.
    """
    ids = labelled(
        tmp_path,
        ["fruit", "bread"],
        {
            "a fruit": np.array([1, 0.75, 0]),
            "a photo of a fruit": np.array([1, -0.75, 0]),
            "a bread": np.array([0.9, 0, 0.44]),
        },
    )
    seen = np.array([[1, 0, 0], [0, 0, 1]], np.float32)
    found = zero_shot_metrics(tmp_path, ids, seen, seen, TEMPLATES)
    assert found["accuracy"].value == 1


def test_student_and_teacher_are_judged_by_their_own_vectors(tmp_path):
    labels = ["fruit", "fruit", "fruit", "bread", None]
    ids = labelled(tmp_path, labels, {"a fruit": FRUIT, "a bread": BREAD})
    teacher = np.eye(3, dtype=np.float32)[[0, 0, 0, 1, 2]]
    student = np.eye(3, dtype=np.float32)[[0, 1, 1, 1, 2]]
    found = zero_shot_metrics(tmp_path, ids, student, teacher, TEMPLATES)
    assert found.facts == {"images": 4, "classes": 2, "templates": 2}
    accuracy = found["accuracy"]
    assert (accuracy.value, accuracy.ceiling) == (0.5, 1)
    assert accuracy.low < 0.5 < accuracy.high
    assert accuracy.floor == 0.75  # who always says fruit; chance is 0.5


def test_images_without_labels_give_no_figure(tmp_path):
    ids = labelled(tmp_path, [None, " "], {"a fruit": FRUIT})
    assert zero_shot_metrics(tmp_path, ids, np.eye(2, 3), np.eye(2, 3), TEMPLATES) is None


def test_classes_that_the_teacher_embeds_alike_are_counted_and_named(tmp_path):
    texts = {"a fruit": FRUIT, "a bread": BREAD, "a roll": BREAD}
    ids = labelled(tmp_path, ["fruit", "bread", "roll"], texts)
    seen = np.eye(3, dtype=np.float32)[[0, 1, 1]]
    found = zero_shot_metrics(tmp_path, ids, seen, seen, TEMPLATES)
    assert found.facts["alike"] == 2 and found.facts["alike_classes"] == "'bread' and 'roll'"


@pytest.mark.parametrize("templates", [[], ["one {}"]])
def test_a_class_without_a_stored_prompt_is_named(tmp_path, templates):
    ids = labelled(tmp_path, ["fruit", "bread"], {"a fruit": FRUIT, "one fruit": FRUIT})
    found = zero_shot_metrics(tmp_path, ids, np.eye(2, 3), np.eye(2, 3), templates)
    assert found == MetricGroup(left_out=found.left_out)
    assert "labels have no stored class prompt, such as 'bread'" in found.left_out
    table = metrics_text({"zero_shot": found.model_dump()})
    assert table.splitlines()[-1].startswith("left out: zero_shot") and "'bread'" in table


def test_the_evaluation_measures_it_with_the_repositorys_templates(finished_world):
    found = evaluation_of(finished_world).zero_shot
    split = dict(
        database.connect(finished_world)
        .execute(
            "SELECT label, count(*) FROM images JOIN selection USING (image_id) "
            "WHERE status = 'ok' AND keep AND split = 'test' GROUP BY label"
        )
        .fetchall()
    )
    assert found.facts["images"] == sum(split.values())
    assert found.facts["classes"] == len(split) == 2
    assert found["accuracy"].floor == max(split.values()) / found.facts["images"]


@pytest.mark.slow
def test_real_photos_with_ten_labels_go_from_manifest_to_figure(shared, tiny_teacher, tmp_path):
    """A teacher of random weights: what counts is that every label meets its images."""
    from stages.distill import distill
    from stages.download import download
    from stages.evaluate import evaluate
    from stages.select import select
    from stages.teacher_embed import teacher_embed

    with (shared / "photos/clothing.csv").open() as file:
        labels = {row["file"]: row["label"] for row in csv.DictReader(file)}
    rows = [{"url": f"file:{name}", "label": label} for name, label in labels.items()]
    manifest = worlds.write_manifest(tmp_path / "clothing.csv", rows)
    (tmp_path / "prompts.txt").write_text("")
    data = tmp_path / "data"
    download(
        worlds.download_config(manifest, shared / "photos/clothing"), data, processes=1, threads=8
    )
    teacher_embed(worlds.teacher_config(tiny_teacher, tmp_path / "prompts.txt"), data, device="cpu")
    select(worlds.select_config(), data)
    distill(distill_config(batch=8), data, device="cpu")
    figures = evaluate(evaluate_config(prompts=[]), data, device="cpu")
    found = figures.zero_shot
    assert found.facts["classes"] == len(set(labels.values())) == 10
    assert found.facts["images"] == figures.images > 40
    sql = "SELECT url FROM images JOIN selection USING (image_id) WHERE keep AND split = 'test'"
    urls = database.connect(data).execute(sql).fetchall()
    counts = Counter(labels[url.removeprefix("file:")] for (url,) in urls)
    assert found["accuracy"].floor == max(counts.values()) / found.facts["images"]
