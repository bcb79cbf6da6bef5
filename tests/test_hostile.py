"""Files that lie: announced sizes that are absurd, headers that do not fit, code in weights."""

import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from support import worlds
from support.finished import STUDENT, distill_config

from pipeline.core.config import StudentConfig
from pipeline.core.errors import PipelineError
from pipeline.core.provenance import file_digest
from pipeline.fetch.manifest import write_lists
from pipeline.models.student import Student

# Images


def jpeg_that_announces(width: int, height: int) -> bytes:
    """A small JPEG whose frame header says another size."""
    data = bytearray(worlds.picture(0, 32, 32, "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def png_of(chunk: bytes, body: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    data = worlds.picture(0, 32, 32, "PNG")
    extra = struct.pack(">I", len(body)) + chunk + body
    return data[:33] + extra + struct.pack(">I", zlib.crc32(chunk + body)) + data[33:]


def tiff_of_endless_directories() -> bytes:
    """A TIFF whose directory names itself as the next one."""
    entry = struct.pack("<HHII", 256, 4, 1, 32)
    return b"II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 8)


def gif_of(width: int, height: int) -> bytes:
    data = bytearray(worlds.picture(0, 32, 32, "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def bmp_of(width: int, height: int) -> bytes:
    data = bytearray(worlds.picture(0, 32, 32, "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def zlib_bomb() -> bytes:
    return png_of(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 200_000_000))


IMAGES = {
    "jpeg of 65500 x 65500": jpeg_that_announces(65_500, 65_500),
    "jpeg of 0 x 0": jpeg_that_announces(0, 0),
    "jpeg of 9000 x 9000, which would be 243 MB": jpeg_that_announces(9000, 9000),
    "gif of 65535 x 65535": gif_of(65_535, 65_535),
    "gif of 0 x 0": gif_of(0, 0),
    "bmp of 2 ** 31 - 1 squared": bmp_of(2**31 - 1, 2**31 - 1),
    "bmp of negative size": bmp_of(-5, -5),
    "tiff whose directory is its own successor": tiff_of_endless_directories(),
    "png whose comment is 200 MB": zlib_bomb(),
    "png of a cut chunk": worlds.picture(0, 32, 32, "PNG")[:50],
    "webp that is a header": worlds.picture(0, 32, 32, "WEBP")[:24],
}


# Peak memory is read from /proc: what getrusage says begins with the peak of the parent.
PEAK = """
def peak():
    with open("/proc/self/status") as status:
        return int(status.read().split("VmHWM:")[1].split()[0]) // 1024
"""
READ = (
    PEAK
    + """
import pickle, sys, warnings
from pipeline.data.pixels import NotAnImage
from pipeline.fetch.decoding import TooManyPixels, canonical_jpeg
warnings.simplefilter("ignore")
for name, data in pickle.load(sys.stdin.buffer).items():
    before = peak()
    try:
        found = canonical_jpeg(data, 256, 90, 10_000_000)[1:]
    except (NotAnImage, TooManyPixels) as error:
        found = type(error).__name__
    print(name, found, peak() - before, sep="|")
"""
)


def test_images_that_lie_about_their_size_cost_no_memory():
    """In a process of its own, whose peak the system measures; a decoded pixel is 3 bytes."""
    ended = subprocess.run(
        [sys.executable, "-c", READ], input=pickle.dumps(IMAGES), capture_output=True, timeout=120,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    lines = [line.split("|") for line in ended.stdout.decode().splitlines()]
    assert [name for name, *_ in lines] == list(IMAGES), ended.stderr
    assert {name: int(grown) for name, _, grown in lines if int(grown) > 60} == {}, "MB"
    refused = {name for name, found, _ in lines if found in ("NotAnImage", "TooManyPixels")}
    assert refused == IMAGES.keys() - {"gif of 0 x 0"}, "whose frame says 32 x 32"


# Manifests


def parquet(**columns) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def with_lying_footer(data: bytes, length: int) -> bytes:
    return data[:-8] + struct.pack("<I", length) + b"PAR1"


URLS = parquet(url=["http://example.org/a.jpg"])
MANIFESTS = {
    "url is a number": parquet(url=[1.5]),
    "url is a list": parquet(url=[["a", "b"]]),
    "url is bytes that are no text": parquet(url=[b"\xff\xfe\x00"]),
    "caption is a struct": parquet(url=["a"], caption=[{"x": 1}]),
    "boxes are text": parquet(url=["a"], boxes=["no boxes"]),
    "footer of 4 GB": with_lying_footer(URLS, 2**32 - 1),
    "footer of 0 bytes": with_lying_footer(URLS, 0),
    "only the magic": b"PAR1PAR1",
    "rubbish between the magic": b"PAR1" + os.urandom(200) + struct.pack("<I", 200) + b"PAR1",
    "a pickle": pickle.dumps([1, 2]),
    "an archive": b"PK\x03\x04" + b"\0" * 60,
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_is_none_is_one_message_or_rows(tmp_path, name):
    """Whatever can be read as a list of urls is one; the URL policy judges them later."""
    file = tmp_path / "m.parquet"
    file.write_bytes(MANIFESTS[name])
    try:
        lists = write_lists(file, tmp_path, 2, tmp_path / "lists")
    except PipelineError as error:
        assert "m.parquet" in str(error)
    else:
        assert sum(pq.read_metadata(path).num_rows for path in lists) == 1


def test_a_manifest_that_announces_more_rows_than_it_has_is_refused(tmp_path):
    """Every count of 100 in its footer is made 8191 in turn."""
    data = bytearray(parquet(url=[f"u{i}" for i in range(100)]))
    length = struct.unpack("<I", data[-8:-4])[0]
    footer = slice(len(data) - 8 - length, len(data) - 8)
    refused = 0
    for at in range(footer.start, footer.stop - 1):
        if data[at : at + 2] == b"\xc8\x01":  # zigzag varint of 100
            lying = bytearray(data)
            lying[at : at + 2] = b"\xfe\x7f"  # 8191
            (tmp_path / "m.parquet").write_bytes(lying)
            try:
                lists = write_lists(tmp_path / "m.parquet", tmp_path, 50, tmp_path / "lists")
            except PipelineError:
                refused += 1
            else:
                assert sum(pq.read_metadata(p).num_rows for p in lists) <= 8191
    assert refused


def repeated(value: str, rows: int) -> pa.Array:
    """One value in so many rows, of which a Parquet file holds one."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([value]))


SWOLLEN = {  # Parquet of some kilobytes -> bytes of text in it
    "a million equal urls": {"url": repeated("http://example.org/a.jpg", 1_000_000)},
    "400 captions of 750 kB": {
        "url": pa.array([f"file:{i}" for i in range(400)]),
        "caption": repeated("a b " * 187_500, 400),
    },
    "3,000 urls of 1 MB": {"url": repeated("http://example.org/" + "x" * 1_000_000, 3000)},
}
READ_LISTS = (
    PEAK
    + """
import sys
from pathlib import Path
import pyarrow.parquet as pq
from pipeline.core.errors import PipelineError
from pipeline.fetch.manifest import write_lists
folder = Path(sys.argv[1])
try:
    lists = write_lists(folder / "m.parquet", folder, 1_000_000, folder / "lists", say=lambda _: 0)
    found = sum(pq.read_metadata(path).num_rows for path in lists)
except PipelineError as error:
    found = str(error)
print(sum(path.stat().st_size for path in folder.rglob("*")) >> 20, peak(), found, sep="|")
"""
)


@pytest.mark.parametrize("name", SWOLLEN)
def test_a_swollen_manifest_is_read_or_refused_in_bounded_memory_and_disk(tmp_path, name):
    """A million equal urls took 1.7 GB; captions ended in a traceback, after 0.5 GB of disk."""
    columns = pa.table(SWOLLEN[name])
    pq.write_table(columns, tmp_path / "m.parquet", store_schema=False, compression="zstd")
    assert (tmp_path / "m.parquet").stat().st_size < 10_000
    output, errors = worlds.run_code(READ_LISTS, tmp_path).communicate(timeout=300)
    disk, peak, found = output.strip().split("|")
    assert int(disk) < 150 and int(peak) < 1600, "MB"
    assert found == str(len(columns)) or "texts that need more than 2GB" in found, errors


# Weights


def safetensors(header: dict, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LYING = {
    "a header of 2 ** 63 bytes": safetensors({}, length=2**63),
    "a header longer than the file": safetensors({}, length=10_000),
    "a tensor of 2 ** 60 values": safetensors({"conv1.weight": tensor([2**30, 2**30], 0, 4)}),
    "data beyond the end": safetensors({"conv1.weight": tensor([100], 0, 400)}, b"\0" * 40),
    "data that overlap": safetensors(
        {"conv1.weight": tensor([2], 0, 8), "ln_pre.bias": tensor([2], 4, 12)}, b"\0" * 12
    ),
    "a negative size": safetensors({"conv1.weight": tensor([-1], 0, 4)}, b"\0" * 4),
    "an unknown type": safetensors({"conv1.weight": tensor([1], 0, 4, "F7")}, b"\0" * 4),
    "a header that is no JSON": struct.pack("<Q", 4) + b"}}}}",
    "nothing": b"",
    "a pickle": pickle.dumps({"conv1.weight": [1.0]}),
}


@pytest.mark.parametrize("name", LYING)
def test_student_weights_that_lie_are_refused(tmp_path, name):
    torch.manual_seed(0)
    Student(StudentConfig(**STUDENT)).save(tmp_path, provenance={})
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights.write_bytes(LYING[name])
    card = json.loads(config.read_text()) | {"weights_digest": file_digest(weights)}
    config.write_text(json.dumps(card))
    with pytest.raises(PipelineError, match=r"model\.safetensors"):
        Student.load(tmp_path)


@pytest.mark.parametrize("name", LYING)
def test_teacher_weights_that_lie_are_refused(tmp_path, name):
    from pipeline.models.teacher import Teacher

    card = teacher_with(tmp_path, "open_clip_model.safetensors", LYING[name])
    with pytest.raises(PipelineError, match="cannot be loaded"):
        Teacher(card, torch.device("cpu"))


def teacher_with(folder: Path, name: str, weights: bytes) -> Path:
    """A card that names, by their right digest, weights that somebody else wrote."""
    card = worlds.write_teacher(folder)
    (folder / name).write_bytes(weights)
    values = yaml.safe_load(card.read_text())
    values["sha256"] = hashlib.sha256(weights).hexdigest()
    if not name.endswith(".safetensors"):
        values |= {"model": "ViT-B-32", "pretrained": name}
    card.write_text(yaml.safe_dump(values))
    return card


class Executed:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["torch.save", "pickle", "torchscript in name only"])
def test_teacher_weights_with_code_in_them_are_refused_and_not_executed(tmp_path, kind):
    from pipeline.models.teacher import Teacher

    hostile, file = {"state_dict": Executed(tmp_path / "touched")}, io.BytesIO()
    if kind == "torch.save":
        torch.save(hostile, file)
    elif kind == "pickle":
        file.write(pickle.dumps(hostile))
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/constants.pkl", pickle.dumps(hostile))
            archive.writestr("archive/data.pkl", pickle.dumps(hostile))
            archive.writestr("archive/version", "3")
    card = teacher_with(tmp_path, "hostile.pt", file.getvalue())
    with pytest.raises(PipelineError, match="cannot be loaded"):
        Teacher(card, torch.device("cpu"))
    assert not (tmp_path / "touched").exists()


def test_a_resume_checkpoint_with_code_in_it_is_refused_and_not_executed(tmp_path):
    """data/.work is ours, but a folder that somebody gave us may hold theirs."""
    from pipeline.core.records import Preprocessing
    from pipeline.training.distributed import Ranks
    from pipeline.training.trainer import Trainer

    student = Student(StudentConfig(**STUDENT), Preprocessing())
    ranks = Ranks(torch.device("cpu"))
    trainer = Trainer(distill_config(), student, torch.zeros(32).numpy(), ranks)
    file = tmp_path / "checkpoint.pt"
    torch.save({"step": 1, "student": Executed(tmp_path / "touched")}, file)
    with pytest.raises(PipelineError, match=r"checkpoint\.pt"):
        trainer.restore(file)
    assert not (tmp_path / "touched").exists()


# Cards and parameters


@pytest.mark.parametrize("text", ["!!python/object/apply:os.mkdir ['{0}']", "&a [*a, *a]"])
def test_yaml_that_asks_for_code_is_refused_and_not_executed(tmp_path, text):
    from pipeline.models.card import read_card

    card = tmp_path / "card.yaml"
    card.write_text(text.format(tmp_path / "touched"))
    with pytest.raises(PipelineError):
        read_card(card)
    assert not (tmp_path / "touched").exists()


def test_a_bomb_of_yaml_aliases_is_refused_in_a_moment(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (tmp_path / "card.yaml").write_text("\n".join(lines))
    program = (
        "import sys; from pathlib import Path; from pipeline.models.card import read_card\n"
        "from pipeline.core.errors import PipelineError\n"
        "try: read_card(Path(sys.argv[1]))\n"
        "except PipelineError as error: print('refused', len(str(error)) < 100_000)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "card.yaml"],
        capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert out.stdout.split() == ["refused", "True"], out.stderr
