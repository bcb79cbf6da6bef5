"""A teacher's tokenizer as `tokenizer.json`, which the package `tokenizers` reads by itself.

open_clip cleans a text in Python before it cuts it into tokens: ftfy mends broken encodings, HTML
entities are resolved, blanks joined, letters made small. What ftfy does to single characters (curly
quotes, ligatures, full-width letters, control characters) is written into the file as
replacements; what looks at more than one character cannot be, and `differs_by_rule` names it.
"""

import html
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import write_json
from pipeline.models.open_clip import open_clip
from pipeline.models.text_tower import read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer, normalizers

SimpleTokenizer = open_clip.tokenizer.SimpleTokenizer
OpenClipTokenizer = SimpleTokenizer | open_clip.tokenizer.HFTokenizer

# Where ftfy changes single characters: control characters, ligatures, quotes, full-width forms.
CHANGED = [
    *((0x00, 0xA0), (0x132, 0x134), (0x149, 0x14A), (0x1C4, 0x1F4), (0x2BC, 0x2BD)),
    *((0x2018, 0x2070), (0x3000, 0x3001), (0xFB00, 0xFB07), (0xFEFF, 0x10000)),
]
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's own pattern
PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^`{|}~]"""  # string.punctuation without "_"
CLEANING = ("lower", "whitespace", "canonicalize")  # by open_clip's names
FINAL_SIGMA, IOTA_BELOW = "Σ", "\u0345"


def write_tokenizer(tokenize: OpenClipTokenizer, length: int, folder: Path) -> dict:
    """Write tokenizer.json and tokenizer_config.json for a tokenizer of open_clip's.

    length: tokens of a text, padding included. Returns the cleaning as open_clip's configuration
    names it. Raises PipelineError where the package tokenizers is missing.
    """
    tokenizer, pad = portable(tokenize)
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=length)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "pad_token": pad,
    }
    write_json(folder / "tokenizer_config.json", settings)
    return {"clean": _cleaning(tokenize)}


def check_tokenizer(tokenize: OpenClipTokenizer, folder: Path, texts: Iterable[str]) -> list[str]:
    """The texts that the written tokenizer reads otherwise, each by a rule of `differs_by_rule`.

    Raises PipelineError for a text that differs by none.
    """
    texts = list(texts)
    if not texts:
        return []
    written = [encoding.ids for encoding in read_tokenizer(folder).encode_batch(texts)]
    exact = tokenize(texts).tolist()
    other = [t for t, ours, theirs in zip(texts, exact, written, strict=True) if ours != theirs]
    for text in other:
        if differs_by_rule(text) is None:
            raise PipelineError(
                f"the written tokenizer reads {text!r} otherwise than open_clip does, by no rule "
                "that is known. Nothing was written; try another version of `tokenizers`."
            )
    return other


def differs_by_rule(text: str) -> str | None:
    """Why tokenizer.json may read a text otherwise than open_clip: a class of texts, or None."""
    import ftfy
    from tokenizers import normalizers

    if FINAL_SIGMA in text:
        return "a capital sigma, whose small form depends on where it stands"
    if IOTA_BELOW in text:
        return "a combining iota, which moves when letters become small"
    composed = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    if composed.normalize_str(text) != unicodedata.normalize("NFC", text).lower():
        return "combining marks that are younger than the Unicode of `tokenizers`"
    if html.unescape(text) != text:
        return "an HTML entity"
    fixed = ftfy.fix_text(text)
    if fixed != unicodedata.normalize("NFC", text.translate(str.maketrans(_character_changes()))):
        return "a broken encoding or terminal code, which ftfy mends"
    return None


def portable(tokenize: OpenClipTokenizer) -> "tuple[Tokenizer, str]":
    """(tokenizer, its padding token) that reads texts as open_clip's tokenizer does.

    Raises PipelineError where the package tokenizers is missing.
    """
    try:
        from tokenizers import Tokenizer, normalizers
    except ImportError:
        raise PipelineError(
            'no package tokenizers. Run `pip install "extrahead[export]"` first.'
        ) from None
    if isinstance(tokenize, SimpleTokenizer):
        tokenizer, pad = _from_bpe(tokenize), "!"  # "!" has the id 0, with which open_clip pads
    else:
        theirs = tokenize.tokenizer  # of transformers
        tokenizer, pad = Tokenizer.from_str(theirs.backend_tokenizer.to_str()), theirs.pad_token
    steps = [*_cleaning_steps(_cleaning(tokenize))]
    if tokenizer.normalizer is not None:
        steps.append(tokenizer.normalizer)
    tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer, pad


def _from_bpe(tokenize: SimpleTokenizer) -> "Tokenizer":
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

    ranks = tokenize.bpe_ranks  # pair of pieces -> its turn
    merges = [(first, second) for first, second in sorted(ranks, key=ranks.__getitem__)]
    tokenizer = Tokenizer(
        models.BPE(vocab=tokenize.encoder, merges=merges, end_of_word_suffix="</w>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    ends = {
        token: tokenize.encoder[token] for token in tokenize.encoder if token.endswith("_of_text>")
    }
    start, end = sorted(ends, key=ends.__getitem__)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=list(ends.items())
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (start, end)])
    return tokenizer


def _cleaning(tokenize: OpenClipTokenizer) -> str:
    """open_clip's name of what the tokenizer does to a text first."""
    for name in CLEANING:
        if tokenize.clean_fn is open_clip.tokenizer.get_clean_fn(name):
            return name
    raise PipelineError(f"the teacher's tokenizer cleans texts by {tokenize.clean_fn}: unknown.")


def _cleaning_steps(cleaning: str) -> "list[normalizers.Normalizer]":
    from tokenizers import Regex, normalizers

    steps: list[normalizers.Normalizer] = [
        normalizers.Replace(*pair) for pair in _character_changes().items()
    ]
    steps.append(normalizers.NFC())
    if cleaning == "canonicalize":
        steps.append(normalizers.Replace("_", " "))
        steps.append(normalizers.Replace(Regex(PUNCTUATION), ""))
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    return steps if cleaning == "whitespace" else [*steps, normalizers.Lowercase()]


@cache
def _character_changes() -> dict[str, str]:
    """Character -> what ftfy makes of it between two letters; only those that it changes."""
    import ftfy

    changes = {}
    for start, stop in CHANGED:
        for character in map(chr, range(start, stop)):
            fixed = ftfy.fix_text(f"a{character}b")[1:-1]
            known = unicodedata.category(character) != "Cn"
            if known and not fixed.isspace() and fixed != unicodedata.normalize("NFC", character):
                changes[character] = fixed
    return changes
