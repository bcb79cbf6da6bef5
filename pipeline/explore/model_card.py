"""README.md of an exported folder: what was distilled from what, how good it is, under what terms.

The front matter is what the Hugging Face Hub reads.
"""

from pathlib import Path

from pipeline.core.provenance import stamp_of, teacher_summary
from pipeline.explore.metrics_table import Headline, headlines
from pipeline.models.student import read_card


def model_card(
    data: Path,
    folder: Path,
    images: int,
    licenses: dict[str, int],
    teacher_license: str | None,
    weights: str,
    no_text: str,
) -> str:
    """Markdown. folder: the export as it lies, but for this file; images: in its index.

    licenses: licence -> training images; teacher_license: of its weights; no_text: why there is no
    text tower, or "".
    """
    card, teacher = read_card(data / "student"), teacher_summary(data)
    named, student = teacher.teacher.card, card.student
    metrics = stamp_of(data, "evaluation").summary
    trained = sum(licenses.values())
    size = (folder / "student/model.safetensors").stat().st_size / 4e6
    lines = [
        "---",
        "library_name: extrahead",
        "pipeline_tag: feature-extraction",
        "tags: [clip, distillation, onnx, image-search]",
        "---",
        f"# A student of {named.name}",
        "",
        f"A vision transformer of {size:.1f} million parameters ({student.image_size} px, patches of "
        f"{student.patch_size} px) that embeds images where {named.model} "
        f"({named.pretrained or 'a local checkpoint'}) embeds them: vectors of "
        f"{student.embedding_size} values, comparable with that teacher's texts by cosine, patch by "
        f"patch as well. It was trained on {trained} images from the teacher's stored vectors alone.",
        "",
        f"## Measured on {metrics['images']} held-out images",
        "",
        *_metrics(headlines(metrics)),
        "",
        "Floor: what a model that learned nothing gets. Ceiling: what the teacher gets.",
        "",
        "## Terms",
        "",
        f"- Code: MIT. Student: {card.license or 'not recorded'}.",
        f"- Teacher ({named.name}): {teacher_license or 'licence not recorded'}.",
        *(f"- Training images: {count} under {name}." for name, count in licenses.items()),
        "",
        "## Files",
        "",
        f"- `visual/model.onnx` ({weights}): input `image` float32 (B, 3, {student.image_size}, "
        f"{student.image_size}), outputs `image_embedding` (B, {student.embedding_size}) of unit "
        "length, `patch_weights`, `patch_embeddings`; `visual/preprocess_cfg.json`: how the pixels "
        "are made.",
        *_text_lines(student.embedding_size, weights, no_text),
        "- `student/`: for `Student.load` of extrahead.",
        f"- `index/`: {images} images embedded, row i of `vectors.npy` is line i of `images.jsonl`; "
        "`texts.npy` and `texts.json`: prompts by the teacher's text tower.",
        "",
    ]
    return "\n".join(lines)


def _metrics(rows: list[Headline]) -> list[str]:
    lines = ["| metric | student | floor | ceiling |", "| --- | --- | --- | --- |"]
    return lines + [f"| {r.words} | {r.value} | {r.floor} | {r.ceiling} |" for r in rows]


def _text_lines(size: int, weights: str, no_text: str) -> list[str]:
    if no_text:
        return [f"- There is no text tower: {no_text} Texts need the teacher's."]
    return [
        f"- `textual/model.onnx` ({weights}): input `text` int32 (B, T), output `text_embedding` "
        f"(B, {size}) of unit length; `textual/tokenizer.json` for the package `tokenizers`."
    ]
