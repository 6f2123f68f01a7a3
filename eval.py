"""
eval.py: what a model knows, in numbers.

    python eval.py out/demo/dpo --tasks=builtin

asks the questions of corpus/questions.py, which were held out of training, and reads the whole answers, each
token the most likely one (greedy): how many are right, how many ramble or do not end. Then what needs no
answer: whether the preferred one of two answers is the more likely one, and how many bits a byte of unseen
program text and documentation takes. The table goes to the screen, and one line to eval.jsonl in the folder
of the stage.                                                                                next: plot.py
"""

import argparse
import itertools
import json
import math
import re
import time
from collections import Counter

import torch
from tqdm import tqdm

import checkpoint
import config
from config import UserError
from corpus.chats import chats
from corpus.conversations import pair_of
from corpus.documents import documents
from corpus.pairs import pairs
from corpus.questions import Question, questions
from data import split_of
from dpo import encoded, padded
from model import SmolLM
from sample import generate_many
from tokenizer import Tokenizer

OPEN = 60  # questions from chats, to see whether answers end; they are not judged otherwise
PAIRS = 300


def prompt_of(model, tok, text, generation_prompt=True):
    """The ids of a question. A base model is asked as in the transcripts that it has read."""
    if model.stop_id == tok.eos_id:
        return tok.encode(f"User: {text}\nAssistant:")
    return tok.chat([{"role": "user", "content": text}], generation_prompt)[0]


def answers(model, tok, prompts, limit=100):
    """[(answer, whether it has an end)] for prompts (lists of int), greedily, equal lengths together."""
    stops = {tok.eos_id, model.stop_id}
    if model.stop_id == tok.eos_id:  # a transcript ends an answer by a new line
        stops |= {i for i, data in enumerate(tok.token_bytes) if b"\n" in data}
    found, by_length = {}, {}
    for number, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(number)
    for numbers in tqdm(by_length.values(), "asking", disable=None, leave=False):
        made = [[] for _ in numbers]
        for new in generate_many(model, [prompts[n] for n in numbers], limit, temperature=0):
            for ids, i in zip(made, new):
                ids.append(i)
            if all(stops & set(ids) for ids in made):
                break
        for number, ids in zip(numbers, made):
            said = list(itertools.takewhile(lambda i: i not in stops, ids))
            found[number] = tok.decode(said).strip(), len(said) < len(ids)
    return [found[number] for number in range(len(prompts))]


def sentences(text):
    return len(re.findall(r"[.!?](?=\s|$)", text))


def rambles(question, text, ended):
    """Does an answer not end by itself, say nothing, or say more than is enough?"""
    return not ended or not text or sentences(text) > question.sentences


def ask_all(model, tok, generation_prompt, show):
    """{group: (right, n)} of all questions, and of the answers that ramble or do not end."""
    right, asked, too_long = Counter(), Counter(), []
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
            print(f"{question.text}  ->  {text}")
    table = {group: (right[group], n) for group, n in asked.items() if group}
    return table | {"rambling or unfinished answers": (sum(too_long), len(too_long))}


@torch.no_grad()
def preferred(model, tok):
    """The log-probabilities of the chosen and the rejected answers of held-out pairs: (n, 2)."""
    found = []
    for pair in pairs("eval", PAIRS, held_out=True):
        rows = encoded(pair_of(pair), tok, model.cfg)
        found.append(model(*padded(rows)).sum(dim=1))
    return torch.stack(found)


def share_of_chosen(values):
    """How often the chosen answer has the larger value: (n, 2) -> a share."""
    return (values[:, 0] > values[:, 1]).float().mean().item()


@torch.no_grad()
def bits_per_byte(model, tok, texts):
    """How many bits the model needs for a byte of the texts, read in rows of seq_len ids."""
    T, ids, loss = model.cfg.seq_len, [tok.eos_id], 0.0
    for text in texts:
        ids += [*tok.encode(text), tok.eos_id]
    for i in range(0, len(ids) - 1, T):
        row = torch.tensor([ids[i:i + T + 1]])
        loss -= model(row[:, :-1], row[:, 1:]).sum().item()
    return loss / math.log(2) / sum(len(text.encode()) for text in texts)


def builtin(folder, model, tok, args):
    """The built-in evaluation: {name: share or number}, printed as it is known."""
    results = {}

    def report(name, value, form, of):
        results[name] = value
        print(f"{name:42}  {value:{form}}   {of}")

    for group, (count, n) in ask_all(model, tok, not args.no_generation_prompt, args.show).items():
        report(group, count / n, "6.1%", f"{count} of {n}")
    facts = folder / "train.json"
    trained = checkpoint.read_json(facts)["config"] if facts.exists() else {}
    log_pi, of = preferred(model, tok), f"of {PAIRS} held-out pairs"
    report("preferred answer is the likelier one", share_of_chosen(log_pi), "6.1%", of)
    if folder.parent.name == "dpo" and trained.get("init_from"):
        start = SmolLM.load(trained["init_from"]).eval()
        report("reward accuracy", share_of_chosen(log_pi - preferred(start, tok)), "6.1%", of)
    for kind, what in (("code", "standard library, unseen files"), ("docs", "documentation, unseen")):
        seed, fraction = trained.get("data_seed", 42), trained.get("val_fraction", 0.02)
        texts = [text for text in documents(kind, seed) if split_of(text.encode(), fraction) == "val"]
        report(f"bits per byte, {what}", bits_per_byte(model, tok, texts), "6.3f",
               f"{sum(map(len, texts)):,} characters")
    return results


TASKS = {"builtin": builtin}


def main(argv):
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a step folder, a stage folder (its newest step), or a hub name")
    parser.add_argument("--tasks", default="builtin", help=f"any of {', '.join(TASKS)}, with commas between")
    parser.add_argument("--show", action="store_true", help="print the answers that are not good")
    parser.add_argument("--no_generation_prompt", action="store_true", help="leave out the sign that it "
                        "is the model's turn, as the example on SmolLM-Instruct v0.1's card did")
    args = parser.parse_args(argv)
    if unknown := set(args.tasks.split(",")) - set(TASKS):
        raise UserError(f"there is no task {', '.join(sorted(unknown))}: there are {', '.join(TASKS)}")
    folder = checkpoint.find(args.checkpoint)
    model, tok = SmolLM.load(folder).eval(), Tokenizer.load(folder)
    began = time.perf_counter()
    for task in args.tasks.split(","):
        print(f"{folder}: {task}")
        results = TASKS[task](folder, model, tok, args)
        line = {"checkpoint": folder.name, "task": task, "generation_prompt": not args.no_generation_prompt,
                "seconds": time.perf_counter() - began, **results}
        with open(folder.parent / "eval.jsonl", "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    config.command(main, own_help=True)
