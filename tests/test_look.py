"""Looking at an image: maps of patches, and files that are no images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import worlds
from support.students import SMALL

from pipeline.core.config import StudentConfig
from pipeline.core.errors import PipelineError
from pipeline.explore.look import MOST, look, look_figure
from pipeline.explore.plots import overlay
from pipeline.explore.query_vectors import Queries, read_image
from pipeline.explore.search import Query
from pipeline.explore.segment import segment_figure, segment_image
from pipeline.models.patches import agreement, entropy, in_shares, on_grid, student_view
from pipeline.models.student import Outputs


@pytest.fixture(scope="module")
def data(finished_world) -> Path:
    return finished_world


@pytest.fixture(scope="module")
def queries(data, small_world) -> Queries:
    return Queries(data, small_world.card)


@pytest.fixture
def photo(small_world):
    return small_world.root / "3.jpg"


def test_patches_weighted_by_their_weights_are_the_embedding(queries, photo):
    """With same_norm all patches have one length, so unit patches point where the sum points."""
    pixels = queries.view(read_image(queries.data, photo), 32)
    seen = student_view(queries.student, pixels)
    mixed = (seen.weights[..., None] * seen.patches).sum(axis=(0, 1))
    np.testing.assert_allclose(mixed / np.linalg.norm(mixed), seen.embedding, atol=1e-5)
    assert seen.weights.sum() == pytest.approx(1)


def test_a_patch_stands_where_it_is_in_the_image(queries):
    """Painting over the patch in row 1, column 2 changes that patch most."""
    plain = np.full((32, 32, 3), 127, np.uint8)
    painted = plain.copy()
    painted[8:16, 16:24] = (255, 0, 0)
    before, after = (student_view(queries.student, pixels) for pixels in (plain, painted))
    change = np.linalg.norm(after.patches - before.patches, axis=-1)
    assert np.unravel_index(change.argmax(), change.shape) == (1, 2)


def test_an_overlay_is_yellow_where_the_map_is_high():
    values = np.zeros((4, 4))
    values[1, 2] = 1
    colours = overlay(np.full((32, 32, 3), 127, np.uint8), values, 0, 1).astype(int)
    yellow = colours[..., 1] - colours[..., 2] > 50
    assert yellow[8:16, 16:24].all() and yellow.sum() == 64


def test_a_look_with_the_teacher_has_all_panels(queries, photo, tmp_path):
    seen = look(queries, photo, ["a red circle", "not stored but embedded now"])
    assert seen.teacher is not None and not seen.notes
    assert seen.teacher.weights.shape == (4, 4)
    assert seen.teacher.weights.sum() == pytest.approx(1, abs=1e-5)
    assert seen.teacher.patches.shape == (4, 4, worlds.EMBEDDING_SIZE)
    look_figure(seen, tmp_path / "look.png")
    with Image.open(tmp_path / "look.png") as image:
        assert image.format == "PNG" and image.width > image.height


def test_the_teachers_attention_is_what_its_last_block_computes(queries, photo):
    """Recomputed from the block's own projections, for a tower of one block."""
    from pipeline.models.teacher_patches import teacher_view

    teacher = queries.teacher
    pixels = queries.view(read_image(queries.data, photo), teacher.image_size)
    found = teacher_view(teacher, pixels)
    tower = teacher.model.visual
    block = tower.transformer.resblocks[0]
    with torch.inference_mode():
        x = block.ln_1(tower._embeds(teacher.normalised(pixels[None])))[0]  # (1 + N, W)
        q, k, _ = (x @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, dim=-1)
        q, k = (y.unflatten(-1, (block.attn.num_heads, -1)).transpose(0, 1) for y in (q, k))
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        expected = scores.softmax(dim=-1).mean(dim=0)[0, 1:]
    expected = (expected / expected.sum()).reshape(4, 4).numpy()
    np.testing.assert_allclose(found.weights, expected, atol=1e-6)


def test_the_teachers_whole_image_is_its_embedding(queries, photo):
    from pipeline.models.teacher_patches import teacher_view

    pixels = queries.view(read_image(queries.data, photo), queries.teacher.image_size)
    direct = queries.teacher.embed_images(pixels[None])[0]
    np.testing.assert_allclose(teacher_view(queries.teacher, pixels).embedding, direct, atol=1e-5)


