"""A local teacher's open_clip_config.json, read by an allow-list.

open_clip takes every key of that file as an argument of a constructor. Some of them name a tokenizer
on a hub with `trust_remote_code`, or a file to open (`bpe_path`), and sizes are allocated as they are
written. So a key passes only if it is listed here, and a size only within its bounds.
"""

import json
import re
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError

CONFIG = "open_clip_config.json"
LONGEST = 1 << 20  # bytes of the file
SIZES = {  # the most that is built; the largest known towers need about half
    "embed_dim": 8192,
    "layers": 128,
    "width": 8192,
    "head_width": 512,
    "heads": 128,
    "patch_size": 128,
    "image_size": 2048,
    "context_length": 2048,
    "vocab_size": 1 << 20,
    "mlp_ratio": 16,
    "attn_pooler_queries": 4096,
    "attn_pooler_heads": 128,
    "pad_id": 1 << 20,
    "eos_id": 1 << 20,
}
PLAIN = {  # true, false, a number or a word of open_clip's own
    *("quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"),
    *("ls_init_value", "patch_dropout", "attentional_pool", "no_ln_pre", "pos_embed_type"),
    *("final_ln_after_pool", "pool_type", "block_type", "qk_norm", "embed_cls", "no_causal_mask"),
    *("proj_bias", "proj_type", "timm_model_name", "timm_pool", "timm_proj", "timm_proj_bias"),
    *("timm_drop", "timm_drop_path", "timm_model_pretrained"),
}
PREPROCESS = {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}
WORD = re.compile(r"[A-Za-z0-9_.-]{0,80}")  # neither a path nor a name on a hub


def read_teacher_config(folder: Path) -> dict[str, dict[str, Any]]:
    """{"model_cfg": ..., "preprocess_cfg": ...} of a folder that open_clip opens as local-dir.

    Raises PipelineError: no such file, no JSON, a key that is not allowed, a size out of bounds.
    """
    path = folder / CONFIG
    try:
        if path.stat().st_size > LONGEST:
            raise PipelineError(
                f"{path} has more than {LONGEST} bytes: no configuration is so long."
            )
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PipelineError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{path} is no JSON: {error}.") from None
    _only(path, "", config, {"model_cfg", "preprocess_cfg"})
    model, preprocess = config.get("model_cfg"), config.get("preprocess_cfg", {})
    _only(path, "model_cfg", model, {"vision_cfg", "text_cfg"} | SIZES.keys() | PLAIN)
    for section in ("vision_cfg", "text_cfg"):
        _only(path, section, model.get(section), SIZES.keys() | PLAIN)
        _bounded(path, section, model[section])
    _bounded(path, "model_cfg", {k: v for k, v in model.items() if not k.endswith("_cfg")})
    _only(path, "preprocess_cfg", preprocess, PREPROCESS)
    _bounded(path, "preprocess_cfg", {"image_size": preprocess.get("size", 1)})
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def _only(path: Path, section: str, values: Any, allowed: set[str]) -> None:
    if not isinstance(values, dict):
        raise PipelineError(f"{path}: {section or 'it'} holds {type(values).__name__}, no section.")
    if unknown := values.keys() - allowed:
        raise PipelineError(
            f"{path}: {section} {', '.join(sorted(unknown))}: not among the keys that may be set "
            f"({', '.join(sorted(allowed))}). Tokenizers of a hub, code and paths of files are not "
            "taken from a configuration."
        )


def _bounded(path: Path, section: str, values: dict[str, Any]) -> None:
    for key, value in values.items():
        numbers = value if isinstance(value, list) else [value]
        if key in SIZES:
            good = value is None or all(
                type(n) in (int, float) and 0 <= n <= SIZES[key] for n in numbers
            )
            good = good and 0 < len(numbers) <= 4
        else:
            good = isinstance(value, bool | int | float | None) or bool(
                isinstance(value, str) and WORD.fullmatch(value)
            )
        if not good:
            limit = f"a size of at most {SIZES[key]}" if key in SIZES else "a word or a number"
            raise PipelineError(
                f"{path}: {section}.{key} is {str(value)[:80]!r}, expected {limit}."
            )
