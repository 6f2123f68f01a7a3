"""
classifier.py: how much does a text teach, from 0 to 5?

FineWeb-Edu asked a large model to score 450,000 pages: 1 for anything educational, 3 for a page that fits a
school subject, 5 for a perfect one. A small model then learned to predict these scores, and the pages that it
gave 3 or more were kept: 1.3 of 15 trillion tokens. (Python-Edu did the same for programs, from 4.)

Their small model is built on a language model. Ours is the oldest model of all, linear regression, on words
and pairs of neighboring words:

    "The ones: 7 + 0 = 7"   ->   the, ones, :, 7, ...  the ones, ones :, : 7, ...   runs of one and two words
                            ->   buckets 93,670, 155,911, ...                       each hashed to one of 2^18
    score = bias + the sum of weight[bucket] * value over all buckets of a text

    python -m curate.classifier train builtin-scored --out=out/classifier.safetensors
    python -m curate.classifier score pages.jsonl --model=out/classifier.safetensors

It learns from lines {"text": ..., "score": ...} (.jsonl, .jsonl.gz, .parquet, or a data set of the hub), from
fineweb-edu-annotations and python-edu-annotations on the hub, or from builtin-scored: the built-in world and
the noise of a crawl, scored by rules of thumb.                                        next: curate/crawl.py
"""

import argparse
import json
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

from config import Config, UserError
from corpus.documents import world
from corpus.files import Bad
from corpus.hub import Hub
from corpus.sources import Documents, account, add_reading_flags, locate, reading, split_of
from curate.crawl import SCORES, crawl
from plumbing import disk
from plumbing.processes import command

LEAST = {"educational": 3, "educational_python": 4}  # step of python -m curate: the score that a text needs
BUCKETS, RUN, WORDS = 2**18, 2, 500  # only the first words are read: the original read 512 tokens
SETTINGS = {"features": f"runs of 1 to {RUN} of the first {WORDS} words in {BUCKETS} buckets"}  # in the file
EPOCHS, BATCH, RATE = 5, 32, 0.1  # passes over the texts, texts per update, size of the first updates
HOW_TO_TRAIN = "python -m curate.classifier train builtin-scored --out=FILE.safetensors trains one"

# ---------------------------------------------------------------------------------------------------------
# the model: F different buckets in one text, B texts in a batch, N features in a batch


def features(text: str) -> tuple[np.ndarray, np.ndarray]:
    """The buckets of a text, (F,) int32, and their values, (F,) float32, whose squares add up to 1.

    A run that occurs 10 times counts 1 + ln 10 = 3.3 times as much as one that occurs once, not 10 times.
    """
    words = re.findall(r"\w+|[^\w\s]", text.lower())[:WORDS]
    runs = [" ".join(words[i:i + n]) for n in range(1, RUN + 1) for i in range(len(words) - n + 1)]
    buckets = [zlib.crc32(run.encode(errors="replace")) % BUCKETS for run in runs]  # hash() is salted
    index, counts = np.unique(np.array(buckets, dtype=np.int32), return_counts=True)
    value = 1 + np.log(counts)
    return index, (value / max(1.0, np.linalg.norm(value))).astype(np.float32)


def score(text: str, weight: np.ndarray, bias: np.float32) -> float:
    """The predicted score of a text: about 0 to 5, not rounded."""
    index, value = features(text)
    return float(weight[index] @ value + bias)


def rounded(scores: np.ndarray | Sequence[float] | float) -> np.ndarray:
    """Scores on the annotators' scale: 2.6 -> 3, -0.2 -> 0, 7.1 -> 5."""
    return np.clip(np.rint(scores), 0, 5).astype(int)


