"""Whether data/ is what params.yaml asks for: each folder's recipe beside the parameters of its stage.

Reads stamps, the parameters and the text files that they name; of the shards labels and texts of
boxes alone. What a folder was not told to remember, and a file that is not on this machine, is not
compared: it may be a machine that only trains.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core.config import (
    DistillConfig,
    DownloadConfig,
    EvaluateConfig,
    SelectConfig,
    TeacherEmbedConfig,
    load_section,
)
from pipeline.core.errors import PipelineError
from pipeline.core.layout import BY_FOLDER, FOLDERS, command
from pipeline.core.provenance import digest, outdated_inputs, stamp_of
from pipeline.core.records import Stamp
from pipeline.data.texts import all_prompts, read_templates
from pipeline.fetch.forget import read_forgotten
from pipeline.fetch.listing import listing
from pipeline.models.card import config_digest, read_card

IMPORTED = "import_embeddings"
MOST = 3  # changes of a folder that a message names
LONG = 60  # characters of a value that a message repeats


class Outdated(NamedTuple):
    """A folder of data/ that is not what the parameters ask for."""

    folder: str
    stage: str  # that made it
    changes: tuple[str, ...]  # what is different now, a clause each

    @property
    def found(self) -> str:
        more = f"; and {len(self.changes) - MOST} more" if len(self.changes) > MOST else ""
        return f"data/{self.folder} is out of date: {'; '.join(self.changes[:MOST])}{more}"

    @property
    def mend(self) -> str:
        return f"`pipeline {command(self.stage)}`"


def changed_parameters(
    params: Path, data: Path, folders: Iterable[str] = FOLDERS, card: Path | None = None
) -> list[Outdated]:
    """Finished folders that were made with other parameters, or with other contents of the files
    that these name, in the order in which data flows.

    card: a teacher card that is used in place of the parameters' one. Folders without a stamp that
    reads are passed over. Raises PipelineError for a wrong parameter file.
    """
    older = []
    for folder, stamp in _stamps(data, folders).items():
        config = load_section(params, BY_FOLDER[folder].name)
        if changes := tuple(_CHANGES[folder](config, stamp, data, card)):
            older.append(Outdated(folder, stamp.stage, changes))
    return older


def outdated(
    params: Path, data: Path, folders: Iterable[str] = FOLDERS, card: Path | None = None
) -> list[Outdated]:
    """The same, and folders that were not made from what lies beside them now."""
    changed = {one.folder: one for one in changed_parameters(params, data, folders, card)}
    older, stamps = [], _stamps(data, folders)
    for folder, stamp in stamps.items():
        others = outdated_inputs(stamp, stamps)
        changes = changed[folder].changes if folder in changed else ()
        if others:
            changes = (*changes, f"it was made from other {' and '.join(others)}")
        if changes:
            older.append(Outdated(folder, stamp.stage, changes))
    return older


def _stamps(data: Path, folders: Iterable[str]) -> dict[str, Stamp]:
    """Of the finished folders; of what is missing or damaged other messages tell."""
    stamps = {}
    for folder in folders:
        with suppress(PipelineError):
            stamps[folder] = stamp_of(data, folder)
    return stamps


def message(older: list[Outdated]) -> str:
    """One line: what is out of date, and which commands mend it."""
    said = ". ".join(one.found for one in older)
    commands = " && ".join(dict.fromkeys(f"pipeline {command(one.stage)}" for one in older))
    return f"{said}. Run `dvc repro`, or `{commands}`."


def _images(config: DownloadConfig, stamp: Stamp, data: Path, card: Path | None) -> Iterator[str]:
    yield from _differences("download", stamp.recipe.parameters, config.model_dump())
    if not Path(config.forget).is_file():
        return
    forgotten = read_forgotten(Path(config.forget))
    if stamp.recipe.inputs.get("forgotten") != digest(sorted(forgotten.sha256)):
        yield f"{config.forget} names other images"
    if listed := stamp.summary.get("listing"):
        with suppress(PipelineError):  # the manifest is not here
            now = listing(config, forgotten)
            contents = {"manifest": config.manifest, "forget": config.forget}
            for name, file in contents.items():
                if listed[name] != now.pop(name):
                    yield f"{file} (download.{name}) holds something else"
            yield from _differences("download", listed, now)


def _teacher(
    config: TeacherEmbedConfig, stamp: Stamp, data: Path, card: Path | None
) -> Iterator[str]:
    used, named = stamp.recipe.parameters, card or Path(config.card)
    if named.is_file():
        yield from _other_teacher(used["teacher"], named)
    if stamp.stage == IMPORTED:
        return
    now = config.model_dump()
    yield from _differences("teacher_embed", used, now)
    yield from _differences("teacher_embed", used["crops"], now)
    with suppress(PipelineError):  # a list is not here
        prompts = all_prompts(Path(config.prompts), Path(config.templates), data / "images")
        if digest(prompts) != stamp.recipe.inputs["prompts"]:
            yield f"{config.prompts}, {config.templates} or the labels hold other texts"


def _other_teacher(used: dict[str, Any], file: Path) -> Iterator[str]:
    card = read_card(file)
    now, was = card.named().model_dump(), used["card"]
    config = None
    with suppress(PipelineError):  # the weights are not here
        config = config_digest(card, file)
    if now != was:
        differ = sorted(name for name in now if now[name] != was.get(name))
        yield (
            f"its vectors are those of {was['name']} ({was['model']}), {file} is another teacher's: "
            f"{now['name']} ({now['model']}; other {', '.join(differ)})"
        )
    elif config and used.get("config") and config != used["config"]:
        yield f"the configuration that {file} names is another one"


def _selection(config: SelectConfig, stamp: Stamp, data: Path, card: Path | None) -> Iterator[str]:
    yield from _differences("select", stamp.recipe.parameters, config.model_dump())


def _student(config: DistillConfig, stamp: Stamp, data: Path, card: Path | None) -> Iterator[str]:
    yield from _differences("distill", stamp.recipe.parameters, config.model_dump())


def _evaluation(
    config: EvaluateConfig, stamp: Stamp, data: Path, card: Path | None
) -> Iterator[str]:
    used, now = stamp.recipe.parameters, config.model_dump()
    file = Path(now.pop("templates"))
    yield from _differences("evaluate", used, now)
    if file.is_file() and used.get("templates") != read_templates(file):
        yield f"{file} (evaluate.templates) holds other lines"
    classes = Path(config.segmentation.classes)
    if classes.is_file() and used.get("classes") not in (None, classes.read_text()):
        yield f"{classes} (evaluate.segmentation.classes) holds other lines"


_CHANGES: dict[str, Callable[[Any, Stamp, Path, Path | None], Iterator[str]]] = {
    "images": _images,
    "teacher": _teacher,
    "selection": _selection,
    "student": _student,
    "evaluation": _evaluation,
}


def _differences(name: str, used: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """A clause for each value that both know and that differs."""
    for key in sorted(used.keys() & now.keys()):
        old, new = used[key], now[key]
        if isinstance(old, dict) and isinstance(new, dict) and old.keys() & new.keys():
            yield from _differences(f"{name}.{key}", old, new)
        elif old != new:
            yield f"{name}.{key} was {_short(old)}, is {_short(new)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONG else text[: LONG - 1] + "…"
