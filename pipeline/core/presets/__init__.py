"""Parameter files to start from: complete, every value with its meaning."""

import re
from importlib.resources import files
from pathlib import Path

from pipeline.core.choices import Preset
from pipeline.core.config import load_section
from pipeline.core.errors import PipelineError
from pipeline.core.presets.settings import Value, with_values
from pipeline.core.provenance import write_file


def write_preset(
    preset: Preset, path: Path, force: bool, settings: dict[str, Value] | None = None
) -> None:
    """Write a preset to path; its dtypes are those that the hardware here is fast at.

    settings: `section.key` -> what it says in place of the preset's value.

    The demo's are float32 on any machine, so that its metrics can be compared. Raises
    PipelineError where a file is in the way.
    """
    if path.exists() and not force:
        raise PipelineError(f"{path} exists. Add --force to replace it, or name another --params.")
    text = (files("pipeline.core.presets") / f"{preset}.yaml").read_text()
    if preset != "demo":
        text = re.sub(r"(?m)^(  (?:dtype|precision): )\w+", rf"\g<1>{_fast_dtype()}", text)
    write_file(path, lambda partial: partial.write_text(with_values(text, settings or {}, path)))


def next_step(path: Path) -> str:
    """What to run after a preset was written to path."""
    manifest = Path(load_section(path, "download").manifest)
    if manifest.is_file() or manifest.is_relative_to("manifests/demo"):
        return "`dvc repro`."
    return f"`pipeline import folder PHOTOS`, or write {manifest} yourself; then `dvc repro`."


def _fast_dtype() -> str:
    from pipeline.core.devices import fast_dtype, pick_device  # torch takes seconds to import

    return str(fast_dtype(pick_device("auto"))).removeprefix("torch.")
