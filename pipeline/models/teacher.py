"""The teacher: an open_clip model under a card, as a function from pixels and texts to vectors.

Only stage one and what looks at the teacher import this; training never does.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import libraries
from pipeline.core.records import TeacherIdentity
from pipeline.models.card import (
    LOCAL,
    TeacherCard,
    check_digest,
    check_weights,
    config_digest,
    read_card,
    weights_file,
)
from pipeline.models.fetched_weights import fetched_weights
from pipeline.models.golden import TEXTS, recognise
from pipeline.models.open_clip import QuickGELU, open_clip
from pipeline.models.stated_preprocessing import preprocessing_of

VERSION = 1  # raise it when a change here changes every embedding
TEXTS_VERSION = 2  # of texts alone; 2: a text's length ends at its end token, whatever its ids
CONTEXTS = (16, 32)  # lengths, in tokens, of a shortened text tower
FAITHFUL = 0.999  # least cosine per row between bfloat16 and float32


class Teacher:
    """open_clip's two towers, frozen, at float32 unless `cast`.

    preprocessing: the model's own; embedding_size: E.

    Raises PipelineError: no or wrong weights, a checkpoint of another architecture, an activation
    or golden vectors other than the card's (the latter can be accepted).
    """

    def __init__(
        self,
        card_path: Path,
        device: torch.device,
        *,
        check_activation: bool = True,
        accept_other_vectors: bool = False,
    ) -> None:
        self.card = read_card(card_path)
        self.device, self.dtype = device, torch.float32
        check_weights(self.card, card_path)
        self.model: Any = _load(self.card, card_path).to(device).eval().requires_grad_(False)
        self.tokenize = _tokenizer(self.card, card_path)
        self.preprocessing = preprocessing_of(self.model.visual.preprocess_cfg, card_path)
        if check_activation:  # not while a card is being written
            self._check_activation(card_path)
        recognise(self, card_path, accept=accept_other_vectors)
        self.embedding_size = self.embed_texts([TEXTS[0]]).shape[1]

    @property
    def image_size(self) -> int:
        """S, px."""
        return self.preprocessing.image_size

    def cast(self, dtype: torch.dtype) -> "Teacher":
        """The same teacher in another dtype; this one stays as it is."""
        if dtype == self.dtype:
            return self
        other = copy.copy(self)
        other.model, other.dtype = copy.deepcopy(self.model).to(dtype), dtype
        return other

    def least_cosine(self, exact: "Teacher", tower: str, inputs: Any) -> float:
        """The least cosine of a tower's vectors of these inputs to those of the exact teacher.

        tower: image or text. Raises PipelineError below FAITHFUL.
        """
        mine, theirs = (
            teacher.embed_images(inputs) if tower == "image" else teacher.embed_texts(inputs)
            for teacher in (self, exact)
        )
        cosine = float((mine * theirs).sum(1).min(initial=1))
        if cosine < FAITHFUL:
            raise PipelineError(
                f"in {self.dtype} this teacher's {tower} tower drifts to a cosine of {cosine:.5f} "
                f"from float32 (at least {FAITHFUL} is wanted). Set `teacher_embed.dtype: float32`."
            )
        return cosine

    @torch.inference_mode()
    def embed_images(self, pixels: np.ndarray) -> np.ndarray:
        """(B, S, S, 3) uint8 -> (B, E) float32, unit length."""
        vectors = self.model.encode_image(self.normalised(pixels))  # (B, E)
        return _unit(vectors)

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> np.ndarray:
        """n texts -> (n, E) float32, unit length; cut at the context length, as CLIP does.

        A causal tower's answer is read at the end token and what follows cannot change it, so
        the padding behind the longest text is not computed: most captions need 16 of CLIP's 77
        tokens.
        """
        tokens = self.tokenize(texts).to(self.device)  # (n, T)
        length = max(self._context_lengths(self._ends(tokens)).tolist())
        if length == tokens.shape[1]:
            return _unit(self.model.encode_text(tokens))
        shortened = {
            "positional_embedding": self.model.positional_embedding[:length],
            "attn_mask": self.model.attn_mask[:length, :length],
        }
        _, vectors, *_ = torch.func.functional_call(
            self.model, shortened, kwargs={"text": tokens[:, :length]}
        )
        return _unit(vectors)

    def context_lengths(self, texts: list[str]) -> list[int]:
        """Tokens that each text is embedded in: the least of CONTEXTS that holds it, or all.

        A function of the text alone; texts of one length are embedded together, so that a text's
        vector does not depend on its neighbours.
        """
        return self._context_lengths(self._ends(self.tokenize(texts))).tolist()

    def was_cut_short(self, texts: list[str]) -> list[bool]:
        """Whether version 1 of TEXTS_VERSION lost a text's end: it did not count tokens of id 0."""
        tokens = self.tokenize(texts)
        counted = self._context_lengths((tokens != 0).sum(dim=1))
        return (counted < self._context_lengths(self._ends(tokens))).tolist()

    def _ends(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n, T) -> (n,) tokens up to the end token, which is where the text tower looks."""
        if self._causal:
            return tokens.argmax(dim=1) + 1
        return torch.full((len(tokens),), tokens.shape[1], device=tokens.device)

    def _context_lengths(self, counts: torch.Tensor) -> torch.Tensor:
        complete = self.model.context_length
        shorter = [n for n in CONTEXTS if n < complete] if self._causal else []
        lengths = torch.tensor([*shorter, complete], device=counts.device)
        return lengths[torch.searchsorted(lengths, counts.clamp(max=complete))]

    @property
    def _causal(self) -> bool:
        """A text's vector stands at its end token, the largest id, and depends on no later one."""
        model = self.model
        if type(model) is not open_clip.CLIP or model.attn_mask is None:
            return False
        return model.text_pool_type == "argmax"

    def normalised(self, pixels: np.ndarray) -> torch.Tensor:
        """(B, S, S, 3) uint8 -> (B, 3, S, S) in the teacher's dtype, on its device."""
        x = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device).permute(0, 3, 1, 2)
        mean = torch.tensor(self.preprocessing.mean, device=self.device).view(3, 1, 1)
        std = torch.tensor(self.preprocessing.std, device=self.device).view(3, 1, 1)
        return ((x.float() / 255 - mean) / std).to(self.dtype)

    def activation(self) -> str:
        """The activation that was really built, whatever the checkpoint's name suggests."""
        kinds = {type(module) for module in self.model.visual.modules()}
        return "quickgelu" if QuickGELU in kinds else "gelu"

    def _check_activation(self, card_path: Path) -> None:
        if (activation := self.activation()) != self.card.activation:
            raise PipelineError(
                f"{card_path}: {self.card.model} was built with {activation}, the card says "
                f"{self.card.activation}. OpenAI's weights need a model name that ends in "
                "-quickgelu; correct `model` or `activation`."
            )


