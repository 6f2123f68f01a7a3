"""
eval.py: what a model knows, in numbers.

    python eval.py out/demo/dpo --tasks=builtin

asks the questions of corpus/questions.py, which were held out of training, and reads the whole answers, each
token the most likely one (greedy): how many are right, how many ramble or do not end. Then what needs no
answer: whether the preferred one of two answers is the more likely one, and how many bits a byte of unseen
program text and documentation takes. Public benchmarks are multiple choice, the likeliest answer counts:

    python eval.py HuggingFaceTB/SmolLM-135M --tasks=hellaswag,arc_easy      corpus/benchmarks.py has them all
    python eval.py out/demo/dpo --tasks=text --text=texts/            loss, perplexity, bits per byte of texts

    acc         how often the right choice has the largest log-probability
    acc_norm    ... divided by the number of its characters, or short answers would be favoured
    +-          the standard error: so much would another sample of as many questions move the result

The table goes to the screen, and one line a task to eval.jsonl in the folder of the stage.  next: plot.py
"""

import argparse
import itertools
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from plumbing import checkpoint
import config
from config import Config, UserError
from evals import benchmarks
from evals.benchmarks import Item
from corpus.chats import chats
from corpus.conversations import pair_of
from corpus.documents import documents
from corpus.pairs import pairs
from evals.questions import Question, questions
from corpus.sources import Documents, locate
from data import split_of
from dpo import encoded, padded
from model import SmolLM
from plumbing.processes import pick_device
from sample import generate_many, shown, stops
from evals.score import log_likelihoods
from tokenizer import Tokenizer

OPEN = 60  # questions from chats, to see whether answers end; they are not judged otherwise
PAIRS = 300


def prompt_of(model: SmolLM, tok: Tokenizer, text: str, generation_prompt: bool = True) -> list[int]:
    """The ids of a question. A base model is asked as in the transcripts that it has read."""
    if model.stop_id == tok.eos_id:
        return tok.encode(f"User: {text}\nAssistant:")
    return tok.chat([{"role": "user", "content": text}], generation_prompt)[0]


def answers(model: SmolLM, tok: Tokenizer, prompts: list[list[int]], limit: int = 100) -> list[tuple]:
    """[(answer, whether it has an end)] for prompts (lists of int), greedily, equal lengths together."""
    ends = stops(model, tok)
    if model.stop_id == tok.eos_id:  # a transcript ends an answer by a new line
        ends |= {i for i, data in enumerate(tok.token_bytes) if b"\n" in data}
    found: dict[int, tuple] = {}
    by_length: dict[int, list[int]] = {}
    for number, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(number)
    for numbers in tqdm(by_length.values(), "asking", disable=None, leave=False):
        made: list[list[int]] = [[] for _ in numbers]
        for new in generate_many(model, [prompts[n] for n in numbers], limit, temperature=0):
            for ids, i in zip(made, new):
                ids.append(i)
            if all(ends & set(ids) for ids in made):
                break
        for number, ids in zip(numbers, made):
            said = list(itertools.takewhile(lambda i: i not in ends, ids))
            found[number] = tok.decode(said).strip(), len(said) < len(ids)
    return [found[number] for number in range(len(prompts))]


def sentences(text: str) -> int:
    return len(re.findall(r"[.!?](?=\s|$)", text))


def rambles(question: Question, text: str, ended: bool) -> bool:
    """Does an answer not end by itself, say nothing, or say more than is enough?"""
    return not ended or not text or sentences(text) > question.sentences


def ask_all(model: SmolLM, tok: Tokenizer, generation_prompt: bool, show: bool) -> dict[str, tuple[int, int]]:
    """{group: (right, n)} of all questions, and of the answers that ramble or do not end."""
    right, asked, too_long = Counter[str](), Counter[str](), []
    last = [[message["content"] for message in chat["messages"][-2:]] for chat in chats("eval", OPEN)]
    others = [Question("", text, "", sentences(good) + 1) for text, good in last]
    every = [*questions(), *others]
    prompts = [prompt_of(model, tok, question.text, generation_prompt) for question in every]
    for question, (text, ended) in zip(every, answers(model, tok, prompts)):
        good = question.is_right(text)
        asked[question.group] += 1
        right[question.group] += good
        too_long.append(rambles(question, text, ended))
        if show and question.group and (not good or too_long[-1]):
            print(f"{question.text}  ->  {shown(text)}")
    table = {group: (right[group], n) for group, n in asked.items() if group}
    return table | {"rambling or unfinished answers": (sum(too_long), len(too_long))}


