"""bench/tokenizing.py: merges are learned from text, and text becomes ids."""

import sysconfig
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path

import tokenizers
from tqdm import tqdm

from config import UserError
from corpus.sources import split_of
from plumbing.shards import prefetch, write_shard
from tokenizer import SPECIAL, Tokenizer, rust_tokenizer

VOCAB_SIZE = 49152
AT_ONCE = 200  # texts that the library encodes together


def texts_of(o: Namespace) -> list[str]:
    """About o.megabytes of text: Python files of the installed packages, which every reader has."""
    left, texts = o.megabytes * 1e6, []
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        left -= len(texts[-1].encode())
        if left < 0:
            return texts
    raise UserError(f"--megabytes={o.megabytes} is too much: the installed packages have "
                    f"{o.megabytes - left / 1e6:.0f} MB of Python files")


def tokenizing(o: Namespace, learn: Callable, encode: Callable) -> dict[str, tuple]:
    """The rows of a side. learn(texts) returns the size of the vocabulary, encode(tok, batches) the number of
    ids."""
    texts = texts_of(o)
    batches = [texts[i:i + AT_ONCE] for i in range(0, len(texts), AT_ONCE)]
    size = sum(len(text.encode()) for text in texts) / 1e6
    tok = Tokenizer.train(texts[::20], VOCAB_SIZE)
    return {"train": (lambda: learn(texts), size, "MB"),
            "encode": (lambda: encode(tok, batches), size, "MB")}


def tokenizer_ours(o: Namespace) -> dict[str, tuple]:
    """train_bpe in Python; data.py's encoding, which also splits texts, counts them and writes shards."""
    def learn(texts: list[str]) -> int:
        return Tokenizer.train(texts, VOCAB_SIZE).vocab_size

    def encode(tok: Tokenizer, batches: list[list[str]]) -> int:
        with tempfile.TemporaryDirectory() as folder:
            parts: Iterable = (([(split_of(text, 0.0005), text) for text in texts], {}) for texts in batches)
            shard, _, _ = write_shard(prefetch(parts), Path(folder), "0", tok, tqdm(disable=True))
        return sum(part["tokens"] - part["documents"] for part in shard.values())  # without <|endoftext|>

    return tokenizing(o, learn, encode)


def tokenizer_tokenizers(o: Namespace) -> dict[str, tuple]:
    """The library's own trainer, and its bare encode_batch_fast."""
    def learn(texts: list[str]) -> int:
        rust = rust_tokenizer([])
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        rust.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))
        return rust.get_vocab_size()

    def encode(tok: Tokenizer, batches: list[list[str]]) -> int:
        return sum(len(encoding.ids) for texts in batches
                   for encoding in tok.rust.encode_batch_fast(texts, add_special_tokens=False))

    return tokenizing(o, learn, encode)