def test_without_the_teacher_what_is_left_out_is_named(data, photo, tmp_path):
    seen = look(Queries(data), photo, ["a red circle", "not stored"])
    assert [query.title for query in seen.queries] == ["a red circle"]
    assert seen.teacher is None
    assert any("'not stored'" in note for note in seen.notes)
    assert any("teacher's panels" in note for note in seen.notes)
    look_figure(seen, tmp_path / "look.png")
    assert (tmp_path / "look.png").stat().st_size > 10_000


def test_hostile_prompts_are_drawn_as_text(queries, photo, tmp_path):
    prompts = ["🦀", "$\\frac{1}$", "word " * 500, "\x1b[31mred\n\nnew line", "\u202eright to left"]
    seen = look(queries, photo, prompts)
    assert len(seen.queries) == 5
    assert seen.notes == ["Only the first 16 tokens of the text count."]
    look_figure(seen, tmp_path / "look.png")
    with Image.open(tmp_path / "look.png") as image:
        assert image.width < 2000 and image.height < 3000


def test_one_odd_patch_does_not_flatten_the_maps(queries, photo, tmp_path, monkeypatch):
    """The least of 96 cosines is far below the rest: the scale starts at the second percentile."""
    seen = look(queries, photo, ["a red circle", "a blue square", "a circle"])
    seen.student.patches[0, 0] = -seen.student.patches[0, 0]
    scales = []
    monkeypatch.setattr(
        "pipeline.explore.look.plots.colour_bar", lambda *a, **_: scales.append(a[2:4])
    )
    look_figure(seen, tmp_path / "look.png")
    views = seen.student.patches, seen.teacher.patches
    cosines = np.stack([v @ query.student for v in views for query in seen.queries])
    low, high = scales[1]
    assert cosines.min() < low < np.percentile(cosines, 5) and high == cosines.max()


def test_a_look_without_prompts_shows_the_weights(data, photo, tmp_path):
    look_figure(look(Queries(data), photo, []), tmp_path / "look.png")
    assert (tmp_path / "look.png").is_file()


def test_too_many_prompts_are_refused(data, photo):
    with pytest.raises(PipelineError, match="13 prompts: at most 12"):
        look(Queries(data), photo, ["a"] * (MOST + 1))


def test_looking_needs_a_student(small_world, photo):
    with pytest.raises(PipelineError, match="Run `pipeline distill` first"):
        look(Queries(small_world.data), photo, [])


def test_a_file_that_is_none_is_named(data, tmp_path):
    with pytest.raises(
        PipelineError, match=r"nothing\.jpg: no such file, and no image of the collection"
    ):
        look(Queries(data), tmp_path / "nothing.jpg", [])
    with pytest.raises(PipelineError, match="cannot be read: Is a directory"):
        look(Queries(data), tmp_path, [])


def test_a_file_that_is_no_image_is_refused(data, tmp_path):
    file = tmp_path / "page.jpg"
    file.write_text("<html>not found</html>")
    with pytest.raises(PipelineError, match="is no image that can be used: none of JPEG"):
        look(Queries(data), file, [])


def test_a_decompression_bomb_is_refused_with_its_size(data, tmp_path):
    file = tmp_path / "bomb.png"
    Image.new("1", (9000, 9000)).save(file)
    with pytest.raises(PipelineError, match="9000 x 9000 px is more than 1000000 px"):
        look(Queries(data), file, [])


def animated(file):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])


def cmyk(file):
    Image.new("CMYK", (40, 40), (0, 255, 255, 0)).save(file, "JPEG")


def deep(file):
    Image.fromarray(np.full((40, 40), 65535, np.uint16)).save(file, "PNG")