def teacher_identity(card: TeacherCard, card_path: Path) -> TeacherIdentity:
    """What determines this teacher's vectors, apart from dtype and batch size."""
    config = config_digest(card, card_path)
    return TeacherIdentity(card=card.named(), config=config, version=VERSION)


def teacher_libraries() -> dict[str, str]:
    return libraries("torch", "open_clip_torch", "pillow", "simplejpeg", "pyarrow")


def _model_name(card: TeacherCard, path: Path) -> str:
    if card.model.startswith(LOCAL):
        return f"local-dir:{(path.parent / card.model.removeprefix('local-dir:')).resolve()}"
    return card.model


def _tokenizer(card: TeacherCard, path: Path) -> Any:
    try:
        return open_clip.get_tokenizer(_model_name(card, path))
    except ImportError as error:
        raise PipelineError(
            f"{path}: the tokenizer of {card.model} needs the package {error.name}. Run "
            '`pip install "extrahead[siglip]"` first.'
        ) from None
    except OSError as error:  # of transformers: no network and nothing in its cache
        reason = " ".join(str(error).split())[:200]
        raise PipelineError(
            f"{path}: the tokenizer of {card.model} cannot be fetched: {reason}. With a network "
            "once, it stays in the cache of the Hugging Face Hub."
        ) from None


def _load(card: TeacherCard, path: Path) -> torch.nn.Module:
    weights = weights_file(card, path)
    pretrained = None if card.model.startswith(LOCAL) else str(weights or card.pretrained)
    try:
        if weights is None:
            fetched = fetched_weights(card.model, card.pretrained or "", path)
            if card.sha256 is not None:
                check_digest(path, fetched, card.sha256)
        model, _, _ = open_clip.create_model_and_transforms(
            _model_name(card, path), pretrained=pretrained, require_pretrained=True
        )
        return model
    except PipelineError:
        raise
    except Exception as error:  # open_clip raises a dozen kinds; all are the card's or the file's
        reason = " ".join(str(error).split())[:400]
        raise PipelineError(
            f"{path}: {card.model} with {pretrained or card.model} cannot be loaded: {reason}. "
            "Check that model and checkpoint belong together and that the checkpoint is whole "
            "(`open_clip.list_pretrained()` lists the tags)."
        ) from None


def _unit(vectors: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()
