"""Parameter files to start from: complete, every value with its meaning."""

from importlib.resources import files
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import write_file

PRESETS = ("demo", "clip-vit-b32")


def write_preset(preset: str, path: Path, force: bool) -> None:
    """Write a preset to path. Raises PipelineError for an unknown one, or a file in the way."""
    if preset not in PRESETS:
        raise PipelineError(f"no preset {preset!r}; there are {', '.join(PRESETS)}.")
    if path.exists() and not force:
        raise PipelineError(f"{path} exists. Add --force to replace it, or name another --params.")
    text = (files(__package__) / f"{preset}.yaml").read_text()
    write_file(path, lambda partial: partial.write_text(text))
