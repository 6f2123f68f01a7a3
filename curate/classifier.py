"""
classifier.py: how much does a text teach, from 0 to 5?

FineWeb-Edu asked a large model to give 450,000 pages points: 1 for something educational, 3 for a page that
fits a school subject, 5 for a perfect one. A small model then learnt to guess these points, and pages guessed
at 3 or more were kept: 1.3 of 15 trillion tokens. (Python-Edu did the same for programs, and kept 4 or more.)

Theirs sits on a language model. Ours is the oldest one there is, linear regression on words and neighbours:

    "The ones: 7 + 0 = 7"   ->   the, ones, :, 7, ...  the ones, ones :, : 7, ...   runs of one and two words
                            ->   buckets 93,670, 155,911, ...                       each hashed to one of 2^18
    score = bias + the sum of weight[bucket] * value over all buckets of a text

    python classifier.py train builtin-scored --out=out/classifier.safetensors
    python classifier.py score pages.jsonl --model=out/classifier.safetensors                  next: curate.py

It learns from lines {"text": ..., "score": ...} (.jsonl, .jsonl.gz, .parquet, or a data set of the hub),
from fineweb-edu-annotations and python-edu-annotations on the hub, or from builtin-scored:
the built-in world and the noise of a crawl, with points by rules of thumb.
"""

import argparse
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from plumbing import checkpoint
import config
from config import Config, UserError
from curate.crawl import SCORES, crawl
from corpus.documents import world
from corpus.files import Bad
from corpus.hub import Hub
from corpus.sources import Documents, locate, split_of

LEAST = {"educational": 3, "educational_python": 4}  # step of curate.py: rounded score that a text needs
BUCKETS, RUN, WORDS = 2**18, 2, 500  # only the beginning is read: the original saw 512 tokens
SETTINGS = {"features": f"runs of 1 to {RUN} of the first {WORDS} words in {BUCKETS} buckets"}  # in the file

# ---------------------------------------------------------------------------------------------------------
# the model: F different buckets in one text, B texts in a batch, N features in a batch


def features(text: str) -> tuple[np.ndarray, np.ndarray]:
    """The buckets of a text, (F,) int32, and their values, (F,) float32; the values' squares add up to 1.

    A run that occurs 10 times does not count 10 times as much as one that occurs once, but 3.3 times.
    """
    words = re.findall(r"\w+|[^\w\s]", text.lower())[:WORDS]
    runs = [" ".join(words[i:i + n]) for n in range(1, RUN + 1) for i in range(len(words) - n + 1)]
    buckets = [zlib.crc32(run.encode(errors="replace")) % BUCKETS for run in runs]  # hash() is salted
    index, counts = np.unique(np.array(buckets, dtype=np.int32), return_counts=True)
    value = 1 + np.log(counts)
    return index, (value / max(1.0, np.linalg.norm(value))).astype(np.float32)


def score(text: str, weight: np.ndarray, bias: np.float32) -> float:
    """What the model thinks of a text: about 0 to 5, not rounded."""
    index, value = features(text)
    return float(weight[index] @ value + bias)


def rounded(scores: np.ndarray | Sequence[float] | float) -> np.ndarray:
    """As the points were given: 2.6 -> 3, -0.2 -> 0, 7.1 -> 5."""
    return np.clip(np.rint(scores), 0, 5).astype(int)


