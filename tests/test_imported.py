"""Embeddings that others computed find their images, or say why not."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import worlds
from support.finished import distill_config

from pipeline.core.config import DistillConfig, EvaluateConfig, SelectConfig
from pipeline.core.errors import PipelineError
from pipeline.core.provenance import digest, read_stamp
from pipeline.core.records import NamedTeacher, Recipe
from pipeline.core.work import Work
from pipeline.data import database
from pipeline.verify.verify import verify
from stages.download import download
from stages.import_embeddings import import_embeddings

IMAGES, SIZE = 40, 16
TEACHER = NamedTeacher(
    name="somebody's", model="ViT-B-32", pretrained="openai", sha256=None, activation="gelu"
)


def photos_config(manifest: Path, root: Path, rows_per_shard: int, image_size: int):
    return worlds.download_config(
        manifest, root, rows_per_shard=rows_per_shard, image_size=image_size,
        quality=90, timeout=10.0, robots=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """data/images of 40 photos of noise, twenty in each of two folders."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        path = root / "photos" / ("a" if i < 20 else "b") / f"{i:02} x.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    urls = [f"file:{'a' if i < 20 else 'b'}/{i:02} x.png" for i in range(IMAGES)]
    (root / "manifest.csv").write_text("url\n" + "\n".join(urls) + "\nfile:a/lost.png\n")
    config = photos_config(root / "manifest.csv", root / "photos", 30, 32)
    download(config, root / "data", processes=1, threads=2)
    return root


@pytest.fixture
def data(world: Path, tmp_path: Path) -> Path:
    """data/ with those images, and nothing else yet."""
    shutil.copytree(world / "data/images", tmp_path / "data/images")
    return tmp_path / "data"