@torch.no_grad()
def preferred(model: SmolLM, tok: Tokenizer) -> Tensor:
    """The log-probabilities of the chosen and the rejected answers of held-out pairs: (n, 2)."""
    found = []
    for pair in pairs("eval", PAIRS, held_out=True):
        rows = encoded(pair_of(pair), tok, model.cfg)
        found.append(model(*(tensor.to(model.head.device) for tensor in padded(rows))).sum(dim=1))
    return torch.stack(found)


def share_of_chosen(values: Tensor) -> float:
    """How often the chosen answer has the larger value: (n, 2) -> a share."""
    return (values[:, 0] > values[:, 1]).float().mean().item()


@torch.no_grad()
def text_loss(model: SmolLM, tok: Tokenizer, texts: Iterable[str]) -> tuple[float, int, int, int]:
    """(loss in nats, tokens, bytes, texts), summed, of texts that are read in rows of seq_len ids.

    Each text is closed by <|endoftext|>, which also counts as a token, and the next one follows.
    """
    T, ids, loss, total = model.cfg.seq_len, [tok.eos_id], 0.0, Counter[str]()
    for text in itertools.chain(texts, [None]):  # None: what is left is read, though it fills no row
        if text is not None:
            new = [*tok.encode(text), tok.eos_id]
            total.update(tokens=len(new), bytes=len(text.encode(errors="replace")), texts=1)
            ids += new
        done = len(ids) - 1 if text is None else (len(ids) - 1) // T * T
        for i in range(0, done, T):
            row = torch.tensor([ids[i:i + T + 1]], device=model.head.device)
            loss -= model(row[:, :-1], row[:, 1:]).sum().item()
        ids = ids[done:]
    return loss, total["tokens"], total["bytes"], total["texts"]


def bits_per_byte(model: SmolLM, tok: Tokenizer, texts: Iterable[str]) -> float:
    """How many bits the model needs for a byte of the texts, read in rows of seq_len ids."""
    loss, _, n_bytes, _ = text_loss(model, tok, texts)
    return loss / math.log(2) / n_bytes


def print_row(name: str, value: float, form: str, of: str) -> None:
    print(f"{name:42}  {value:{form}}   {of}")


def builtin(folder: Path, model: SmolLM, tok: Tokenizer, args: argparse.Namespace) -> dict[str, float]:
    """The built-in evaluation: {name: share or number}, printed as it is known."""
    results, facts = {}, folder / "train.json"
    trained = checkpoint.read_json(facts)["config"] if facts.exists() else {}
    is_dpo = folder.parent.name == "dpo" and trained.get("init_from")
    start = SmolLM.load(trained["init_from"]).to(model.head.device).eval() if is_dpo else None

    def report(name, value, form, of):
        results[name] = value
        print_row(name, value, form, of)

    for group, (count, n) in ask_all(model, tok, not args.no_generation_prompt, args.show).items():
        report(group, count / n, "6.1%", f"{count} of {n}")
    log_pi, of = preferred(model, tok), f"of {PAIRS} held-out pairs"
    report("preferred answer is the likelier one", share_of_chosen(log_pi), "6.1%", of)
    if start:
        report("reward accuracy", share_of_chosen(log_pi - preferred(start, tok)), "6.1%", of)
    for kind, what in (("code", "standard library, unseen files"), ("docs", "documentation, unseen")):
        seed, fraction = trained.get("data_seed", 42), trained.get("val_fraction", 0.02)
        texts = [text for text in documents(kind, seed) if split_of(text, fraction) == "val"]
        report(f"bits per byte, {what}", bits_per_byte(model, tok, texts), "6.3f",
               f"{sum(map(len, texts)):,} characters")
    return results


# ---------------------------------------------------------------------------------------------------------
# public benchmarks, and any text


def accuracies(items: list[Item], likelihoods: list[list[float]]) -> dict[str, float]:
    """{acc, acc_norm, and the standard error of both} of Items whose choices have these log-probabilities.

    The space before a choice is not one of its characters. The standard error is that of a mean of zeros
    and ones: their standard deviation, with n - 1, over the root of n.
    """
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for item, values in zip(items, likelihoods):
        per_character = [value / len(choice.removeprefix(" ")) for value, choice in zip(values, item.choices)]
        right["acc"].append(values.index(max(values)) == item.answer)
        right["acc_norm"].append(per_character.index(max(per_character)) == item.answer)
    results: dict[str, float] = {}
    n = len(items)
    for name, found in right.items():
        mean = sum(found) / n
        results |= {name: mean, f"{name}_stderr": math.sqrt(mean * (1 - mean) / max(1, n - 1))}
    return results


