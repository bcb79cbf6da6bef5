"""Real photos at real size: the full ViT-B/32 teacher, the full student, over HTTP, through DVC."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support import server as web
from support.checkout import Checkout

from pipeline.core.config import load_section

pytestmark = pytest.mark.slow
STEPS = 50


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """ViT-B-32-quickgelu with random weights, as safetensors: the published weights' size."""

    import torch
    from safetensors.torch import save_file

    from pipeline.models.open_clip import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu", load_weights=False)
    path = tmp_path_factory.mktemp("weights") / "vit_b_32.safetensors"
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, path)
    return path


def test_real_photos_go_through_every_stage(shared, checkpoint, tmp_path):
    photos = sorted((shared / "photos/flickr8k").glob("*.jpg"))
    captions = {
        row["file"]: row["captions_all"]
        for row in csv.DictReader((shared / "photos/flickr8k.csv").open())
    }
    pages = {f"/{path.name}": path.read_bytes() for path in photos}
    first, second = photos[0].name, photos[1].name
    pages |= {
        "/page.jpg": b"<html><body>no image</body></html>",
        "/truncated.jpg": pages[f"/{second}"][:5000],
        "/again.jpg": pages[f"/{first}"],
        "/silent.jpg": web.never,
    }
    checkout = Checkout(tmp_path)
    with web.serve(pages) as server:
        rows = [(server.url(f"/{path.name}"), captions[path.name]) for path in photos]
        bad = ["/missing.jpg", "/page.jpg", "/truncated.jpg", "/again.jpg", "/silent.jpg"]
        rows += [(server.url(path), "") for path in bad] + [(server.url(f"/{first}"), "")]
        with (tmp_path / "manifests/photos.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("url", "caption"), *rows])
        checkout.run(
            *("pipeline", "import", "teacher", "ViT-B-32-quickgelu"),
            *("--pretrained", str(checkpoint), "--out", "manifests/teachers/local.yaml"),
        )
        checkout.run("pipeline", "init", "clip-vit-b32", "--force")
        checkout.set(
            download={
                "manifest": "manifests/photos.csv", "rows_per_shard": 250, "timeout": 5.0, "retries": 0,
                "allow": ["127.0.0.0/8"], "per_host": 64,
            },
            teacher_embed={"card": "manifests/teachers/local.yaml", "views": 1, "batch": 64},
            select={"val": 0.05, "test": 0.1},
            distill={
                "steps": STEPS, "batch": 64, "warmup": 5, "views": 1, "validate_every": 25,
                "ema": 0.0,
            },
            evaluate={"batch": 64},
        )  # fmt: skip
        print(checkout.run("dvc", "repro", "evaluate"))
        assert "up to date" in checkout.run("dvc", "status", "evaluate", "--with-deps")

    def ask(sql: str) -> list[dict]:
        answer = checkout.run("pipeline", "query", sql, "--format", "json")
        return [json.loads(line) for line in answer.splitlines()]

    statuses = {
        row["url"].rsplit("/", 1)[1]: row["status"]
        for row in ask("SELECT url, status FROM images WHERE status NOT IN ('ok', 'duplicate_url')")
    }
    assert statuses == {
        "missing.jpg": "not_found",
        "page.jpg": "not_an_image",
        "truncated.jpg": "not_an_image",
        "silent.jpg": "timeout",
    }
    assert ask("SELECT count(*) AS n, count(DISTINCT row_id) AS d FROM images") == [
        {"n": len(rows), "d": len(rows)}
    ]
    assert ask("SELECT url FROM images WHERE status = 'duplicate_url'") == [
        {"url": server.url(f"/{first}")}
    ]
    assert ask("SELECT count(*) AS n FROM teacher") == [{"n": len(photos) + 1}]
    left_out = ask("SELECT reason, count(*) AS n FROM selection WHERE NOT keep GROUP BY reason")
    assert {row["reason"]: row["n"] for row in left_out} == {
        "duplicate": 1, "not_found": 1, "not_an_image": 2, "timeout": 1,
    }  # fmt: skip

    log = list(csv.DictReader((tmp_path / "data/student/training.csv").open()))
    assert int(log[-1]["step"]) == STEPS
    assert float(log[-1]["loss"]) < 0.9 * float(log[0]["loss"])
    figures = json.loads((tmp_path / "data/evaluation/metrics.json").read_text())
    assert figures["images"] > 150
    for figure in [*figures["fidelity"].values(), *figures["student_to_teacher"].values()]:
        assert {"value", "low", "high", "floor", "ceiling"} <= figure.keys()

    before = {path: path.stat().st_ino for path in (tmp_path / "data").glob("[it]*/**/*.parquet")}
    checkout.set(distill={"steps": 2, "warmup": 1})
    output = checkout.run("dvc", "repro", "distill")
    assert "Running stage 'distill'" in output
    for stage in ("download", "teacher_embed", "select"):
        assert f"Running stage '{stage}'" not in output
    assert before == {path: path.stat().st_ino for path in before}
    assert pq.read_metadata(next(iter(before))).num_rows > 0


def test_the_real_presets_near_duplicates_join_no_two_of_a_thousand_photos(shared):
    """With OpenAI's ViT-B/32 no two of 1,095 photos come above 0.930; re-encoded copies do."""
    real = np.load(shared / "clip_vit_b32/flickr8k_image_embeddings.npz")["embedding"]
    cosines = real @ real.T
    np.fill_diagonal(cosines, -1)
    preset = Path(__file__).parents[1] / "pipeline/core/presets/clip-vit-b32.yaml"
    threshold = load_section(preset, "select").near_duplicates
    assert cosines.max() + 0.02 < threshold <= 0.97
