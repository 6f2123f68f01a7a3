"""
score.py: how likely a model finds continuations, many at once.

A multiple-choice question can be put to a model that has never learnt to answer: each choice is written
behind the question, and the model says how likely it is there, as the sum of the log-probabilities of its
tokens. What the choices have in common is read once. For that they stand in one row, like a tree:

    ids         Q  :  what  do  bees  make  ?  A  :  |  dark  honey  |  brown  bread  |  milk
    positions   0  1  2     3   4     5     6  7  8  |  9     10     |  9      10     |  9
    sees        all that stands to its left          |  the trunk, and its own branch

A mask hides the branches from each other, and each is told that it stands right behind the trunk. So a choice
costs as many positions as it has tokens of its own, and nothing is ever padded. Questions that fit into a row
together are read together, hidden from each other in the same way.                          next: eval.py
"""

from collections.abc import Iterator
from itertools import takewhile

import torch
from tqdm import tqdm

from config import UserError
from evals.benchmarks import Item
from cross_entropy import target_log_probs
from model import SmolLM, rope_tables
from tokenizer import Tokenizer

AT_ONCE = 512  # positions in a row of several questions; more would rather cost attention than save time

# T positions in a row, N = predicted tokens, C = d_model


def encoded(tok: Tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """(ids of both, how many of them belong to the continuation): "a b", " c" -> [a, b, c], 1

    A space belongs to the token of the word behind it. So the spaces that end a context go to the
    continuation, or the model would read a lone space, as it stands nowhere in what it was trained on, and
    then a word without one. And both are encoded as one text, cut where the context alone would end: a text
    that is encoded in two pieces may have tokens that it has not as a whole. Behind nothing stands what
    begins every document, <|endoftext|>. All of this is as lm-evaluation-harness does it.
    """
    before = tok.encode(context.rstrip())
    whole = [*before, *tok.encode(context + continuation)[len(before):]]
    n = max(1, len(whole) - len(before))  # 1: the continuation has become a part of the context's last token
    return (whole, n) if before else ([tok.eos_id, *whole], n)


def fitted(rows: list[tuple[list[int], int]], T: int) -> tuple[list, bool]:
    """(rows, whether a context was cut): (ids, n) as encoded(), their last T + 1 ids, of which T are read."""
    longest = max(n for _, n in rows)
    if longest > T:
        raise UserError(f"a choice of {longest} tokens does not fit into the {T} positions of this model: "
                        "leave its task out, or choose a smaller --limit")
    return [(ids[-T - 1:], n) for ids, n in rows], any(len(ids) > T + 1 for ids, _ in rows)


def tree(rows: list[tuple[list[int], int]]) -> tuple[list, list]:
    """The choices (ids, n) of a question as one row: [(id, position, branch), ...], and for each choice
    [(place in the row, the id that is predicted there), ...]. The trunk is branch 0.

    Of [1, 2, 3] and [1, 2, 4, 5] the row has 1, 2 and 4; the 2 predicts both the 3 and the 4.
    """
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*(ids[:-1] for ids, _ in rows)))
    trunk = [column[0] for column in alike]
    row, predicted = [(i, position, 0) for position, i in enumerate(trunk)], []
    for branch, (ids, n) in enumerate(rows, 1):
        jump = len(row) - len(trunk)  # from a position of this branch to its place in the row
        row += [(ids[position], position, branch) for position in range(len(trunk), len(ids) - 1)]
        last = range(len(ids) - 1 - n, len(ids) - 1)
        predicted.append([(at + jump * (at >= len(trunk)), ids[at + 1]) for at in last])
    return row, predicted


def rows_of(trees: list[tuple]) -> Iterator[list[tuple]]:
    """Lists of trees that have together at most AT_ONCE positions, or of one that is longer."""
    together: list[tuple] = []
    length = 0
    for one in trees:
        if together and length + len(one[0]) > AT_ONCE:
            yield together
            together, length = [], 0
        together, length = [*together, one], length + len(one[0])
    yield together


def score(model: SmolLM, trees: list[tuple]) -> list[list[float]]:
    """[[log-probability of each choice] of each tree], all trees in one row."""
    device = model.head.device
    flat = [(number, *entry) for number, (row, _) in enumerate(trees) for entry in row]
    question, ids, positions, branch = torch.tensor(flat, device=device).T                 # (T) each
    visible = (branch == 0) | (branch == branch[:, None])                                  # (T, T)
    mask = (visible & (question == question[:, None])).tril()
    rope = rope_tables(positions, model.cfg.head_dim, model.cfg.rope_theta)
    x = model.model.embed_tokens(ids)[None]                                                # (1, T, C)
    for layer in model.model.layers:
        x = layer(x, rope, mask)
    x = model.model.norm(x)[0]                                                             # (T, C)
    pairs, sizes, start = [], [], 0
    for row, predicted in trees:
        pairs += [(start + at, target) for choice in predicted for at, target in choice]
        sizes += [len(choice) for choice in predicted]
        start += len(row)
    at, targets = torch.tensor(pairs, device=device).T                                     # (N) each
    found = target_log_probs(x[at], model.head, targets).cpu().split(sizes)
    found = iter(part.sum().item() for part in found)
    return [[next(found) for _ in predicted] for _, predicted in trees]


@torch.inference_mode()
def log_likelihoods(model: SmolLM, tok: Tokenizer, items: list[Item]) -> tuple[list[list[float]], int]:
    """([log-probability of each choice] for each Item, how many Items had to lose the left of a context)."""
    trees, n_cut = [], 0
    for item in items:
        rows = [encoded(tok, context, choice) for context, choice in zip(item.contexts, item.choices)]
        rows, cut = fitted(rows, model.cfg.seq_len)
        trees.append(tree(rows))
        n_cut += cut
    found = []
    with tqdm(total=len(items), desc="reading", unit=" questions", disable=None, leave=False) as bar:
        for together in rows_of(trees):
            found += score(model, together)
            bar.update(len(together))
    return found, n_cut
