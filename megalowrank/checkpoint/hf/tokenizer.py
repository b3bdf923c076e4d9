"""A tokenizer as files that ``AutoTokenizer`` loads, with the same ids.

The files of a Hugging Face folder are copied. A sentencepiece model becomes a tokenizer.json; ids are compared on
sample texts. One thing differs by design: pieces such as </s> that stand in a text are special tokens to
transformers, and mere text to sentencepiece.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megalowrank.data.tokenizers import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from megalowrank.errors import ConfigError

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "*.model", "*.tiktoken", "*.jinja",
)  # fmt: skip
SAMPLES = (
    "ROMEO: But, soft! what light through yonder window breaks?\nIt is the east,\n\tand Juliet is the sun.",
    "  Two  spaces,   three; 1,234.56 € for 北京 and Zürich – naïve façade ½ \U0001f600.  ",
    "def f(x):\n    return {'a': [x ** 2, -1e-5]}  # comment\r\n", "a", " a", "aaaaaaaaaaaaa",
)  # fmt: skip
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_UNIGRAM, _BPE = 1, 2
_SPACE = "\u2581"


def write_tokenizer(
    source: str | Path, folder: Path, length: int, padded: bool = False
) -> tuple[Tokenizer, dict[str, int | None]]:
    """Write the tokenizer at ``source`` into ``folder``; returns it, and bos_token_id, eos_token_id, pad_token_id.

    ``length`` is the longest sequence of the model. ``padded``: where it has no padding token, the one that ends a
    document, or the one for the unknown, becomes it, and padding is on the right. Raises ConfigError if it is no
    tokenizer, or if what was written gives other ids than ``source``.
    """
    given = load_tokenizer(source)
    if isinstance(given, HuggingFaceTokenizer):
        for path in sorted({path for pattern in FILES for path in Path(source).glob(pattern)}):
            shutil.copyfile(path, folder / path.name)
    else:
        sentencepiece_as_fast(given, length).save_pretrained(folder)
    written = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if padded:
        written.pad_token = written.pad_token or written.eos_token or written.unk_token
        written.padding_side = "right"
        written.save_pretrained(folder)
    for text in SAMPLES:
        found, expected = HuggingFaceTokenizer(written).encode(text), given.encode(text)
        if found != expected:
            raise ConfigError(f"the tokenizer {source} has no equal in transformers", f"other ids for {text[:30]!r}")
    ids = {f"{kind}_token_id": getattr(written, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return given, ids


def sentencepiece_as_fast(processor: Any, length: int) -> PreTrainedTokenizerFast:
    """transformers' tokenizer of a sentencepiece model of type BPE or unigram; ConfigError for another type.

    transformers cuts a text at symbols of the user before spaces are changed, sentencepiece after: both is refused.
    """
    from sentencepiece import sentencepiece_model_pb2  # it needs protobuf, which nothing else here does

    model = sentencepiece_model_pb2.ModelProto.FromString(processor.serialized_model_proto())
    inner = FastTokenizer(_algorithm(model))
    steps = _normalisation(model.normalizer_spec)
    inner.normalizer = normalizers.Sequence(steps)
    dummy = model.normalizer_spec.add_dummy_prefix
    inner.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if dummy else [])
    )
    defined = [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED]
    if defined and (dummy or model.normalizer_spec.remove_extra_whitespaces):
        raise ConfigError("the sentencepiece model has symbols of its own and changes spaces", defined[0])
    inner.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in defined])
    special = {}
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(processor, f"{kind}_id")()
        if number >= 0:
            special[f"{kind}_token"] = processor.id_to_piece(number)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=length, clean_up_tokenization_spaces=False, **special
    )


def _algorithm(model: Any) -> models.Model:
    kind = model.trainer_spec.model_type
    if kind not in (_UNIGRAM, _BPE) or model.trainer_spec.treat_whitespace_as_suffix:
        raise ConfigError("the sentencepiece model has no exact equal in transformers", f"type {kind}", "BPE, unigram")
    unknown = next(number for number, piece in enumerate(model.pieces) if piece.type == _UNKNOWN)
    bytes_too = any(piece.type == _BYTE for piece in model.pieces)
    if kind == _UNIGRAM:
        return models.Unigram([(piece.piece, piece.score) for piece in model.pieces], unknown, bytes_too)
    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    return models.BPE(
        vocabulary, _merges(model, vocabulary), unk_token=model.pieces[unknown].piece, fuse_unk=True,
        byte_fallback=bytes_too,
    )  # fmt: skip


def _merges(model: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs that make a piece, best score first, as sentencepiece joins them."""
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type in (_NORMAL, _USER_DEFINED)}
    found = []
    for piece, score in normal.items():
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs = [pair for pair in cuts if pair[0] in normal and pair[1] in normal]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(-score, vocabulary[piece], pair) for pair in pairs]
    return [pair for _, _, pair in sorted(found, key=lambda merge: merge[:2])]


def _normalisation(spec: Any) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return [*steps, normalizers.Replace(" ", _SPACE)]
