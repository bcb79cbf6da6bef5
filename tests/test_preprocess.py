"""An image on disk -> what the student wants: as CLIP's own preprocessing would make it."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.students import small_student
from support.worlds import picture

from pipeline.core.errors import PipelineError
from pipeline.core.records import Preprocessing
from pipeline.models.preprocessing import square_pixels

CLIP = Preprocessing(image_size=32)


def pillow(width: int = 70, height: int = 48, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize("size", [(70, 48), (48, 70), (32, 32), (300, 200)])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_square_is_what_open_clips_own_transform_makes(size, resize_mode, interpolation):
    from pipeline.models.open_clip import open_clip

    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(
            size=32, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=resize_mode,
            interpolation=interpolation,
        ),
        is_train=False,
    )  # fmt: skip
    image = pillow(*size)
    expected = (255 * transform(image)).permute(1, 2, 0).round().numpy()
    how = Preprocessing(image_size=32, resize_mode=resize_mode, interpolation=interpolation)
    differences = np.abs(square_pixels(image, how).astype(np.float32) - expected)
    # torch's resize and Pillow's round differently; half a pixel beside the crop would cost 10
    assert differences.max() <= 3 and differences.mean() < 0.5


def test_a_file_an_image_and_an_array_give_the_same_pixels(tmp_path):
    image = pillow()
    image.save(tmp_path / "image.png")
    found = [
        square_pixels(one, CLIP)
        for one in (tmp_path / "image.png", str(tmp_path / "image.png"), image, np.asarray(image))
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_a_photo_lying_on_its_side_is_turned_upright(tmp_path):
    image, exif = pillow(), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "side.png", exif=exif)
    np.testing.assert_array_equal(
        square_pixels(tmp_path / "side.png", CLIP), square_pixels(image, CLIP)
    )


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_an_image_of_any_mode_is_taken_as_rgb(mode):
    assert square_pixels(pillow(mode=mode), CLIP).shape == (32, 32, 3)


def test_transparency_is_white():
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert (square_pixels(clear, CLIP) == 255).all()


@pytest.mark.parametrize(
    ("write", "message"),
    [(None, "no file"), (b"no image", "is no image"), (picture(0)[:200], "is no image")],
)
def test_a_file_that_is_no_image_is_named(tmp_path, write, message):
    if write is not None:
        (tmp_path / "x.png").write_bytes(write)
    with pytest.raises(PipelineError, match=rf"{message}.*|.*x\.png.*{message}") as caught:
        square_pixels(tmp_path / "x.png", CLIP)
    assert "x.png" in str(caught.value)


@pytest.mark.parametrize(
    "array", [np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8), np.zeros((0, 8, 3), np.uint8)]
)
def test_an_array_of_another_kind_is_refused(array):
    with pytest.raises(PipelineError, match="expected uint8 RGB"):
        square_pixels(array, CLIP)


def test_preprocess_normalises_one_image_or_several():
    student = small_student(Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)))
    grey = np.full((50, 40, 3), 255, np.uint8)
    assert student.preprocess(grey).shape == (1, 3, 32, 32)
    pixels = student.preprocess([grey, pillow()])
    assert pixels.shape == (2, 3, 32, 32)
    torch.testing.assert_close(pixels[0], torch.full((3, 32, 32), 2.0))


def test_a_students_squash_sees_what_its_centre_crop_does_not():
    image = np.zeros((32, 96, 3), np.uint8)
    image[:, :16] = 255  # far left of a wide picture
    cropping, squashing = (
        small_student(Preprocessing(resize_mode=mode, mean=(0, 0, 0), std=(1, 1, 1)))
        for mode in ("shortest", "squash")
    )
    assert cropping.preprocess(image).max() == 0
    assert squashing.preprocess(image)[..., :4].min() > 0.9


def test_encode_image_is_the_embedding_at_unit_length_unless_told_otherwise():
    student = small_student()
    pixels = student.preprocess([pillow(), pillow(40, 90)])
    with torch.inference_mode():
        embedding, _ = student(pixels)
        unit, raw = student.encode_image(pixels), student.encode_image(pixels, normalize=False)
    torch.testing.assert_close(raw, embedding)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(unit * embedding.norm(dim=1, keepdim=True), embedding)
