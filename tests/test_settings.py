"""params.yaml is set in place, and what is set fits the collection."""

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from support import worlds

from pipeline.core.config import SECTIONS, load_section
from pipeline.core.errors import PipelineError
from pipeline.core.presets import next_step, write_preset
from pipeline.core.presets.settings import set_values, values_for

ROOT = Path(__file__).parents[1]
REAL = (files("pipeline.core.presets") / "clip-vit-b32.yaml").read_text()


def pipeline(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pipeline.cli", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_values_are_set_and_every_comment_stays(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text(REAL)
    values = {"download.root": "/my photos/2024: a #1", "select.test": 0.2, "distill.batch": 32}
    values |= {"distill.student.layers": 3, "evaluate.prompts": ["a dog", "it's"]}
    set_values(file, values)
    changed = yaml.safe_load(file.read_text())
    expected = yaml.safe_load(REAL)
    for name, value in values.items():
        *path, key = name.split(".")
        section = expected
        for part in path:
            section = section[part]
        section[key] = value
    assert changed == expected
    comments = [
        [line.partition(" # ")[2] for line in t.splitlines()] for t in (REAL, file.read_text())
    ]
    kept = [pair for pair in zip(*comments, strict=True) if pair[0]]
    assert [a for a, _ in kept] == [b for _, b in kept]


def test_a_key_that_is_not_there_is_named_and_nothing_is_written(tmp_path):
    (tmp_path / "params.yaml").write_text(REAL)
    with pytest.raises(PipelineError, match=r"no line for select\.tset"):
        set_values(tmp_path / "params.yaml", {"select.val": 0.5, "select.tset": 0.1})
    assert (tmp_path / "params.yaml").read_text() == REAL


@pytest.mark.parametrize("images", [3, 60, 240, 2000, 30_000, 3_000_000])
def test_values_for_any_number_of_images_are_valid_and_leave_enough_to_train_on(tmp_path, images):
    file = tmp_path / "params.yaml"
    file.write_text(REAL)
    set_values(file, values_for(images))
    for section in SECTIONS:
        load_section(file, section)
    distill, select = load_section(file, "distill"), load_section(file, "select")
    trained = images * (1 - select.test - select.val)
    assert distill.batch == 8 or distill.batch * 4 <= trained
    assert (distill.mixup > 0) == (
        images < 10_000
    )  # what keeps few images from being learned by heart
    assert select.test * images >= 48 or select.test == 0.2
    assert distill.warmup < distill.steps and distill.steps <= 100_000


def test_millions_keep_what_the_preset_says():
    preset = yaml.safe_load(REAL)
    for name, value in values_for(3_000_000).items():
        section, key = name.split(".")
        assert preset[section][key] == value, name


def test_own_photos_need_two_commands_and_no_editor(tmp_path):
    photos = tmp_path / "my photos"
    photos.mkdir()
    for i in range(6):
        (photos / f"{i}.jpg").write_bytes(worlds.picture(i, kind="JPEG"))
    (tmp_path / "labels.csv").write_text("file,label\n0.jpg,dress\n1.jpg,hat\n")
    done = pipeline(tmp_path, "init", "clip-vit-b32")
    assert done.returncode == 0 and "pipeline import folder PHOTOS" in done.stdout
    done = pipeline(tmp_path, "import", "folder", "my photos", "--labels", "labels.csv")
    assert done.returncode == 0, done.stderr
    assert "download.root" in done.stdout and "dvc repro" in done.stdout
    config = load_section(tmp_path / "params.yaml", "download")
    assert Path(config.root) == photos and config.manifest == "manifests/images.csv"
    evaluate = load_section(tmp_path / "params.yaml", "evaluate")
    assert evaluate.prompts == ["a photo of a dress", "a photo of a hat"]
    assert "0.jpg,,dress" in (tmp_path / config.manifest).read_text()
    again = pipeline(tmp_path, "import", "folder", "my photos")
    assert again.returncode == 1 and "--force" in again.stderr


def test_the_demos_parameters_are_not_turned_to_photos(tmp_path):
    write_preset("demo", tmp_path / "params.yaml", force=False)
    assert next_step(tmp_path / "params.yaml") == "`dvc repro`."
    done = pipeline(tmp_path, "import", "folder", str(tmp_path))
    assert done.returncode == 1 and "pipeline init clip-vit-b32 --force" in done.stderr


@pytest.mark.parametrize(
    "text,reason",
    [
        ("name,label\na.jpg,x\n", "the columns name, label; expected `file`"),
        ("file,label\nb.jpg,x\n", "not in .*, such as b.jpg"),
        ("", "the columns none"),
    ],
)
def test_labels_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, text, reason):
    from pipeline.fetch.folder import write_folder_manifest

    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(PipelineError, match=reason):
        write_folder_manifest(tmp_path, tmp_path / "m.csv", tmp_path / "labels.csv")
    assert not (tmp_path / "m.csv").exists()


@pytest.mark.parametrize(
    "name,size,patch,values,heads",
    [
        ("clip-vit-b32", 224, 28, 512, 16),
        ("clip-vit-b32-256-datacomp", 256, 32, 512, 16),
        ("siglip2-vit-b16", 224, 28, 768, 24),
    ],
)
def test_a_student_is_set_to_fit_its_teacher(tmp_path, name, size, patch, values, heads):
    from pipeline.models.card import read_card
    from pipeline.models.stated_preprocessing import stated_preprocessing, student_settings

    card_path = ROOT / f"manifests/teachers/{name}.yaml"
    card = read_card(card_path)
    write_preset("clip-vit-b32", tmp_path / "p.yaml", False, student_settings(card, card_path))
    student = load_section(tmp_path / "p.yaml", "distill").student
    assert (student.image_size, student.patch_size) == (size, patch)
    assert (student.embedding_size, student.heads) == (values, heads)
    assert load_section(tmp_path / "p.yaml", "teacher_embed").card == str(card_path)
    assert card.name == name and card.license in ("MIT", "Apache-2.0")
    squashed = stated_preprocessing(card, card_path).resize_mode == "squash"
    assert squashed == name.startswith("siglip")


def test_init_names_the_teachers_licence_and_an_unknown_teacher():
    done = pipeline(ROOT, "init", "clip-vit-b32", "--teacher", "nobody", "--params", "/nowhere/p")
    assert done.returncode == 1 and "no teacher card manifests/teachers/nobody.yaml" in done.stderr


def test_what_the_report_searches_for_is_embedded():
    """By the lists of the preset: texts that nobody stored would leave the first report empty."""
    prompts = (ROOT / "manifests/prompts/common.txt").read_text().splitlines()
    templates = (ROOT / "manifests/prompts/templates.txt").read_text().splitlines()
    values = yaml.safe_load(REAL)
    assert values["teacher_embed"]["prompts"] == "manifests/prompts/common.txt"
    assert set(values["evaluate"]["prompts"]) <= set(prompts)
    (prompt,) = values_for(10, ["dress"])["evaluate.prompts"]
    assert prompt in [template.replace("{}", "dress") for template in templates]
