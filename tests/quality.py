"""
quality.py: does the demo's model write English, and its own?

    python tests/quality.py out/demo/pretrain

writes 20 samples of 60 tokens at temperature 0.8 and counts words that occur in the built-in corpus (at least
95%), samples that repeat a run of 8 words (none), and runs of 13 words copied from training text (at most
half).
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import config  # noqa: E402  the scripts are one folder up
from config import UserError  # noqa: E402
from corpus.sources import Documents  # noqa: E402
from plumbing import checkpoint  # noqa: E402
from plumbing.processes import command  # noqa: E402
from sample import continuations  # noqa: E402

PROMPT = "Once upon a time"
SETTINGS = dict(max_new_tokens=60, temperature=0.8, seed=0)


def words(text):
    return re.findall(r"[a-z']+|\d", text.lower())


def runs(text, n):
    """All runs of n words: ("a b c", 2) -> [("a", "b"), ("b", "c")]."""
    return list(zip(*(words(text)[i:] for i in range(n))))


def main(argv):
    if len(argv) != 1:
        raise UserError("name one checkpoint: python tests/quality.py out/demo/pretrain")
    model, tok = checkpoint.load(argv[0])
    corpus = list(Documents("builtin", config.load(["config/demo.py"])))
    known = {word for text in corpus for word in words(text)}
    seen = {run for text in corpus for run in runs(text, 13)}
    texts = [PROMPT + text for text in continuations(model, tok, tok.encode(PROMPT), 20, SETTINGS)]
    for text in texts[:3]:
        print(f"    {text}\n")
    # the last word may be cut off by the limit of 60 tokens, so it is not counted
    in_corpus = [word in known for text in texts for word in words(text)[:-1]]
    repeats = sum(len(set(runs(text, 8))) < len(runs(text, 8)) for text in texts)
    copied = [run in seen for text in texts for run in runs(text, 13)]
    print(f"words that occur in the corpus        {sum(in_corpus) / len(in_corpus):.1%} of {len(in_corpus)}")
    print(f"samples that repeat a run of 8 words  {repeats} of {len(texts)}")
    print(f"runs of 13 words that are copied      {sum(copied) / max(1, len(copied)):.1%} of {len(copied)}")


if __name__ == "__main__":
    command(main)
