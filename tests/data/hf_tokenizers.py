"""Hugging Face tokenizers made from nothing: byte-level BPE as GPT-2 has it, with an end-of-text token."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"


def make_byte_level(folder: Path, texts: list[str], vocab_size: int, end: str | None = END) -> Tokenizer:
    """Train a byte-level BPE and save it as transformers does; returns the bare tokenizer."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[end] if end else [], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end).save_pretrained(str(folder))
    return inner
