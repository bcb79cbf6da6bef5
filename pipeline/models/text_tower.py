"""A written text tower as any program runs it: tokenizers and onnxruntime, nothing of the teacher's code."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.models.onnx_files import need, run_onnx

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def read_tokenizer(folder: Path) -> "Tokenizer":
    """The written tokenizer; its file says to what length a text is padded and cut.

    Raises PipelineError where the package tokenizers is missing.
    """
    need("tokenizers")
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def embed_texts(folder: Path | str, texts: list[str]) -> np.ndarray:
    """n texts -> (n, E) float32 of unit length, in the student's space.

    folder: `textual` of an exported folder. Raises PipelineError where a package is missing.
    """
    encoded = read_tokenizer(Path(folder)).encode_batch(texts)
    tokens = np.array([encoding.ids for encoding in encoded], np.int32)  # (n, T)
    return run_onnx(Path(folder) / "model.onnx", tokens)[0]
