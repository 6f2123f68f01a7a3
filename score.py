"""
score.py: how likely a model finds continuations, many at once.

A multiple-choice question can be put to a model that has never learnt to answer: each choice is written
behind the question, and the model says how likely it is there, as the sum of the log-probabilities of its
tokens. What the choices of a question have in common is read once, and its keys and values are kept:

    Question: What do bees make?⏎Answer:  --+--  honey      -3.1   the choice of the model
                                            +--  bread      -5.2
             read once                      +--  a nest     -7.9

Several questions are read together. Sorted by length they begin alike; what is longer than the shortest of
them is read with its choices. So nothing is padded but the ends of choices, and nobody looks back from there.
                                                                                             next: eval.py
"""

from itertools import takewhile

import torch
from tqdm import tqdm

from config import UserError
from model import IGNORE, KVCache

AT_ONCE = 2048  # positions that are read together: what the cache and the logits of the choices take

# Q questions, R = rows, one for each choice of each question, T positions


def encoded(tok, context, continuation):
    """(ids of both, how many of them belong to the continuation): "a b", " c" -> [a, b, c], 1

    A space belongs to the token of the word behind it. So the spaces that end a context go to the
    continuation, or the model would read a lone space, as it stands nowhere in what it was trained on, and
    then a word without one. And both are encoded as one text, cut where the context alone would end: a text
    that is encoded in two pieces may have tokens that it has not as a whole. Behind nothing stands what
    begins every document, <|endoftext|>. All of this is as lm-evaluation-harness does it.
    """
    bare = context.rstrip()
    before = tok.encode(bare)
    whole = [*before, *tok.encode(context + continuation)[len(before):]]
    n = max(1, len(whole) - len(before))  # 1: the continuation has become a part of the context's last token
    return (whole, n) if before else ([tok.eos_id, *whole], n)


def fitted(rows, T):
    """(rows, whether a context was cut): (ids, n) as encoded(), their last T + 1 ids, of which T are read."""
    longest = max(n for _, n in rows)
    if longest > T:
        raise UserError(f"a choice of {longest} tokens does not fit into the {T} positions of this model: "
                        "leave its task out, or choose a smaller --limit")
    return [(ids[-T - 1:], n) for ids, n in rows], any(len(ids) > T + 1 for ids, _ in rows)


def shared(rows):
    """How many ids all rows (ids, n) begin with, at most up to the id that the first continuation follows."""
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*(ids for ids, _ in rows)))
    return min(sum(1 for _ in alike), *(len(ids) - n - 1 for ids, n in rows))


def batches(questions):
    """The numbers of the questions (lists of rows) in batches of about AT_ONCE positions, longest first."""
    batch, n_rows, longest = [], 0, 0
    for number in sorted(range(len(questions)), key=lambda i: -shared(questions[i])):
        rows = questions[number]
        length = max(len(ids) for ids, _ in rows)
        if batch and (n_rows + len(rows)) * max(longest, length) > AT_ONCE:
            yield batch
            batch, n_rows, longest = [], 0, 0
        batch, n_rows, longest = [*batch, number], n_rows + len(rows), max(longest, length)
    if batch:
        yield batch


def read_once(model, questions, start, length):
    """A cache of R rows for `length` positions, with the first `start` ids of each question in its rows."""
    like = next(model.parameters())
    once = KVCache(model.cfg, len(questions), start, like.device, like.dtype)
    if start:
        model.model(torch.tensor([rows[0][0][:start] for rows in questions], device=like.device), cache=once)
    n_choices = torch.tensor([len(rows) for rows in questions], device=like.device)
    cache = KVCache(model.cfg, int(n_choices.sum()), length, like.device, like.dtype)
    cache.keys[:, :, :, :start] = once.keys.repeat_interleave(n_choices, dim=1)
    cache.values[:, :, :, :start] = once.values.repeat_interleave(n_choices, dim=1)
    cache.length = start
    return cache


def score(model, questions):
    """Log-probabilities of the continuations of some questions, lists of rows (ids, n): a list for each."""
    start = min(map(shared, questions))
    rows = [(ids[start:], n) for rows in questions for ids, n in rows]
    T = max(len(ids) for ids, _ in rows) - 1
    inputs, targets = torch.zeros(len(rows), T, dtype=torch.long), torch.full((len(rows), T), IGNORE)
    for row, (ids, n) in enumerate(rows):
        inputs[row, :len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, len(ids) - 1 - n:len(ids) - 1] = torch.tensor(ids[-n:])
    cache = read_once(model, questions, start, start + T)
    device = cache.keys.device
    sums = model(inputs.to(device), targets.to(device), cache=cache).sum(dim=1)            # (R)
    return [part.tolist() for part in sums.split([len(rows) for rows in questions])]


@torch.inference_mode()
def log_likelihoods(model, tok, items):
    """([log-probability of each choice] for each Item, how many Items had to lose the left of a context)."""
    questions, n_cut = [], 0
    for item in items:
        rows = [encoded(tok, context, choice) for context, choice in zip(item.contexts, item.choices)]
        rows, cut = fitted(rows, model.cfg.seq_len)
        questions.append(rows)
        n_cut += cut
    found = [None] * len(questions)
    with tqdm(total=len(items), desc="reading", unit=" questions", disable=None, leave=False) as bar:
        for batch in batches(questions):
            for number, values in zip(batch, score(model, [questions[number] for number in batch])):
                found[number] = values
            bar.update(len(batch))
    return found, n_cut
