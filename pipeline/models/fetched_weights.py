"""The weights of a tag of open_clip's: on this disk, or fetched from their hub, once."""

import logging
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, try_to_load_from_cache

from pipeline.core.errors import PipelineError
from pipeline.core.terminal import say
from pipeline.models.open_clip import open_clip

NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # in a model of the Hub
PATIENCE = 5.0  # s, for the hub's host to answer at all


def fetched_weights(model: str, tag: str, card: Path) -> Path:
    """The checkpoint, fetched where it is not here yet.

    Raises PipelineError at once where nothing answers, with the file and how to bring it by hand.
    """
    known = open_clip.get_pretrained_cfg(model, tag)
    if not known:
        raise PipelineError(
            f"{card}: {model} with {tag} cannot be loaded: open_clip knows no such weights. "
            "`open_clip.list_pretrained()` lists them."
        )
    name = known.get("hf_hub", "").strip("/")
    if name and any(isinstance(try_to_load_from_cache(name, file), str) for file in NAMES):
        return Path(open_clip.download_pretrained(known))
    source = f"{constants.ENDPOINT}/{name}" if name else known["url"]
    by_hand = (
        f"On a machine with a network fetch {NAMES[0]} of {source}; here run `pipeline import "
        f"teacher {model} --pretrained FILE --out manifests/teachers/NAME.yaml`."
    )
    missing = f"{card}: {model} with {tag} cannot be loaded: its weights are not on this machine"
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE") == "1":
        raise PipelineError(f"{missing}. {by_hand}")
    say(f"fetching the weights {tag} of {model} from {source}, once", err=True)
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)  # each of five attempts would log a paragraph
    try:
        if not getproxies():
            host = urlsplit(source)
            port = host.port or (80 if host.scheme == "http" else 443)
            socket.create_connection((host.hostname, port), PATIENCE).close()
        return Path(open_clip.download_pretrained(known))
    except OSError as error:
        raise PipelineError(
            f"{missing} and cannot be fetched from {source} ({error}). {by_hand}"
        ) from None
    finally:
        logging.disable(level)
