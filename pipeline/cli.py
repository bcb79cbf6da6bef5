"""The command line: each command parses, calls one function and prints what came of it.

A command imports what it needs inside, so that --help answers without torch.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli_checks import message_of, named_card, refuse_outdated, warn_outdated
from pipeline.cli_cluster import Part, Ray, RayCpus, RayGpus, named_share, named_tasks
from pipeline.cli_import import imports
from pipeline.cli_store import name_store, stores
from pipeline.core.choices import (
    TEACHERS,
    AnswerFormat,
    ExportFormat,
    FindingsFormat,
    HitsFormat,
    Preset,
    teacher_names,
)
from pipeline.core.errors import PipelineError
from pipeline.core.terminal import fail, guard, output, say

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Distil CLIP offline: embed images **once** with the teacher, then train small students
    from Parquet alone.

    `dvc repro` runs every stage in order, as params.yaml says; the commands below run one.""",
)
app.callback()(name_store)
app.add_typer(imports, name="import", rich_help_panel="Files in and out")
app.add_typer(stores, name="store", rich_help_panel="Files in and out")

STAGES, LOOK, FILES = "Stages, in order", "Questions", "Files in and out"
Params = Annotated[Path, typer.Option("--params", help="Parameter file.")]
Data = Annotated[Path, typer.Option("--data", help="Folder of all results.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ... Changes speed.")]
Workers = Annotated[int, typer.Option(min=1, help="Threads that decode images.")]
Card = Annotated[
    Path | None, typer.Option(help="Teacher card; that of the parameters if not given.")
]
PARAMS, DATA = Path("params.yaml"), Path("data")


def main() -> None:
    """Run the command line; a user's mistake ends in one message and status 1."""
    guard()
    try:
        app()
    except Exception as error:
        if (message := message_of(error)) is None:
            raise
        fail(message)
        raise SystemExit(1) from None


@app.command(rich_help_panel=FILES)
def init(
    preset: Annotated[Preset, typer.Argument(help="What to start from.")],
    teacher: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Card in manifests/teachers: {teacher_names()}."),
    ] = None,
    params: Params = PARAMS,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write params.yaml, every value with its meaning.

    `demo` is the world that is drawn here; `clip-vit-b32` is OpenAI's CLIP, your manifest and the
    published student.
    """
    from pipeline.core.presets import next_step, write_preset

    if teacher and preset == "demo":
        raise PipelineError("the demo trains its own teacher. Use `pipeline init clip-vit-b32`.")
    settings, terms = _of_teacher(teacher) if teacher else ({}, "")
    write_preset(preset, params, force, settings)
    say(f"{params} written.{terms} Next: {next_step(params)}")


@app.command(rich_help_panel=STAGES)
def download(
    retry: Annotated[
        bool,
        typer.Option(
            "--retry",
            help="Fetch again what may succeed now, and nothing else: raises download.round.",
        ),
    ] = False,
    part: Part = None,
    ray: Ray = False,
    ray_cpus: RayCpus = 1.0,
    ray_gpus: RayGpus = 0.0,
    params: Params = PARAMS,
    data: Data = DATA,
    processes: Annotated[int, typer.Option(min=1, help="Download processes.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Connections per process.")] = 32,
) -> None:
    """Fetch the manifest's images into data/images; every row ends with a status."""
    from pipeline.core.config import load_section
    from pipeline.fetch.retry import begin_round
    from stages.download import download as run

    if retry and part is not None:
        raise PipelineError(
            "--retry begins a round for all parts: raise download.round in the parameters instead, "
            "and start the parts with it."
        )
    if retry:
        say(begin_round(params, data))
    config, share = load_section(params, "download"), named_share(part)
    tasks = named_tasks(ray, part, ray_cpus, ray_gpus)
    statuses = run(config, data, processes=processes, threads=threads, share=share, tasks=tasks)
    if share:
        say(_PART_DONE.format("download", *share))
    else:
        _report("download", statuses, data / "images")


@app.command(rich_help_panel=STAGES)
def teacher_embed(
    part: Part = None,
    ray: Ray = False,
    ray_cpus: RayCpus = 1.0,
    ray_gpus: RayGpus = 0.0,
    params: Params = PARAMS,
    data: Data = DATA,
    device: Device = "auto",
    workers: Workers = 2,
    accept: Annotated[
        bool,
        typer.Option(
            "--accept-other-vectors", help="Go on where golden vectors say: another teacher."
        ),
    ] = False,
) -> None:
    """Embed every image and text once with the frozen teacher into data/teacher."""
    from pipeline.core.config import load_section
    from stages.teacher_embed import teacher_embed as run

    config, share = load_section(params, "teacher_embed"), named_share(part)
    refuse_outdated(params, data, "teacher_embed")
    tasks = named_tasks(ray, part, ray_cpus, ray_gpus)
    summary = run(
        config,
        data,
        device=device,
        workers=workers,
        accept_other_vectors=accept,
        share=share,
        tasks=tasks,
    )
    if share:
        say(_PART_DONE.format("teacher-embed", *share))
    elif summary:
        counts = summary.model_dump(include={"images", "texts", "views", "dtype"})
        _report("teacher_embed", counts, data / "teacher")


