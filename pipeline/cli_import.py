"""The commands of `pipeline import`: each brings in what somebody else made."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.core.errors import PipelineError
from pipeline.core.terminal import say

imports = typer.Typer(no_args_is_help=True, help="Bring in what others made.")


@imports.command("folder")
def import_folder(
    folder: Annotated[Path, typer.Argument(help="Folder of images; subfolders become labels.")],
    out: Annotated[Path, typer.Option(help="Manifest to write (.csv or .parquet).")] = Path(
        "manifests/images.csv"
    ),
    labels: Annotated[
        Path | None, typer.Option(help="CSV with the columns file and label, caption or license.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing manifest.")] = False,
    params: Annotated[Path, typer.Option("--params", help="Parameter file.")] = Path("params.yaml"),
) -> None:
    """Write a manifest of local images, and set params.yaml to it, their number and their labels."""
    from pipeline.core.presets.settings import set_values, values_for
    from pipeline.fetch.folder import write_folder_manifest

    if not params.is_file():
        raise PipelineError(f"no {params}. Run `pipeline init clip-vit-b32` first.")
    if "manifests/demo/" in params.read_text(encoding="utf-8"):
        raise PipelineError(
            f"{params} is the demo's, whose teacher knows drawn shapes alone. Run "
            "`pipeline init clip-vit-b32 --force` first."
        )
    rows = write_folder_manifest(folder, out, labels, force=force)
    values: dict[str, Any] = {"download.manifest": str(out), "download.root": str(folder.resolve())}
    values |= values_for(len(rows), [row["label"] for row in rows if row.get("label")])
    set_values(params, values)
    say(f"{out}: {len(rows)} images. {params} now says:")
    for name, value in values.items():
        say(f"  {name}: {value}")
    say("Next: `dvc repro`, or stage by stage: `pipeline download`.")


@imports.command("voc")
def import_voc(
    folder: Annotated[Path, typer.Argument(help="VOCdevkit/VOC2012, as it is published.")],
    out: Annotated[Path, typer.Option(help="Manifest to write (.csv or .parquet).")],
    split: Annotated[str, typer.Option(help="train, val or trainval.")] = "trainval",
) -> None:
    """Write a manifest of Pascal VOC's images with their segmentation masks."""
    from pipeline.fetch.segmentation_folders import write_voc_manifest

    count = write_voc_manifest(folder, out, split)
    settings = (
        "classes: manifests/prompts/voc-classes.txt, background: threshold, zero_is: background"
    )
    _masks_written(count, out, folder, settings)


@imports.command("ade20k")
def import_ade20k(
    folder: Annotated[Path, typer.Argument(help="ADEChallengeData2016, as it is published.")],
    out: Annotated[Path, typer.Option(help="Manifest to write (.csv or .parquet).")],
    classes: Annotated[Path, typer.Option(help="Class file to write.")],
) -> None:
    """Write a manifest of ADE20K's images with their masks, and its class file."""
    from pipeline.fetch.segmentation_folders import write_ade20k_manifest

    count = write_ade20k_manifest(folder, out, classes)
    _masks_written(count, out, folder, f"classes: {classes}, background: none, zero_is: ignore")


def _masks_written(count: int, out: Path, folder: Path, settings: str) -> None:
    say(
        f"{out}: {count} images with masks. In params.yaml set download.manifest: {out}, "
        f"download.root: {folder}, and in evaluate.segmentation {settings}. The prompts of the class "
        "file belong into the list that teacher_embed.prompts names, a prompt a line."
    )


@imports.command("teacher")
def import_teacher(
    model: Annotated[str, typer.Argument(help="open_clip model name, or local-dir:FOLDER.")],
    out: Annotated[Path, typer.Option(help="Card to write, manifests/teachers/NAME.yaml.")],
    pretrained: Annotated[
        str | None, typer.Option(help="open_clip tag, or a checkpoint file.")
    ] = None,
) -> None:
    """Load a teacher once and write its card: digest, activation and golden vectors."""
    from pipeline.models.card_writer import write_card

    card = write_card(model, pretrained, out)
    say(f"{out} written ({card.activation}). Set teacher_embed.card: {out}")


@imports.command("checkpoint")
def import_checkpoint(
    file: Annotated[Path, typer.Argument(help="A published .pt checkpoint of a student.")],
    out: Annotated[Path, typer.Option(help="Student folder to write.")],
) -> None:
    """Turn a published checkpoint into a student folder; nothing of the pickle is executed."""
    from pipeline.models.published import import_checkpoint as run

    student = run(file, out)
    say(f"{out}: {student.config}")


@imports.command("embeddings")
def import_embeddings(
    source: Annotated[
        Path, typer.Argument(help="An .npz file, or a folder as clip-retrieval writes it.")
    ],
    texts: Annotated[
        list[Path] | None, typer.Option(help="An .npz of captions or prompts; several times.")
    ] = None,
    card: Annotated[Path, typer.Option(help="Card of the teacher that made them.")] = Path(
        "manifests/teachers/clip-vit-b32.yaml"
    ),
    data: Annotated[Path, typer.Option("--data", help="Folder of all results.")] = Path("data"),
) -> None:
    """Use embeddings that others computed, in place of teacher-embed, for data/images.

    They are joined by url, file name or key. Then `dvc freeze teacher_embed` and `dvc repro`, or
    `pipeline select`, `distill`, `evaluate`.
    """
    from pipeline.models.card import read_card
    from pipeline.models.stated_preprocessing import stated_preprocessing
    from stages.import_embeddings import import_embeddings as run

    teacher = read_card(card)
    preprocessing = stated_preprocessing(teacher, card)
    summary = run(
        data, source, teacher=teacher.named(), texts=texts or [], preprocessing=preprocessing
    )
    counts = {"images": summary.images, "texts": summary.texts} | summary.further_counts
    counted = ("images", "images without embedding", "embeddings without image", "texts")
    say(", ".join(f"{counts[name]} {name}" for name in counted) + f" in {data / 'teacher'}")
