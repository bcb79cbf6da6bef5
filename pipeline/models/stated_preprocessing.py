"""What a teacher card says of preprocessing, without the teacher's weights."""

import json
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.models.card import TeacherCard
from pipeline.models.open_clip import open_clip


def stated_preprocessing(card: TeacherCard, path: Path) -> dict:
    """image_size (px), mean, std, interpolation and resize_mode of the card's model, as
    `Teacher.preprocessing` gives them, from open_clip's lists or the local folder's configuration.

    path: the card's. Raises PipelineError for a model that open_clip does not know.
    """
    if card.model.startswith("local-dir:"):
        folder = path.parent / card.model.removeprefix("local-dir:")
        config = json.loads((folder / "open_clip_config.json").read_text())
        model, tag = config["model_cfg"], config.get("preprocess_cfg", {})
    else:
        model = open_clip.get_model_config(card.model)
        tag = open_clip.pretrained.get_pretrained_cfg(card.model, card.pretrained or "")
    if model is None:
        raise PipelineError(f"{path}: open_clip knows no model {card.model!r}.")
    size = model["vision_cfg"].get("image_size", 224)
    defaults = open_clip.transform.PreprocessCfg()
    stated = {"image_size": size if isinstance(size, int) else size[0]}
    for name in ("mean", "std", "interpolation", "resize_mode"):
        value = tag.get(name, getattr(defaults, name))
        stated[name] = value if isinstance(value, str) else list(value)
    return stated