@app.command(rich_help_panel=STAGES)
def select(params: Params = PARAMS, data: Data = DATA) -> None:
    """Split by content into data/selection; leave out, with reasons, duplicates and what
    select.where rejects."""
    from pipeline.core.config import load_section
    from stages.select import select as run

    config, evaluated = load_section(params, "select"), load_section(params, "evaluate").split
    refuse_outdated(params, data, "select")
    counts = run(config, data, evaluated=evaluated)
    _report("select", counts, data / "selection")


@app.command(rich_help_panel=STAGES)
def distill(
    params: Params = PARAMS,
    data: Data = DATA,
    device: Device = "auto",
    workers: Workers = 2,
    resume: Annotated[
        bool, typer.Option("--resume", help="Only go on with an interrupted run; start no other.")
    ] = False,
) -> None:
    """Train the student from data/ alone into data/student; no teacher is loaded.

    A run that was interrupted goes on from its checkpoint; with other parameters or other data a
    new one starts, which --resume refuses, naming the difference.

    Several GPUs: `torchrun --nproc-per-node 8 -m pipeline.cli distill`.
    """
    from pipeline.core.config import load_section
    from stages.distill import distill as run

    config = load_section(params, "distill")
    refuse_outdated(params, data, "distill")
    metrics = run(config, data, device=device, workers=workers, resume=resume)
    shown = {k: round(metrics[k], 4) for k in ("steps", "loss", "val_cosine", "val_floor")}
    _report("distill", shown, data / "student")


@app.command(rich_help_panel=STAGES)
def evaluate(
    params: Params = PARAMS, data: Data = DATA, device: Device = "auto", workers: Workers = 2
) -> None:
    """Measure the student on the held-out split into data/evaluation, with floors and ceilings."""
    from pipeline.core.config import load_section
    from pipeline.explore.metrics_table import metrics_text
    from stages.evaluate import evaluate as run

    config = load_section(params, "evaluate")
    refuse_outdated(params, data, "evaluate")
    measured = run(config, data, device=device, workers=workers)
    say(metrics_text(measured.to_json()))
    say(f"evaluate: written to {data / 'evaluation'}")


@app.command(rich_help_panel=LOOK)
def query(
    sql: Annotated[str, typer.Argument(help="Exactly one SELECT.")],
    format: Annotated[AnswerFormat, typer.Option(help="Of the answer.")] = "table",
    timeout: Annotated[float, typer.Option(min=0, help="Seconds the query may take.")] = 600,
    params: Params = PARAMS,
    data: Data = DATA,
) -> None:
    """Ask DuckDB about the shards: tables images, teacher, texts, selection, runs.

    Example: pipeline query "SELECT status, count(*) FROM images GROUP BY status"
    """
    from pipeline.explore.query import print_answer

    warn_outdated(params, data)
    print_answer(data, sql, format, timeout)


@app.command(rich_help_panel=LOOK)
def search(
    text: Annotated[str | None, typer.Argument(help="What the images should show.")] = None,
    image: Annotated[Path | None, typer.Option(help="Search with an image file instead.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Images by each side.")] = 8,
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("search.png"),
    format: Annotated[HitsFormat, typer.Option(help="Of the list.")] = "table",
    card: Card = None,
    params: Params = PARAMS,
    data: Data = DATA,
) -> None:
    """Find the best images for a text or an image, by student and by teacher."""
    from pipeline.explore.query_vectors import Queries
    from pipeline.explore.search import Collection, hits_text, search_figure

    if (text is None) == (image is None):
        raise PipelineError("search with a text or with --image FILE: one of the two.")
    text = text or ""
    warn_outdated(params, data, card)
    collection, queries = Collection(data), Queries(data, named_card(card, params))
    hits = collection.search(queries.text(text) if image is None else queries.image(image), k)
    output().write(hits_text(hits, format) + "\n")
    search_figure(hits, out)
    for line in [*hits.notes, f"{out} written"]:
        say(line, err=True)


@app.command(rich_help_panel=LOOK)
def look(
    image: Annotated[
        str, typer.Argument(help="Image file, or an image_id or url as `search` prints it.")
    ],
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts, a map each.")] = None,
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("look.png"),
    segment: Annotated[
        bool, typer.Option("--segment", help="Paint the text that answers best, at each place.")
    ] = False,
    size: Annotated[
        int, typer.Option(min=1, help="With --segment: px of the image; the student's if less.")
    ] = 1,
    threshold: Annotated[
        float | None, typer.Option(help="With --segment: cosine up to which nothing is painted.")
    ] = None,
    card: Card = None,
    params: Params = PARAMS,
    data: Data = DATA,
) -> None:
    """Draw which patches of an image count, and where each text is in it."""
    from pipeline.explore.query_vectors import Queries

    warn_outdated(params, data, card)
    queries = Queries(data, named_card(card, params))
    if segment:
        from pipeline.explore.segment import segment_figure, segment_image

        view = segment_image(queries, image, prompts or [], size, threshold)
        segment_figure(view, out)
    else:
        from pipeline.explore.look import look as run
        from pipeline.explore.look import look_figure

        view = run(queries, image, prompts or [])
        look_figure(view, out)
    for line in [*view.notes, f"{out} written"]:
        say(line, err=True)


