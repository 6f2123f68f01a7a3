"""
evals/score.py: how likely a model finds a continuation, an answer, a text. Nothing is generated here.

A multiple-choice question can be put to a model that has never learned to answer. Each choice is written
after the question, and its score is the sum of the log-probabilities of its tokens:

    context   Q: what do bees make? A:       read once, its keys and values are kept in a cache (model.py)
    choices   dark honey                     one row each, all after the same context;
              brown bread                    short rows are padded on the right,
              milk ·                         and what is padded (·) is no target

The same log-probabilities say how many bits a model needs per byte of a text: a good model compresses.
"""

import math
from collections.abc import Iterable
from os.path import commonprefix

import torch
from torch import Tensor
from tqdm import tqdm

from config import Config, UserError
from corpus.conversations import pair_of
from corpus.pairs import pairs
from corpus.sources import Documents, split_of
from dpo import encode_pair, pad_rows
from evals.benchmarks import Item
from model import IGNORE, KVCache, SmolLM, log_probs
from tokenizer import Tokenizer

PAIRS = 300

# n choices, T positions, C = d_model

# ---------------------------------------------------------------------------------------------------------
# multiple choice


def encode_choice(tok: Tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """(ids of both, how many of them belong to the continuation): "a b", " c" -> [a, b, c], 1

    A space belongs to the token of the word that follows it. So spaces at the end of a context move to the
    continuation. Otherwise the model would read a lone space, which never occurs in its training text, and
    then a word without one. And both are encoded as one text, cut where the context alone would end, since a
    text encoded in two pieces may have tokens that it does not have as a whole. An empty context becomes
    <|endoftext|>, after which every document begins. All of this is as in lm-evaluation-harness.
    """
    before = tok.encode(context.rstrip())
    ids = [*before, *tok.encode(context + continuation)[len(before):]]
    n = max(1, len(ids) - len(before))  # 1: the continuation has become part of the context's last token
    return (ids, n) if before else ([tok.eos_id, *ids], n)


def cut_contexts(rows: list[tuple[list[int], int]], T: int) -> tuple[list[tuple[list[int], int]], bool]:
    """(rows of at most T + 1 ids, whether a context was cut). Of T + 1 ids the last is only predicted."""
    longest = max(n for _, n in rows)
    if longest > T:
        raise UserError(f"a choice of {longest} tokens does not fit into the {T} positions of this model: "
                        "leave its task out, or choose a smaller --limit")
    return [(ids[-T - 1:], n) for ids, n in rows], any(len(ids) > T + 1 for ids, _ in rows)


def score_choices(model: SmolLM, rows: list[tuple[list[int], int]]) -> list[float]:
    """The log-probability of each choice of one question. rows: (ids, n) as encode_choice returns them.

    What the rows have in common is read once. Reading several questions in one batch would suit a GPU better.
    """
    device = model.head.device
    shared = min(len(commonprefix([ids for ids, _ in rows])), *(len(ids) - n - 1 for ids, n in rows))
    choices = [(ids[shared:-1], [IGNORE] * (len(ids) - shared - 1 - n) + ids[-n:]) for ids, n in rows]
    ids, targets, _ = (tensor.to(device) for tensor in pad_rows(choices))                   # (n, T) each
    cache = KVCache(model.cfg, len(rows), shared + ids.shape[1], device, model.head.dtype)
    if shared:
        prefix = KVCache(model.cfg, 1, shared, device, model.head.dtype)
        model.model(torch.tensor([rows[0][0][:shared]], device=device), cache=prefix)
        cache.keys[..., :shared, :], cache.values[..., :shared, :] = prefix.keys, prefix.values
        cache.length = shared
    x = model.model(ids, cache=cache)                                                       # (n, T, C)
    learned = targets != IGNORE
    log_p = torch.zeros(targets.shape, device=device)
    log_p[learned] = log_probs(x[learned], model.head, targets[learned])
    return log_p.sum(dim=1).tolist()


@torch.inference_mode()
def log_likelihoods(model: SmolLM, tok: Tokenizer, items: list[Item]) -> tuple[list[list[float]], int]:
    """([log-probability of each choice] for each Item, how many Items lost the left end of a context)."""
    questions, n_cut = [], 0
    for item in items:
        rows = [encode_choice(tok, context, choice) for context, choice in zip(item.contexts, item.choices)]
        rows, is_cut = cut_contexts(rows, model.cfg.seq_len)
        questions.append(rows)
        n_cut += is_cut
    bar = tqdm(questions, "reading", unit=" questions", disable=None, leave=False)
    return [score_choices(model, rows) for rows in bar], n_cut


def accuracies(items: list[Item], likelihoods: list[list[float]]) -> dict[str, float]:
    """{acc, acc_norm, and the standard error of both} of Items whose choices have these log-probabilities.

    The space before a choice does not count as one of its characters. The standard error is that of a mean of
    zeros and ones: their standard deviation, with n - 1, divided by the square root of n.
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


# ---------------------------------------------------------------------------------------------------------
# preferences


@torch.inference_mode()
def score_pairs(model: SmolLM, tok: Tokenizer) -> Tensor:
    """The log-probabilities of the chosen and the rejected answers of held-out pairs: (n, 2)."""
    found = []
    for pair in pairs("eval", PAIRS, held_out=True):
        rows = pad_rows(encode_pair(pair_of(pair), tok, model.cfg)[0])
        found.append(model(*(tensor.to(model.head.device) for tensor in rows)).sum(dim=1))
    return torch.stack(found)


def share_of_chosen(values: Tensor) -> float:
    """How often the chosen answer has the larger value: (n, 2) -> a share."""
    return (values[:, 0] > values[:, 1]).float().mean().item()


# ---------------------------------------------------------------------------------------------------------
# texts


def unseen_texts(source: str, held_out: float) -> list[str]:
    """The texts of a source that no stage trained on, cleaned as data.py cleans them.

    held_out: the fraction that all stages held out, as plumbing.checkpoint.held_out says.
    """
    return [text for text in Documents(source, Config()) if split_of(text, held_out) == "val"]


@torch.inference_mode()
def text_losses(model: SmolLM, tok: Tokenizer, texts: Iterable[str]) -> Tensor:
    """(loss in nats, tokens, bytes) of each text: (n, 3), float64.

    Texts follow each other in rows of up to T + 1 ids, as in training. Each is closed by <|endoftext|>, which
    counts as one of its tokens. Nothing is kept of a text but its three numbers.
    """
    T = model.cfg.seq_len
    totals: list = []
    ids: list[int] = [tok.eos_id]
    owners: list[int] = []  # ids[t + 1] belongs to text owners[t]

    def read(row: list[int], owner: list[int]) -> None:
        inputs, targets = torch.tensor([row[:-1], row[1:]], device=model.head.device)[:, None]  # (1, T) each
        ends = (inputs == tok.eos_id).long()
        doc = ends.cumsum(1) - ends  # as in data.py: END belongs to the document that it closes
        for text, log_p in zip(owner, model(inputs, targets, doc)[0].tolist()):
            totals[text][0] -= log_p

    for index, text in enumerate(texts):
        new = [*tok.encode(text), tok.eos_id]
        totals.append([0.0, len(new), len(text.encode(errors="replace"))])
        ids, owners = ids + new, owners + [index] * len(new)
        done = len(owners) // T * T
        for start in range(0, done, T):
            read(ids[start:start + T + 1], owners[start:start + T])
        ids, owners = ids[done:], owners[done:]
    if owners:
        read(ids, owners)  # what is left does not fill a row
    return torch.tensor(totals, dtype=torch.float64).view(-1, 3)


def bits_per_byte(losses: Tensor) -> tuple[float, float]:
    """(bits per byte of all texts together, its standard error) from what text_losses returns.

    r = sum of losses / sum of bytes is a ratio of two sums, so its standard error comes from how far each
    text's loss is from r times its bytes: sqrt(n / (n - 1) * sum (loss - r * bytes)^2) / sum of bytes.
    """
    loss, _, n_bytes = losses.unbind(dim=1)
    n, r = len(loss), loss.sum() / n_bytes.sum()
    error = (n / max(1, n - 1) * (loss - r * n_bytes).square().sum()).sqrt() / n_bytes.sum()
    return r.item() / math.log(2), error.item() / math.log(2)
