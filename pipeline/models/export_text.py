"""A teacher's text tower as ONNX with its tokenizer: what a search by text needs beside a student.

Input `text` (B, T) int32, any B; output `text_embedding` (B, E), of unit length. Cost: some
twenty seconds for CLIP's.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.models.export import check_cosine, check_deviation
from pipeline.models.onnx_files import need, quantise, store_as_float16, write_onnx
from pipeline.models.teacher import Teacher
from pipeline.models.text_tower import embed_texts, read_tokenizer
from pipeline.models.tokenizer import check_tokenizer, write_tokenizer

EXAMPLE = "a photo of a cat"


class _TextTower(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model

    def forward(self, text: Tensor) -> Tensor:
        return nn.functional.normalize(self.model.encode_text(text.long()), dim=-1)


def export_text_tower(teacher: Teacher, folder: Path, texts: list[str]) -> tuple[float, dict]:
    """Write folder/model.onnx, tokenizer.json and tokenizer_config.json.

    texts: stored ones, on which tokenizer and tower are compared with open_clip. Returns the
    largest difference from PyTorch and open_clip's `text_cfg`. Raises PipelineError where a package
    is missing or a file answers otherwise.
    """
    need("tokenizers", "onnx", "onnxruntime", "onnxscript")
    length = teacher.model.context_length
    kwargs = write_tokenizer(teacher.tokenize, length, folder)
    texts = list(dict.fromkeys([EXAMPLE, *texts]))
    other = check_tokenizer(teacher.tokenize, folder, texts)
    module = _TextTower(teacher.model)
    example = teacher.tokenize([EXAMPLE, ""]).to(torch.int32)  # (2, T)
    write_onnx(module, example, folder / "model.onnx", "text", ["text_embedding"])
    same = [text for text in texts if text not in set(other)]
    deviation = 0.0
    for batch in (same[:1], same[1:8] or same):
        difference = embed_texts(folder, batch) - teacher.embed_texts(batch)
        deviation = max(deviation, float(np.abs(difference).max()))
    check_deviation(deviation, "the text tower")
    vocabulary = read_tokenizer(folder).get_vocab_size()
    described = {"context_length": length, "vocab_size": vocabulary, "tokenizer_kwargs": kwargs}
    return deviation, described


def shrink_text_tower(folder: Path, weights: str, texts: list[str]) -> str:
    """Replace model.onnx by its copy in `int8` or `float16`; returns what that costs.

    Raises PipelineError where weights stored as float16 cost too much; what int8 costs a search is
    for the caller to judge, who has images.
    """
    file, small = folder / "model.onnx", folder / "model.small"
    exact = embed_texts(folder, texts)
    (quantise if weights == "int8" else store_as_float16)(file, small)
    small.replace(file)
    cosine = float((exact * embed_texts(folder, texts)).sum(axis=1).min())
    if weights != "int8":
        check_cosine(cosine, "the text tower stored as float16")
    return f"least cosine to float32 {cosine:.5f}"