def choose(items: list[Item], model: SmolLM, tok: Tokenizer) -> dict[str, float]:
    """Multiple choice: {name: number}, printed."""
    likelihoods, n_cut = log_likelihoods(model, tok, items)
    results = accuracies(items, likelihoods)
    for name in ("acc", "acc_norm"):
        print_row(name, results[name], "6.1%",
                  f"+- {results[name + '_stderr']:.1%}, of {len(items):,} questions")
    if n_cut:
        print(f"longer than {model.cfg.seq_len} tokens, so only the end was read: {n_cut:,} questions")
    return {**results, "questions": len(items), "cut": n_cut}


def read_text(source: str, model: SmolLM, tok: Tokenizer, limit: int | None) -> dict:
    """Loss, perplexity and bits per byte of a source's texts: {name: number}, printed."""
    texts = tqdm(itertools.islice(Documents(source, Config()), limit), "reading", unit=" texts", disable=None,
                 leave=False)
    loss, tokens, n_bytes, n_texts = text_loss(model, tok, texts)
    if not n_texts:
        raise UserError(f"{source} holds no text")
    results = {"loss": loss / tokens, "perplexity": math.exp(min(loss / tokens, 700)),
               "bits per byte": loss / math.log(2) / n_bytes}
    for (name, value), of in zip(results.items(), ("nats a token", f"of {tokens:,} tokens",
                                                   f"of {n_bytes:,} bytes in {n_texts:,} texts")):
        print_row(name, value, "6.3f", of)
    return {**results, "source": source, "texts": n_texts, "tokens": tokens, "bytes": n_bytes}


TASKS = ("builtin", "text", *benchmarks.HUB)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for what makes no sense."""
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a step folder, a stage folder (its newest step), or a hub name")
    parser.add_argument("--tasks", default="builtin", help=f"any of {', '.join(TASKS)}, with commas between")
    parser.add_argument("--benchmarks", metavar="FOLDER", help="read FOLDER/hellaswag.jsonl or .parquet ..., "
                        "with the columns of the hub, and not the hub")
    parser.add_argument("--style", choices=benchmarks.PROMPTS, default="smollm",
                        help="the prompts of SmolLM's authors (default) or of lm-evaluation-harness")
    parser.add_argument("--text", metavar="SOURCE", help="of the task text: a file, a folder, or another "
                        "source that data.py takes")
    parser.add_argument("--limit", type=int, help="only the first LIMIT questions or texts of each task")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    parser.add_argument("--show", action="store_true", help="print the answers that are not good (builtin)")
    parser.add_argument("--no_generation_prompt", action="store_true", help="leave out the sign that it "
                        "is the model's turn, as the example on SmolLM-Instruct v0.1's card did (builtin)")
    args = parser.parse_args(argv)
    args.tasks = args.tasks.split(",")
    if unknown := sorted(set(args.tasks) - set(TASKS)):
        raise UserError(f"there is no task {', '.join(unknown)}: there are {', '.join(TASKS)}")
    if ("text" in args.tasks) != (args.text is not None):
        raise UserError("--tasks=text and --text=SOURCE need each other")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit={args.limit} makes no sense: it is a number of questions, 1 or more")
    if args.device not in ("auto", "cpu", "cuda", "mps"):
        raise UserError(f"--device={args.device} makes no sense: there are auto, cpu, cuda and mps")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    device, folder = pick_device(args.device), checkpoint.find(args.checkpoint)
    if args.text:
        locate(args.text)
    items = {task: benchmarks.items(task, args.style, args.benchmarks, args.limit)
             for task in args.tasks if task in benchmarks.HUB}  # a broken file is told before any work
    model, tok = SmolLM.load(folder).to(device).eval(), Tokenizer.load(folder)
    for task in args.tasks:
        print(f"{folder}: {task}" + (f", prompts of {args.style}" if task in items else ""))
        prompted = task == "builtin" and not args.no_generation_prompt
        line = {"checkpoint": folder.name, "task": task, "generation_prompt": prompted}
        began = time.perf_counter()
        if task == "builtin":
            results = builtin(folder, model, tok, args)
        elif task == "text":
            results = read_text(args.text, model, tok, args.limit)
        else:
            line["style"], results = args.style, choose(items[task], model, tok)
        line |= {"seconds": time.perf_counter() - began, **results}
        with open(folder.parent / "eval.jsonl", "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    config.command(main, own_help=True)
