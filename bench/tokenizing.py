"""tokenizing.py: merges are learnt from text, and text becomes ids."""

import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

import data
from config import UserError
from tokenizer import Tokenizer


def texts_of(o: SimpleNamespace) -> list[str]:
    """About o.megabytes of text: Python files of the installed packages, which every reader has."""
    left, texts = o.megabytes * 1e6, []
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        texts.append(text)
        left -= len(text.encode())
        if left < 0:
            return texts
    raise UserError(f"--megabytes={o.megabytes} is too much: the installed packages have "
                    f"{o.megabytes - left / 1e6:.0f} MB of Python files")


def tokenizing(o: SimpleNamespace, learn: Callable, encode: Callable) -> dict[str, tuple]:
    texts = texts_of(o)
    size = sum(len(text.encode()) for text in texts)
    tok = learn(texts[::20])
    return {"train": (lambda: learn(texts), size, "bytes"),
            "encode": (lambda: encode(tok, texts), size, "bytes")}


def tokenizer_ours(o: SimpleNamespace, ready: Callable[[], None]) -> dict[str, tuple]:
    ready()

    class Documents(list):
        def state(self):
            return {}

    def encode(tok, texts):
        with tempfile.TemporaryDirectory() as folder:
            batches = data.ahead(data.encoded_batches(Documents(texts), tok, 0.0005))
            return data.write_shard(batches, Path(folder), "0", 0, tqdm(disable=True))

    return tokenizing(o, lambda texts: Tokenizer.train(texts, 49152), encode)


def tokenizer_tokenizers(o: SimpleNamespace, ready: Callable[[], None]) -> dict[str, tuple]:
    ready()

    def encode(tok, texts):
        for i in range(0, len(texts), 200):
            tok.rust.encode_batch_fast(texts[i:i + 200], add_special_tokens=False)

    return tokenizing(o, lambda texts: Tokenizer.train(texts, 49152, "rust"), encode)