def palette(file):
    image = Image.new("P", (40, 40), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(file, "PNG", transparency=1)


@pytest.mark.parametrize(
    ("write", "colour"),
    [
        (animated, (255, 0, 0)),  # its first frame
        (cmyk, (255, 0, 0)),
        (deep, (255, 255, 255)),
        (palette, (255, 255, 255)),  # transparent red over white
    ],
)
def test_unusual_images_are_seen_in_their_colours(data, tmp_path, write, colour):
    write(tmp_path / "image")
    middle = read_image(data, tmp_path / "image")[16, 16].astype(int)
    assert np.abs(middle - colour).max() <= 3


def test_an_image_is_seen_upright(data, tmp_path):
    """Orientation 6: the camera's right side is up, so stored left is shown on top."""
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    seen = read_image(data, tmp_path / "turned.jpg")
    assert seen[4].mean() > 250 and seen[-4].mean() < 5


def test_entropy_runs_from_one_patch_to_all():
    one = np.zeros((4, 4), np.float32)
    one[1, 2] = 1
    assert entropy(one) == 0
    assert entropy(np.full((4, 4), 1 / 16, np.float32)) == pytest.approx(4)


def test_resized_weights_stay_a_distribution():
    weights = np.random.default_rng(0).dirichlet(np.ones(64)).reshape(8, 8).astype(np.float32)
    for grid in (4, 7, 14):
        resized = on_grid(weights, grid)
        assert resized.shape == (grid, grid) and resized.min() >= 0
        assert in_shares(resized).mean() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(on_grid(weights, 8), weights, atol=1e-6)


def test_agreement_is_a_correlation():
    weights = np.random.default_rng(0).dirichlet(np.ones(16)).reshape(4, 4).astype(np.float32)
    other = np.random.default_rng(1).dirichlet(np.ones(16)).reshape(4, 4).astype(np.float32)
    assert agreement(weights, weights) == pytest.approx(1, abs=1e-5)
    expected = np.corrcoef(weights.ravel(), other.ravel())[0, 1]
    assert agreement(weights, other) == pytest.approx(expected, abs=1e-5)
    assert agreement(np.full((4, 4), 1 / 16, np.float32), other) == 0


# Painting classes


class OneColour(torch.nn.Module):
    """Stands for a student of 4 x 4 patches whose patch says how red or how blue it is."""

    def __init__(self):
        super().__init__()
        self.config = StudentConfig(**SMALL | {"embedding_size": 3})
        self.mean = torch.zeros(1)

    def normalise(self, pixels):
        return pixels.float()

    def outputs(self, pixels):
        patches = torch.nn.functional.avg_pool2d(pixels, 8).flatten(2).transpose(1, 2)  # (B, 16, 3)
        return Outputs(patches.mean(dim=1), patches[..., 0], patches)


@pytest.fixture
def red_and_blue(queries, tmp_path, monkeypatch):
    """Queries whose student sees colours, and a photo: blue, but red in its upper left quarter."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[..., 2] = 200
    pixels[:32, :32] = (200, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "corner.png")
    monkeypatch.setitem(queries.__dict__, "student", OneColour())
    axes = {"red": np.eye(3, dtype=np.float32)[0], "blue": np.eye(3, dtype=np.float32)[2]}
    monkeypatch.setattr(queries, "text", lambda t: Query(t, axes[t], axes[t]), raising=False)
    return queries, tmp_path / "corner.png"


def test_each_place_is_painted_with_the_text_that_answers_best(red_and_blue, tmp_path):
    found = segment_image(*red_and_blue, ["red", "blue"], 64, None)
    assert found.labels.shape == (64, 64)
    assert (found.labels[:28, :28] == 1).all() and (found.labels[36:] == 2).all()
    segment_figure(found, tmp_path / "segment.png")
    with Image.open(tmp_path / "segment.png") as image:
        assert image.width > image.height > 400


def test_below_the_threshold_nothing_is_painted(red_and_blue):
    found = segment_image(*red_and_blue, ["red"], 64, 0.5)
    assert (found.labels[:24, :24] == 1).all() and (found.labels[40:] == 0).all()


def test_a_size_between_patches_is_rounded_up_and_a_small_one_is_the_students(red_and_blue):
    assert segment_image(*red_and_blue, ["red"], 41, None).labels.shape == (48, 48)
    assert segment_image(*red_and_blue, ["red"], 1, None).labels.shape == (32, 32)


def test_prompts_to_paint_must_be_some_and_known(queries, photo, data):
    with pytest.raises(PipelineError, match="0 prompts: name 1 to 12"):
        segment_image(queries, photo, [], 32, None)
    with pytest.raises(PipelineError, match="none of the prompts has a vector"):
        segment_image(Queries(data), photo, ["never embedded"], 32, None)


def test_an_image_of_the_collection_is_looked_at_by_its_id_or_url(finished_world):
    from pipeline.data import database
    from pipeline.data.pixels import decode
    from pipeline.explore.query_vectors import stored_image

    connection = database.connect(finished_world)
    image_id, url, jpg = connection.execute(
        "SELECT image_id, url, jpg FROM images WHERE status = 'ok' ORDER BY image_id LIMIT 1"
    ).fetchone()
    for named in (image_id, url):
        assert (stored_image(finished_world, named) == decode(jpg)).all()
        assert segment_image(Queries(finished_world), named, ["a red circle"], 32, None).title
    with pytest.raises(PipelineError, match=r"nothing\.jpg: no such file, and no image"):
        look(Queries(finished_world), "nothing.jpg", [])