def fit(documents: Sequence[tuple],
        scores: np.ndarray | Sequence[float]) -> tuple[np.ndarray, np.float32]:
    """The weights (BUCKETS,) and the bias with the least mean squared error, found by AdaGrad (Duchi et al.
    2011): each weight's updates shrink with the slopes that it has seen, so weights of rare runs still move.

    documents: [(buckets, values)], as features() returns them; scores: one number for each.
    """
    weight, bias, scores = np.zeros(BUCKETS), np.mean(scores), np.asarray(scores, dtype=float)
    squares, squares_bias = np.full(BUCKETS, 1e-8), 1e-8  # of all slopes so far, added up
    random = np.random.default_rng(0)
    for epoch in tqdm(range(EPOCHS), "training", unit=" epochs", disable=None):
        rate = RATE * (1 - epoch / EPOCHS)  # smaller updates at the end: no circling around the optimum
        for rows in np.array_split(random.permutation(len(scores)), -(-len(scores) // BATCH)):
            index = np.concatenate([documents[row][0] for row in rows])                     # (N,)
            value = np.concatenate([documents[row][1] for row in rows])                     # (N,)
            sizes = [len(documents[row][0]) for row in rows]
            text = np.repeat(np.arange(len(rows)), sizes)                                   # (N,) 0 to B - 1
            predicted = np.bincount(text, weight[index] * value, len(rows)) + bias          # (B,)
            error = (predicted - scores[rows]) / len(rows)  # half the slope of the mean squared error
            buckets, place = np.unique(index, return_inverse=True)
            slope = np.bincount(place, error[text] * value)  # of these buckets; all others are 0
            squares[buckets] += slope**2
            weight[buckets] -= rate * slope / np.sqrt(squares[buckets])
            squares_bias += error.sum()**2
            bias -= rate * error.sum() / np.sqrt(squares_bias)
    return weight.astype(np.float32), np.float32(bias)


def save(path: Path | str, weight: np.ndarray, bias: np.float32) -> None:
    """Write the weights, and how features are made, into one file, atomically."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    with disk.writable(path):
        save_file({"weight": weight, "bias": np.array([bias])}, temporary, metadata=SETTINGS)
        disk.replace(temporary, path)


def load(path: Path | str) -> tuple[np.ndarray, np.float32]:
    """The weights (BUCKETS,) and the bias in a file. Raises UserError if it is missing or not one of ours."""
    if not Path(path).is_file():
        raise UserError(f"there is no classifier {path}: {HOW_TO_TRAIN}")
    try:
        with safe_open(path, "np") as file:
            if file.metadata() != SETTINGS:
                raise UserError(f"{path} is not a classifier with {SETTINGS['features']}: {HOW_TO_TRAIN}")
            return file.get_tensor("weight"), file.get_tensor("bias")[0]
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as a classifier ({error}): {HOW_TO_TRAIN}") from None


# ---------------------------------------------------------------------------------------------------------
# texts with scores, and how good the model is; skip the rest at a first reading

ANNOTATIONS = {  # what Llama-3-70B-Instruct thought of each text
    "fineweb-edu-annotations": Hub("HuggingFaceFW/fineweb-edu-llama3-annotations", columns=("text", "score")),
    "python-edu-annotations": Hub("HuggingFaceTB/python-edu-annotations", columns=("prompt", "score"))}
BUILTIN = {  # rules of thumb, since the generator knows what it writes; crawl.py has those for noise
    "textbook": {"children": 5, "middle": 5, "adults": 4},
    "example": {"children": 5, "middle": 4, "adults": 4},
    "article": {"children": 3, "middle": 3, "adults": 3},
    "howto": {"children": 2, "middle": 2, "adults": 2},
    "story": {"children": 1, "middle": 2}}  # in some of the latter, people count and travel


def builtin_scored(seed: int) -> Iterator[tuple[str, int]]:
    """(text, score) for the built-in world and the pages of a crawl.

    Copies are left out, or near-duplicates would be on both sides of the split. The crawl is that of the next
    seed: what a classifier curates must not be what it learned from.
    """
    for form, audience, text in world(seed):
        yield text, BUILTIN[form][audience]
    for kind, text in crawl(seed + 1):
        if kind != "copy":
            yield text, SCORES[kind]


def scored(row: dict) -> tuple[str, float]:
    """(text, score from 0 to 5) of a row. Of python-edu's prompts only the program counts, not the task."""
    text, given = row.get("text"), row.get("score")
    if text is None and isinstance(row.get("prompt"), str):
        match = re.search(r"The extract:(.*)After examining the extract", row["prompt"], re.S)
        text = match and match[1]
    if not isinstance(text, str) or not text.strip() or (
            type(given) not in (int, float) or given != given):  # NaN is not itself
        said = json.dumps(row, ensure_ascii=False, default=str)[:200]
        raise Bad("no text and score", f"{said}; a row needs a text, and a number as its score")
    if not -0.5 <= given <= 5.5:
        raise Bad("a score that is not from 0 to 5", given)
    return text, min(max(given, 0), 5)


def labeled(source: str, cfg: Config) -> Iterable[tuple[str, float]]:
    """The (text, score) pairs of a source."""
    if source == "builtin-scored":
        return builtin_scored(Config().data_seed)
    found = ANNOTATIONS.get(source) or locate(source)
    if isinstance(found, Hub) and source not in ANNOTATIONS:
        found = replace(found, columns=("text", "score"))
    return Documents(found if isinstance(found, Hub) else source, cfg, item=scored)


def f1(true: np.ndarray, guessed: np.ndarray) -> float:
    """F1 of two arrays of yes and no, which balances misses and false alarms:
    2 hits / (2 hits + misses + false alarms)."""
    hits, wrong = np.sum(true & guessed), np.sum(true != guessed)
    return float(2 * hits / max(1, 2 * hits + wrong))


def report(scores: Sequence[float], predicted: np.ndarray) -> Iterator[str]:
    """The figures of FineWeb-Edu's model card, as lines. Macro F1 is the mean of F1 over the scores that
    occur."""
    true, guessed = rounded(scores), rounded(predicted)
    macro = np.mean([f1(true == k, guessed == k) for k in np.union1d(true, guessed)])
    yield (f"accuracy {np.mean(true == guessed):.3f}   macro F1 {macro:.3f}   "
           f"mean squared error {np.mean((np.asarray(scores) - predicted)**2):.3f}")
    for least in LEAST.values():
        yield f"keeping {least} and more: F1 {f1(true >= least, guessed >= least):.3f}"
    yield "score   " + "".join(f"  guessed {k}" for k in range(6))
    for k in np.unique(true):
        yield f"{k:5}   " + "".join(f"{n:11,}" for n in np.bincount(guessed[true == k], minlength=6))


def train(args: argparse.Namespace) -> None:
    """Learn from 90% of the texts, and report how well the scores of the others are predicted."""
    out = Path(args.out)
    if out.suffix != ".safetensors" or not out.parent.is_dir():
        raise UserError(f"--out={out} must end in .safetensors, and its folder must exist")
    rows: dict[str, list] = {"train": [], "val": []}
    sources = [labeled(source, reading(args)) for source in args.source]  # misspelled ones are reported first
    for texts in sources:
        for text, given in tqdm(texts, "reading", unit=" texts", disable=None):
            rows[split_of(text, 0.1)].append((features(text), given))
        if isinstance(texts, Documents):
            print(account(**texts.state()))
    if min(map(len, rows.values())) == 0:
        raise UserError(f"{', '.join(args.source)}: {len(rows['train'])} texts to learn from and "
                        f"{len(rows['val'])} held out are too few")
    documents, scores = zip(*rows["train"])
    weight, bias = fit(documents, scores)
    save(out, weight, bias)
    print(f"learned from {len(rows['train']):,} texts; on {len(rows['val']):,} others:")
    predicted = [weight[index] @ value + bias for (index, value), _ in rows["val"]]
    print("\n".join(report([given for _, given in rows["val"]], np.array(predicted))))
    print(out)


def show_scores(args: argparse.Namespace) -> None:
    """How many texts of a source have each score, and how the first of them begins."""
    weight, bias = load(args.model)
    counts: Counter[int] = Counter()
    beginnings: dict[int, str] = {}
    documents = Documents(args.source, reading(args))
    for text in tqdm(documents, "scoring", unit=" texts", disable=None):
        guess = int(rounded(score(text, weight, bias)))
        counts[guess] += 1
        beginnings.setdefault(guess, " ".join(text.split())[:60])
    for guess, count in sorted(counts.items()):
        print(f"{guess}  {count:>12,}  {count / counts.total():6.1%}   {beginnings[guess]}")
    print(account(**documents.state()))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m curate.classifier", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train", help="learn from texts with scores")
    training.add_argument("source", nargs="+", help="as above; several are learned together")
    training.add_argument("--out", required=True, help="a .safetensors file; an old one is replaced")
    training.set_defaults(work=train)
    scoring = commands.add_parser("score", help="score the texts of a source")
    scoring.add_argument("source", help="a file, a folder, or another source that data.py reads")
    scoring.add_argument("--model", required=True, help="the file that train wrote")
    scoring.set_defaults(work=show_scores)
    for each in (training, scoring):
        add_reading_flags(each)
    training.set_defaults(on_bad="skip")  # annotations lack a score here and there
    args = parser.parse_args(argv)
    args.work(args)


if __name__ == "__main__":
    command(main, own_help=True)