def vectors(count: int, seed: int = 1) -> np.ndarray:
    """(count, SIZE) float32, of many lengths."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, SIZE)).astype(np.float32) * rng.uniform(0.1, 9, (count, 1))


def npz(path: Path, **columns) -> Path:
    np.savez(path, **columns)
    return path


def files(numbers=range(IMAGES)) -> list[str]:
    return [f"{i:02} x.png" for i in numbers]


def stored(data: Path, what: str = "url, embedding FROM teacher JOIN images USING (image_id)"):
    return database.connect(data).sql(f"SELECT {what} ORDER BY 1").fetchall()


def assert_all_there(data: Path, expected: np.ndarray) -> None:
    rows = stored(data)
    urls = sorted((f"file:{'a' if i < 20 else 'b'}/{i:02} x.png", i) for i in range(IMAGES))
    assert [url for url, _ in rows] == [url for url, _ in urls]
    found = np.array([vector for _, vector in rows])
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(found - unit[[i for _, i in urls]]).max() < 1e-3  # float16


def test_npz_vectors_are_found_by_file_name_and_scaled_to_unit_length(data, tmp_path):
    given = vectors(IMAGES)
    source = npz(tmp_path / "v.npz", image=files(), embedding=given)
    summary = import_embeddings(data, source, teacher=TEACHER)
    assert_all_there(data, given)
    counts = summary.images, summary.further_counts["images without embedding"]
    assert counts == (IMAGES, 0) and summary.embedding_size == SIZE
    assert summary.teacher.card == TEACHER and summary.views == 1


def test_a_url_decides_before_a_file_name_and_a_key_comes_last(data, tmp_path):
    given = vectors(3)
    columns = {
        "url": ["file:a/00 x.png", "elsewhere/01 x.png", "nowhere/7"],
        "image_path": ["b/33 x.png", "b/34 x.png", "nothing.png"],
        "key": ["05 x", "06 x", "07 x"],
    }
    source = npz(tmp_path / "v.npz", embedding=given, **columns)
    summary = import_embeddings(data, source, teacher=TEACHER)
    assert [url for url, _ in stored(data)] == [
        "file:a/00 x.png",
        "file:a/01 x.png",
        "file:a/07 x.png",
    ]
    assert summary.further_counts["images without embedding"] == IMAGES - 3


def test_a_percent_encoded_url_with_a_query_still_names_its_file(data, tmp_path):
    source = npz(
        tmp_path / "v.npz", url=["https://host/dir/12%20x.png?size=3"], embedding=vectors(1)
    )
    import_embeddings(data, source, teacher=TEACHER)
    assert [url for url, _ in stored(data)] == ["file:a/12 x.png"]


def clip_retrieval(folder: Path, given: np.ndarray, texts: np.ndarray) -> Path:
    for stage_folder in ("img_emb", "text_emb", "metadata"):
        (folder / stage_folder).mkdir(parents=True)
    for part, mine in enumerate(np.array_split(np.arange(IMAGES), 3)):
        np.save(folder / f"img_emb/img_emb_{part}.npy", given[mine].astype(np.float16))
        np.save(folder / f"text_emb/text_emb_{part}.npy", texts[mine].astype(np.float16))
        table = {"image_path": [f"/disk/{f}" for f in files(mine)]}
        table |= {"caption": [f"caption {i}" for i in mine], "similarity": [0.3] * len(mine)}
        pq.write_table(pa.table(table), folder / f"metadata/metadata_{part}.parquet")
    return folder


def test_a_damaged_metadata_file_of_somebody_else_is_not_ours_to_delete(data, tmp_path):
    source = clip_retrieval(tmp_path / "theirs", vectors(IMAGES), vectors(IMAGES, seed=2))
    (source / "metadata/metadata_1.parquet").write_bytes(b"torn")
    with pytest.raises(PipelineError, match=r"metadata_1\.parquet.*Get it again") as refusal:
        import_embeddings(data, source, teacher=TEACHER)
    assert "Delete" not in str(refusal.value)


def test_swollen_metadata_and_vectors_that_are_none_are_refused_and_name_the_file(data, tmp_path):
    """A kilobyte of Parquet with one caption for every row: 60 MB here, as much as one likes."""
    source = clip_retrieval(tmp_path / "theirs", vectors(IMAGES), vectors(IMAGES, seed=2))
    file = source / "metadata/metadata_0.parquet"
    sound = pq.read_table(file)
    repeated = pa.DictionaryArray.from_arrays(np.zeros(len(sound), np.int32), ["x" * 10_000_000])
    swollen = sound.drop_columns("caption").append_column("caption", repeated)
    pq.write_table(swollen, file, store_schema=False, compression="zstd")
    assert file.stat().st_size < 10_000
    with pytest.raises(PipelineError, match=r"metadata_0\.parquet: caption is said to have"):
        import_embeddings(data, source, teacher=TEACHER)
    pq.write_table(sound, file)
    for bad in (b"", b"\x93NUMPY", pickle.dumps([1.0])):
        (source / "img_emb/img_emb_1.npy").write_bytes(bad)
        with pytest.raises(PipelineError, match=r"img_emb_1\.npy cannot be read as npy"):
            import_embeddings(data, source, teacher=TEACHER)


def test_clip_retrieval_folder_gives_images_and_captions(data, tmp_path):
    given, texts = vectors(IMAGES), vectors(IMAGES, seed=2)
    source = clip_retrieval(tmp_path / "out", given, texts)
    summary = import_embeddings(data, source, teacher=TEACHER)
    assert_all_there(data, given)
    assert summary.texts == IMAGES
    rows = stored(data, "text, t.embedding, url FROM texts t JOIN images USING (image_id)")
    for text, vector, url in rows:
        i = int(text.split()[1])
        assert f"{i:02} x.png" in url
        assert np.abs(vector - texts[i] / np.linalg.norm(texts[i])).max() < 2e-3


def test_captions_and_prompts_come_from_npz_files_beside_the_images(data, tmp_path):
    source = npz(tmp_path / "v.npz", image=files(), embedding=vectors(IMAGES))
    captions = npz(
        tmp_path / "c.npz", image=[*files([3, 3, 4]), "who.png"],
        caption=["three", "drei", "four", "five"], embedding=vectors(4),
    )  # fmt: skip
    prompts = npz(tmp_path / "p.npz", prompt=["a dog", "a cat"], embedding=vectors(2))
    summary = import_embeddings(data, source, teacher=TEACHER, texts=[captions, prompts])
    found = stored(data, "text, image_id IS NULL FROM texts")
    prompt = {"a cat": True, "a dog": True, "drei": False, "four": False, "three": False}
    assert dict(found) == prompt
    assert (summary.texts, summary.further_counts["texts without image"]) == (5, 1)


def test_the_same_vector_twice_is_counted_and_a_different_one_refused(data, tmp_path):
    given = vectors(4)
    twice = npz(tmp_path / "v.npz", image=files([0, 1, 0]), embedding=given[[0, 1, 0]])
    assert (
        import_embeddings(data, twice, teacher=TEACHER).further_counts["repeated embeddings"] == 1
    )
    other = npz(tmp_path / "w.npz", image=files([0, 1, 0]), embedding=given[:3])
    with pytest.raises(PipelineError, match=r"two different embeddings.*00 x\.png"):
        import_embeddings(data, other, teacher=TEACHER)


def test_a_file_name_that_two_images_share_leads_to_neither(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        pixels = np.full((32, 32, 3), 40 * len(folder + "a" * (folder == "b")), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / folder / "same.png")
    (tmp_path / "m.csv").write_text("url\nfile:a/same.png\nfile:b/same.png\n")
    config = photos_config(tmp_path / "m.csv", tmp_path / "photos", 10_000, 32)
    download(config, tmp_path / "data", processes=1, threads=1)
    source = npz(tmp_path / "v.npz", image=["same.png"], embedding=vectors(1))
    with pytest.raises(PipelineError, match="none of the embeddings belongs"):
        import_embeddings(tmp_path / "data", source, teacher=TEACHER)
    source = npz(tmp_path / "v.npz", image=["same.png", "file:b/same.png"], embedding=vectors(2))
    summary = import_embeddings(tmp_path / "data", source, teacher=TEACHER)
    assert (summary.images, summary.further_counts["embeddings without image"]) == (1, 1)


@pytest.mark.parametrize("fault", [0.0, np.nan, np.inf])
def test_zero_and_not_finite_vectors_are_refused_by_count_and_name(data, tmp_path, fault):
    given = vectors(IMAGES)
    given[[5, 6]] = fault
    source = npz(tmp_path / "v.npz", image=files(), embedding=given)
    with pytest.raises(PipelineError, match=r"2 of 40 embeddings.*05 x\.png"):
        import_embeddings(data, source, teacher=TEACHER)
    assert not (data / "teacher").exists()


def test_texts_of_another_width_than_the_images_are_refused(data, tmp_path):
    source = npz(tmp_path / "v.npz", image=files(), embedding=vectors(IMAGES))
    texts = npz(tmp_path / "p.npz", prompt=["a dog"], embedding=vectors(1)[:, :8])
    with pytest.raises(PipelineError, match="differ in width"):
        import_embeddings(data, source, teacher=TEACHER, texts=[texts])


def test_texts_without_a_text_are_refused_with_what_was_found(data, tmp_path):
    source = npz(tmp_path / "v.npz", image=files(), embedding=vectors(IMAGES))
    with pytest.raises(PipelineError, match="found the columns image; expected `prompt`"):
        import_embeddings(data, source, teacher=TEACHER, texts=[source])


def test_unknown_layouts_and_uneven_files_are_refused_with_what_was_found(data, tmp_path):
    with pytest.raises(PipelineError, match="known layout"):
        import_embeddings(data, tmp_path, teacher=TEACHER)
    uneven = npz(tmp_path / "v.npz", image=files()[:3], embedding=vectors(IMAGES))
    with pytest.raises(PipelineError, match=r"\(40, 16\).*'image': 3"):
        import_embeddings(data, uneven, teacher=TEACHER)
    nameless = npz(tmp_path / "w.npz", embedding=vectors(IMAGES))
    with pytest.raises(PipelineError, match="expected"):
        import_embeddings(data, nameless, teacher=TEACHER)
    unknown = npz(tmp_path / "x.npz", image=["who.png"], embedding=vectors(1))
    with pytest.raises(PipelineError, match=r"who\.png.*same urls or file names"):
        import_embeddings(data, unknown, teacher=TEACHER)


def test_import_and_teacher_embed_do_not_overwrite_each_other(data, tmp_path):
    source = npz(tmp_path / "v.npz", image=files(), embedding=vectors(IMAGES))
    import_embeddings(data, source, teacher=TEACHER)
    with pytest.raises(PipelineError, match="did not write"):
        Work(data, "teacher_embed", data / "teacher", Recipe()).begin()
    worlds.forge_stamp(data / "teacher", lambda stamp: stamp.update(stage="teacher_embed"))
    other = npz(tmp_path / "w.npz", image=files(), embedding=vectors(IMAGES, seed=3))
    with pytest.raises(PipelineError, match="did not write"):
        import_embeddings(data, other, teacher=TEACHER)


def test_what_was_imported_is_to_be_imported_again_when_the_images_have_changed(data, tmp_path):
    from stages.distill import distill
    from stages.select import select

    source = npz(tmp_path / "v.npz", image=files(), embedding=vectors(IMAGES))
    import_embeddings(data, source, teacher=TEACHER)
    select(worlds.select_config(), data)

    def of_other_images(stamp: dict) -> None:
        stamp["recipe"]["inputs"]["images"] = "other"
        stamp["stamp"] = digest(stamp["recipe"])

    worlds.forge_stamp(data / "teacher", of_other_images)
    with pytest.raises(PipelineError, match="Run `pipeline import embeddings` first"):
        select(worlds.select_config(), data)
    with pytest.raises(PipelineError, match="Run `pipeline import embeddings` first"):
        distill(distill_config(), data, device="cpu", workers=1)
    assert "pipeline import embeddings" in {finding.run for finding in verify(data)}


def test_a_second_import_of_the_same_source_rewrites_nothing(data, tmp_path):
    source = npz(tmp_path / "v.npz", image=files(), embedding=vectors(IMAGES))
    import_embeddings(data, source, teacher=TEACHER)
    before = {path: path.stat().st_mtime_ns for path in (data / "teacher").rglob("*")}
    import_embeddings(data, source, teacher=TEACHER)
    assert {path: path.stat().st_mtime_ns for path in (data / "teacher").rglob("*")} == before


def test_later_stages_run_on_imported_vectors_and_leave_the_others_out(data, tmp_path):
    from stages.distill import distill
    from stages.evaluate import evaluate
    from stages.select import select

    source = npz(tmp_path / "v.npz", image=files(range(2, 36)), embedding=vectors(34))
    import_embeddings(data, source, teacher=TEACHER)
    counts = select(SelectConfig(where="true", val=0.2, test=0.3, near_duplicates=1.0), data)
    assert counts.pop("left out: no embedding") == IMAGES - 34
    assert sum(counts[split] for split in ("train", "val", "test")) == 34
    config = DistillConfig.model_validate(
        {
            "student": dict(
                image_size=16, patch_size=8, embedding_size=SIZE, heads=2, layers=1,
                neighbourhood_mask=True, same_norm=True, pool="extra-head", temperature=1.0,
            ),
            "loss": dict(l1=1.0, cosine=0.0, relational=0.0, caption=0.0),
            "image_sizes": [16], "relational_scale": 20.0, "views": 1, "color_jitter": 0.0,
            "min_crop_area": 1.0, "mixup": 0.0,
            "fixed_stem_frequencies": 0,
            "steps": 2, "batch": 8,
            "learning_rate": 0.001, "schedule": "cosine", "warmup": 1, "weight_decay": 0.0,
            "max_grad_norm": 1.0, "ema": 0.0, "precision": "float32", "validate_every": 2,
            "shuffle_row_groups": 2, "init": None, "max_skipped_steps": 0, "early_stopping": 0,
            "seed": 0,
        }
    )  # fmt: skip
    assert distill(config, data, device="cpu", workers=1)["steps"] == 2
    config = EvaluateConfig(
        split="test", batch=8, prompts=[], templates=str(worlds.TEMPLATES),
        segmentation=worlds.segmentation(),
    )  # fmt: skip
    figures = evaluate(config, data, device="cpu")
    assert figures.images == counts["test"]
    assert read_stamp(data / "student", "distill").recipe.inputs["teacher"]


def test_real_clip_vectors_find_their_photos_and_their_captions_agree(shared, tmp_path):
    names = np.load(shared / "clip_vit_b32/flickr8k_image_embeddings.npz")["image"][:60]
    urls = "\n".join(f"file:{name}" for name in names)
    (tmp_path / "m.csv").write_text(f"url\n{urls}\n")
    config = photos_config(tmp_path / "m.csv", shared / "photos/flickr8k", 10_000, 256)
    data, vectors_ = tmp_path / "data", shared / "clip_vit_b32"
    download(config, data, processes=1, threads=4)
    captions = vectors_ / "flickr8k_caption_embeddings.npz"
    summary = import_embeddings(
        data, vectors_ / "flickr8k_image_embeddings.npz", teacher=TEACHER, texts=[captions]
    )
    assert summary.images == 60 and summary.further_counts["embeddings without image"] == 1035
    agreement = "avg(list_cosine_similarity(t.embedding, x.embedding))"
    sql = (
        f"SELECT {agreement} FILTER (t.image_id = x.image_id), {agreement} FROM teacher t, texts x"
    )
    [(own, any_)] = database.connect(data).sql(sql).fetchall()
    assert own > any_ + 0.05  # a caption lies nearer to its own photo
