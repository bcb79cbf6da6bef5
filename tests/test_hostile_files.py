"""Checkpoints, configurations and archives of vectors that ask for more than they hold.

What is refused here would otherwise take from seconds to for ever, or all memory: so each is refused
in little of both, measured in this process.
"""

import json
import re
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from support.memory import held
from support.published import checkpoint_of, small_student

from pipeline.core.config import StudentConfig
from pipeline.core.errors import PipelineError
from pipeline.models.published import import_checkpoint
from pipeline.models.student import Student
from stages.import_embeddings import _npz

MEMORY = 300 << 20  # bytes that a refusal may touch beside what is there already


@contextmanager
def cheaply():
    """The block ends in a few seconds and never holds much more memory than at its begin."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before, began = held("VmRSS"), time.process_time()
    yield
    assert time.process_time() - began < 20
    assert held("VmHWM") - before < MEMORY


def refused(file: Path) -> str:
    with cheaply(), pytest.raises(PipelineError) as caught:
        import_checkpoint(file, file.with_name("out"))
    assert not file.with_name("out").exists()
    return str(caught.value)


def deep(levels: int) -> tuple:
    """Two to the power of levels leaves, in as many objects as levels."""
    value = ()
    for _ in range(levels):
        value = (value, value)
    return value


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("conv1.weight", (36, 3, 100_000, 1600)),  # 64 GB
        ("positional_embedding", (10**10, 36)),
        ("ln_post.weight", (10**12,)),
        ("transformer.resblocks.0.ln_1.bias", (10**11,)),
        ("scale", (10**11,)),
    ],
)
def test_a_tensor_that_repeats_one_value_is_not_written_out(tmp_path, name, shape):
    checkpoint = checkpoint_of(small_student(True), None)
    state = dict(checkpoint["model_state_dict"]) | {name: torch.zeros(1).expand(shape)}
    torch.save(checkpoint | {"model_state_dict": state}, tmp_path / "x.pt")
    assert "no whole tensor" in refused(tmp_path / "x.pt")


@pytest.mark.parametrize("key", [1, ("a",), None])
def test_a_state_is_names_and_tensors(tmp_path, key):
    checkpoint = checkpoint_of(small_student(True), None)
    for entry in ({key: torch.zeros(1)}, {"name": "text"}, {"name": torch.zeros(2, 2).to_sparse()}):
        torch.save(checkpoint | {"model_state_dict": entry}, tmp_path / "x.pt")
        assert "expected names to tensors" in refused(tmp_path / "x.pt")


def test_shared_tuples_are_not_written_out(tmp_path, monkeypatch):
    """The stand-in of the enum keeps what it was called with, and its text goes into config.json."""
    from pipeline.models import published

    monkeypatch.setattr(published, "_harmless", lambda name: "Planted" in name)
    torch.save(checkpoint_of(small_student(True), Planted(deep(40))), tmp_path / "x.pt")
    with cheaply():
        import_checkpoint(tmp_path / "x.pt", tmp_path / "out")
    assert "('tuple',)" in (tmp_path / "out/config.json").read_text()


class Planted:
    def __init__(self, value):
        self.value = value

    def __reduce__(self):
        return Planted, (self.value,)


def test_a_checkpoint_that_unpacks_to_more_than_it_is_is_not_unpacked(tmp_path):
    torch.save(checkpoint_of(small_student(True), None), tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as swollen,
    ):
        for entry in whole.infolist():
            swollen.writestr(entry.filename, whole.read(entry) + b"\0" * (4 << 20))
    assert re.search(r"unpacks to \d+ bytes", refused(tmp_path / "x.pt"))


GOOD = {"image_size": 28, "patch_size": 14, "embedding_size": 32, "heads": 4, "layers": 1,
        "neighbourhood_mask": True, "same_norm": True, "pool": "extra-head",
        "temperature": 1.0}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 10**7},
        {"image_size": 100_002},
        {"image_size": 4096, "patch_size": 1},
        {"patch_size": 10**5, "image_size": 10**5},
        {"embedding_size": 10**6, "heads": 10**6},
        {"heads": 4, "embedding_size": 4 * 10**9},
    ],
)
def test_a_student_larger_than_any_is_refused_before_it_is_built(tmp_path, change):
    small_student(True).save(tmp_path, provenance={})
    card = json.loads((tmp_path / "config.json").read_text())
    card["student"] |= change
    (tmp_path / "config.json").write_text(json.dumps(card))
    with cheaply(), pytest.raises(PipelineError, match=r"config\.json"):
        Student.load(tmp_path)


def test_the_largest_students_that_anybody_trains_are_no_attack():
    StudentConfig(**GOOD)
    large = {"image_size": 336, "patch_size": 14, "embedding_size": 1024, "heads": 16, "layers": 48}
    StudentConfig(**GOOD | large)
    StudentConfig(**GOOD | {"image_size": 1024, "patch_size": 16})


def archive(path: Path, **columns) -> Path:
    np.savez_compressed(path, **columns)
    return path


def test_a_column_that_nobody_uses_is_not_read(tmp_path):
    vectors, names = np.random.default_rng(0).random((4, 8)), np.array(list("abcd"))
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as file:
        for name, values in {"embedding": vectors, "key": names}.items():
            with file.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, values)
        with file.open("unused.npy", "w") as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": (100 << 20,)}
            np.lib.format.write_array_header_1_0(member, header)
            for _ in range(400):
                member.write(bytes(1 << 20))
    with cheaply():
        part = _npz(tmp_path / "x.npz")
    assert part.columns == {"key": list("abcd")} and (part.vectors == vectors).all()


@pytest.mark.parametrize(
    "columns",
    [
        {"embedding": np.zeros((100_000, 1024), np.float32), "key": np.array(["a"])},
        {"embedding": np.ones((2, 8)), "key": np.array(["a" * 50_000_000, "b"])},
    ],
    ids=["embedding", "names"],
)
def test_a_swollen_column_is_refused_before_it_is_read(tmp_path, columns):
    path = archive(tmp_path / "x.npz", **columns)
    with cheaply(), pytest.raises(PipelineError, match=r"is said to have \d+ bytes"):
        _npz(path)