@app.command(rich_help_panel=LOOK)
def report(
    out: Annotated[Path, typer.Argument(help="HTML file to write.")] = Path("report.html"),
    card: Card = None,
    params: Params = PARAMS,
    data: Data = DATA,
) -> None:
    """Write the report again, with the teacher's attention and the speed of every run."""
    from pipeline.core.config import load_section
    from pipeline.explore.query_vectors import Queries
    from pipeline.explore.report import report as run

    warn_outdated(params, data, card)
    queries, notes, by_teacher = Queries(data, named_card(card, params)), [], None
    if queries.teacher is None:
        notes.append(f"The teacher's attention: {queries.no_teacher}")
    else:
        from pipeline.models.teacher_patches import row_viewer

        try:
            by_teacher = row_viewer(queries.teacher)
        except PipelineError as error:
            notes.append(f"The teacher's attention: {error}")
    run(data, out, load_section(params, "evaluate"), by_teacher, notes)
    say(f"{out} written")


@app.command(rich_help_panel=LOOK)
def verify(
    recompute: Annotated[
        float, typer.Option(min=0, max=1, help="Share of vectors that the teacher computes again.")
    ] = 0.0,
    format: Annotated[FindingsFormat, typer.Option(help="Of what is broken.")] = "table",
    card: Card = None,
    params: Params = PARAMS,
    data: Data = DATA,
    device: Device = "auto",
    workers: Workers = 2,
) -> None:
    """Hold what lies in data/ against every promise; status 1 and what to run where one is broken."""
    from pipeline.core.config import load_section
    from pipeline.fetch.forget import read_forgotten
    from pipeline.verify.forgotten import elsewhere
    from pipeline.verify.verify import findings_text
    from pipeline.verify.verify import verify as run

    named = named_card(card, params) if recompute else None
    forgotten, asked = None, params if params.exists() else None
    if asked:
        forgotten = read_forgotten(Path(load_section(asked, "download").forget))
    findings = run(
        data,
        recompute=recompute,
        card=named,
        device=device,
        workers=workers,
        params=asked,
        forgotten=forgotten,
    )
    say(findings_text(findings, format))
    if forgotten and (forgotten.lines or forgotten.sha256):
        for line in elsewhere(params.parent):
            say(f"not searched: {line}", err=True)
    if findings:
        raise typer.Exit(1)


@app.command(rich_help_panel=LOOK)
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    public: Annotated[bool, typer.Option("--public", help="Let other machines in.")] = False,
    card: Card = None,
    params: Params = PARAMS,
    data: Data = DATA,
) -> None:
    """Search in the browser: results by student and teacher, and a map for each image."""
    from pipeline.explore.serve import serve as run

    warn_outdated(params, data, card)
    run(data, named_card(card, params), host, port, public=public, announce=say)


@app.command(rich_help_panel=FILES)
def export(
    out: Annotated[Path, typer.Argument(help="Folder to write; a file with --format onnx.")],
    format: Annotated[
        ExportFormat,
        typer.Option(help="folder: both towers; onnx: the student alone, as one file."),
    ] = "folder",
    int8: Annotated[bool, typer.Option("--int8", help="A quarter of the bytes.")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Half the bytes.")] = False,
    card: Card = None,
    params: Params = PARAMS,
    data: Data = DATA,
) -> None:
    """Write image tower, text tower, tokenizer, vectors and a model card, for use without this
    project; every file is checked against PyTorch before it is called written."""
    from pipeline.explore.model_folder import export_folder
    from pipeline.models.export import export_student

    if fp16 and (int8 or format == "onnx"):
        raise PipelineError("--int8 or --fp16: one of the two; --fp16 for --format folder alone.")
    warn_outdated(params, data, card)
    if format == "onnx":
        say(export_student(data / "student", out, int8=int8))
    else:
        weights = "int8" if int8 else "float16" if fp16 else "float32"
        say(export_folder(data, out, named_card(card, params), weights))


_PART_DONE = "{0}: part {1}/{2} is done. After all parts, run `pipeline {0}`."


def _of_teacher(name: str) -> tuple[dict[str, Any], str]:
    """What params.yaml must say for a teacher, and a sentence on its licence."""
    from pipeline.models.card import read_card
    from pipeline.models.stated_preprocessing import student_settings

    path = TEACHERS / f"{name}.yaml"
    card = read_card(path)
    license = card.license or "not recorded: look it up"
    return student_settings(card, path), f" Licence of {name}'s weights: {license}."


def _report(stage: str, counts: dict, out: Path) -> None:
    counted = [
        f"{value} {name}" if isinstance(value, int) else f"{name} {value}"
        for name, value in counts.items()
    ]
    say(f"{stage}: {', '.join(counted)} in {out}")


if __name__ == "__main__":
    main()
