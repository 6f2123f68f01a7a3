"""
quality.py: does the demo's model write English, and its own?

    python tests/quality.py out/demo/pretrain

writes 20 samples of 60 tokens at temperature 0.8; counts words that occur in the built-in corpus (at least
95%), samples that repeat a run of 8 words (none), runs of 13 words copied from training text (at most half).
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from plumbing import checkpoint  # noqa: E402  the scripts lie one folder up
import config  # noqa: E402
from config import UserError  # noqa: E402
from corpus.sources import Documents  # noqa: E402
from model import SmolLM  # noqa: E402
from sample import samples  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

PROMPT = "Once upon a time"


def words(text):
    return re.findall(r"[a-z']+|\d", text.lower())


def runs(text, n):
    """All runs of n words: ("a b c", 2) -> [("a", "b"), ("b", "c")]."""
    return list(zip(*(words(text)[i:] for i in range(n))))


def main(argv):
    if len(argv) != 1:
        raise UserError("name one checkpoint: python tests/quality.py out/demo/pretrain")
    folder = checkpoint.find(argv[0])
    model, tok = SmolLM.load(folder).eval(), Tokenizer.load(folder)
    cfg = config.load(["config/demo.py"])
    corpus = list(Documents("builtin", cfg))
    known = {word for text in corpus for word in words(text)}
    copied = {run for text in corpus for run in runs(text, 13)}
    texts = [
        PROMPT + text
        for text in samples(
            model, tok, tok.encode(PROMPT), 20, dict(max_new_tokens=60, temperature=0.8, seed=0)
        )
    ]
    for text in texts[:3]:
        print(f"    {text}\n")
    # the last word may be cut off by the limit of 60 tokens, so it is not counted
    found = [word in known for text in texts for word in words(text)[:-1]]
    repeats = sum(len(set(runs(text, 8))) < len(runs(text, 8)) for text in texts)
    copies = [run in copied for text in texts for run in runs(text, 13)]
    print(f"words that occur in the corpus        {sum(found) / len(found):.1%} of {len(found)}")
    print(f"samples that repeat a run of 8 words  {repeats} of {len(texts)}")
    print(f"runs of 13 words that are copied      {sum(copies) / max(1, len(copies)):.1%} of {len(copies)}")


if __name__ == "__main__":
    config.command(main)