def fit(documents: Sequence[tuple], scores: np.ndarray | Sequence[float], n_buckets: int = BUCKETS,
        epochs: int = 5, batch: int = 32, rate: float = 0.1,
        seed: int = 0) -> tuple[np.ndarray, np.float32]:
    """Weights (n_buckets,) and the bias with the least mean squared error, by AdaGrad (Duchi et al. 2011):
    a bucket's steps become smaller with the slopes it has seen, so rare runs still make large ones.

    documents: [(buckets, values)], as features() returns them; scores: as many numbers.
    """
    weight, bias, scores = np.zeros(n_buckets), np.mean(scores), np.asarray(scores, dtype=float)
    seen, seen_bias, random = np.full(n_buckets, 1e-8), 1e-8, np.random.default_rng(seed)
    for epoch in tqdm(range(epochs), "training", unit=" epochs", disable=None):
        now = rate * (1 - epoch / epochs)  # smaller steps at the end: no circling around the optimum
        for rows in np.array_split(random.permutation(len(scores)), -(-len(scores) // batch)):
            index = np.concatenate([documents[row][0] for row in rows])                     # (N,)
            value = np.concatenate([documents[row][1] for row in rows])                     # (N,)
            sizes = [len(documents[row][0]) for row in rows]
            text = np.repeat(np.arange(len(rows)), sizes)                                   # (N,) 0 to B - 1
            guess = np.bincount(text, weight[index] * value, len(rows)) + bias              # (B,)
            error = (guess - scores[rows]) / len(rows)  # half the slope of the mean squared error
            buckets, place = np.unique(index, return_inverse=True)
            slope = np.bincount(place, error[text] * value)  # of these buckets; all others are 0
            seen[buckets] += slope**2
            weight[buckets] -= now * slope / np.sqrt(seen[buckets])
            seen_bias += error.sum()**2
            bias -= now * error.sum() / np.sqrt(seen_bias)
    return weight.astype(np.float32), np.float32(bias)


def save(path: Path | str, weight: np.ndarray, bias: np.float32) -> None:
    """One file with the weights and how features are made, written completely or not at all."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    save_file({"weight": weight, "bias": np.array([bias])}, temporary, metadata=SETTINGS)
    checkpoint.put(temporary, path)


def load(path: Path | str) -> tuple[np.ndarray, np.float32]:
    """The weights (BUCKETS,) and the bias in a file. Raises UserError if there is none or not one of ours."""
    way = "python classifier.py train builtin-scored --out=FILE.safetensors trains one"
    if not Path(path).is_file():
        raise UserError(f"there is no classifier {path}: {way}")
    try:
        with safe_open(path, "np") as file:
            if file.metadata() != SETTINGS:
                raise UserError(f"{path} is not a classifier with {SETTINGS['features']}: {way}")
            return file.get_tensor("weight"), file.get_tensor("bias")[0]
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as a classifier ({error}): {way}") from None


# ---------------------------------------------------------------------------------------------------------
# texts with scores

ANNOTATIONS = {  # what Llama-3-70B-Instruct thought
    "fineweb-edu-annotations": Hub("HuggingFaceFW/fineweb-edu-llama3-annotations", columns=("text", "score")),
    "python-edu-annotations": Hub("HuggingFaceTB/python-edu-annotations", columns=("prompt", "score"))}
BUILTIN = {  # rules of thumb, since the generator knows what it writes; corpus/crawl.py has those for noise
    "textbook": {"children": 5, "middle": 5, "adults": 4},
    "example": {"children": 5, "middle": 4, "adults": 4},
    "article": {"children": 3, "middle": 3, "adults": 3},
    "howto": {"children": 2, "middle": 2, "adults": 2},
    "story": {"children": 1, "middle": 2}}  # some of the latter count and travel


def builtin_scored(seed: int) -> Iterator[tuple[str, int]]:
    """(text, score) for the built-in world and a crawl, but for copies: they would be on both sides of the
    split. Not the crawl of the seed itself: what is to be curated must not be what was learnt."""
    for form, audience, text in world(seed):
        yield text, BUILTIN[form][audience]
    for kind, text in crawl(seed + 1):
        if kind != "copy":
            yield text, SCORES[kind]


def scored(row: dict) -> tuple[str, float]:
    """(text, score from 0 to 5) of a row. Of python-edu's prompts only the program counts, not the task."""
    text, points = row.get("text"), row.get("score")
    if text is None and isinstance(row.get("prompt"), str):
        match = re.search(r"The extract:(.*)After examining the extract", row["prompt"], re.S)
        text = match and match[1]
    if not isinstance(text, str) or not text.strip() or (
            type(points) not in (int, float) or points != points):  # NaN is not itself
        raise Bad("no text and score", f"there are {list(row)}")
    return text, min(max(points, 0), 5)


def labelled(source: str) -> Iterable[tuple[str, float]]:
    """Iterates over the (text, score) of a source by its name."""
    if source == "builtin-scored":
        return builtin_scored(Config().data_seed)
    found = ANNOTATIONS.get(source) or locate(source)
    if isinstance(found, Hub) and source not in ANNOTATIONS:
        found = replace(found, columns=("text", "score"))
    return Documents(found if isinstance(found, Hub) else source, Config(on_bad="skip"), item=scored)


# ---------------------------------------------------------------------------------------------------------
# how good is it?


def f1(true: np.ndarray, guessed: np.ndarray) -> float:
    """Two arrays of yes and no -> 2 hits / (2 hits + misses + false alarms); 0 if there is nothing at all."""
    hits, wrong = np.sum(true & guessed), np.sum(true != guessed)
    return float(2 * hits / max(1, 2 * hits + wrong))


def report(scores: Sequence[float], guesses: np.ndarray) -> Iterator[str]:
    """What the original card says, as lines; the macro F1 is the mean over the scores that occur."""
    true, guessed = rounded(scores), rounded(guesses)
    macro = np.mean([f1(true == k, guessed == k) for k in np.union1d(true, guessed)])
    yield (f"accuracy {np.mean(true == guessed):.3f}   macro F1 {macro:.3f}   "
           f"mean squared error {np.mean((np.asarray(scores) - guesses)**2):.3f}")
    for least in LEAST.values():
        yield f"keeping {least} and more: F1 {f1(true >= least, guessed >= least):.3f}"
    yield "score   " + "".join(f"  guessed {k}" for k in range(6))
    for k in np.unique(true):
        yield f"{k:5}   " + "".join(f"{n:11,}" for n in np.bincount(guessed[true == k], minlength=6))


def train(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if out.suffix != ".safetensors" or not out.parent.is_dir():
        raise UserError(f"{out} must end in .safetensors, in a folder that is there")
    streams = [labelled(source) for source in args.source]
    rows: dict[str, list] = {"train": [], "val": []}
    for texts in streams:
        for text, points in tqdm(texts, "reading", unit=" texts", disable=None):
            rows[split_of(text.encode(errors="replace"), 0.1)].append((features(text), points))
    if min(map(len, rows.values())) == 0:
        raise UserError(f"{', '.join(args.source)}: {len(rows['train'])} texts to learn from and "
                        f"{len(rows['val'])} held out are too few")
    documents, scores = zip(*rows["train"])
    weight, bias = fit(documents, scores)
    save(out, weight, bias)
    print(f"learnt from {len(rows['train']):,} texts; on {len(rows['val']):,} others:")
    guesses = [weight[index] @ value + bias for (index, value), _ in rows["val"]]
    print("\n".join(report([points for _, points in rows["val"]], np.array(guesses))))
    print(out)


def show(args: argparse.Namespace) -> None:
    """How the scores of a source are spread, and how a text of each begins."""
    weight, bias = load(args.model)
    counts: Counter[int] = Counter()
    first: dict[int, str] = {}
    for text in tqdm(Documents(args.source, Config()), "scoring", unit=" texts", disable=None):
        guess = int(rounded(score(text, weight, bias)))
        counts[guess] += 1
        first.setdefault(guess, " ".join(text.split())[:60])
    for guess, count in sorted(counts.items()):
        print(f"{guess}  {count:>12,}  {count / counts.total():6.1%}   {first[guess]}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="classifier.py", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help="learn from texts with scores")
    command.add_argument("source", nargs="+", help="as above; several are learnt together")
    command.add_argument("--out", required=True, help="a .safetensors file, replaced if it is there")
    command.set_defaults(run=train)
    command = commands.add_parser("score", help="score the texts of a source")
    command.add_argument("source", help="a file, a folder, or another source that data.py takes")
    command.add_argument("--model", required=True, help="what train wrote")
    command.set_defaults(run=show)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    config.command(main, own_help=True)
