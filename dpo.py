"""
dpo.py: from preferences to a model that acts on them (direct preference optimization, Rafailov et al. 2023).

For a prompt x there are two answers, y_w (it wins) and y_l (it loses). Train the model pi to make y_w more
likely and y_l less likely, measured from where it started, the reference pi_ref (the model after sft.py):

    L = -log sigmoid( beta * [ log( pi(y_w|x) / pi_ref(y_w|x) )  -  log( pi(y_l|x) / pi_ref(y_l|x) ) ] )

(their equation 7). pi(y|x) is the probability that the model gives the answer y to x. Where this comes from:

    suppose                 answers have rewards, and w beats l with probability sigmoid(reward_w - reward_l),
                            the Bradley-Terry model of chess ratings
    look for the pi with    the largest mean of reward - beta * log( pi / pi_ref ) over its answers: much
                            reward, not far from pi_ref (the mean of the logarithm is the distance KL)
    at the largest mean     it does not help to shift probability from one answer to another, so the
                            derivative of  pi * ( reward - beta * log( pi / pi_ref ) )  in pi, which is
                            reward - beta * log( pi / pi_ref ) - beta,  is the same for all answers to x
    that is                 pi = pi_ref * exp( reward / beta ), rescaled to add up to 1
    read backwards          reward = beta * log( pi / pi_ref ) + c(x)

(The example is enough at a first reading.) Let pi_ref give two answers 1/2 each, and let the reward of w be
larger by beta. Then pi is best at odds of e to 1, 73% and 27%: log( pi / pi_ref ) differs by 1, the reward by
beta * 1. So beta * log( pi / pi_ref ) deserves the name reward. In the difference of two, c(x) cancels, and L
is the surprise at who won.

At the start pi = pi_ref, both rewards are 0, and L = ln 2. Only the difference counts: L also falls when both
answers become less likely, the rejected one faster. So the log-probability of the chosen answers may well
fall while the model improves; the log shows it.

The reference makes answers comparable: a long one is unlikely from the start, and counts by how much it
gained. It never changes, so its log-probabilities are computed once and stored beside the tokens.

    python dpo.py config/demo_dpo.py            writes out/demo/dpo/step_.../         next: evals/questions.py
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import plumbing  # noqa: F401  # isort: skip  # before torch: it sets how threads wait

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import config
from config import Config, UserError
from corpus.conversations import SCHEMAS, pairs_of, preferences
from corpus.sources import READING, account, changed_code, code_digest, describe, split_of
from data import batch_rows, n_steps
from model import IGNORE, SmolLM
from plumbing import checkpoint, disk
from plumbing.processes import Run, command, start
from sft import PROMPTS, ask, load_chat_model
from tokenizer import Tokenizer
from train import fit

# B pairs, T positions; a batch has 2B rows: B chosen answers, then the B rejected ones

# ---------------------------------------------------------------------------------------------------------
# the loss


def dpo_loss(log_pi: Tensor, log_ref: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Equation 7 for each pair, and the rewards: log_pi, log_ref (2B,) -> losses, chosen, rejected (B,).

    log_pi and log_ref are sums of log-probabilities over the tokens of an answer, never means.
    """
    chosen, rejected = (beta * (log_pi - log_ref)).chunk(2)
    return -F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()


def loss_fn(model: nn.Module, batch: tuple[Tensor, ...], beta: float) -> tuple[Tensor, int, dict]:
    """(loss summed over pairs, number of pairs, what the log shows)."""
    ids, targets, doc, log_ref = batch
    log_pi = model(ids, targets, doc).sum(dim=1)                           # (2B,)
    losses, chosen, rejected = dpo_loss(log_pi, log_ref, beta)
    logp_chosen, logp_rejected = log_pi.detach().chunk(2)
    sums = {"accuracy": (chosen > rejected).sum(), "margin": (chosen - rejected).sum(),
            "chosen_reward": chosen.sum(), "rejected_reward": rejected.sum(),
            "chosen_logp": logp_chosen.sum(), "rejected_logp": logp_rejected.sum()}
    return losses.sum(), len(losses), sums


# ---------------------------------------------------------------------------------------------------------
# pairs -> batches


def encode_pair(pair: tuple, tok: Tokenizer, cfg: Config) -> tuple[list[tuple[list[int], list[int]]], str]:
    """(prompt, chosen, rejected) -> ([(ids, targets)] of both answers, what was cut: "", "prompt", ...).

    The prompt is no target. If a pair is too long, its prompt keeps the last dpo_max_prompt_length ids; if
    that is not enough, the answers keep their first ones. The longer answer decides for both, so that their
    prompts stay the same: SmolLM's rule.
    """
    prompt, *texts = pair
    question, _ = tok.chat(prompt, add_generation_prompt=True)
    answers, limit, cut = [[*tok.encode(text), tok.im_end_id] for text in texts], cfg.dpo_max_length, []
    longest = max(map(len, answers))
    if len(question) + longest > limit and len(question) > cfg.dpo_max_prompt_length:
        question = question[-cfg.dpo_max_prompt_length:]
        cut.append("prompt")
    if len(question) + longest > limit:
        answers = [answer[:limit - cfg.dpo_max_prompt_length] for answer in answers]
        cut.append("answers")
    return [(question + answer[:-1], [IGNORE] * (len(question) - 1) + answer) for answer in answers], \
        " and ".join(cut)


def pad_rows(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """[(ids, targets)] of unequal length -> ids, targets, doc (rows, T). Padding is on the right, where no
    answer sees it, and is no target."""
    T = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (T - len(row)) for row, _ in rows])
    targets = torch.tensor([row + [IGNORE] * (T - len(row)) for _, row in rows])
    return ids, targets, torch.zeros_like(ids)


class Pairs:
    """get_batch(split, i): micro-batch i of this device, (ids, targets, doc, log_ref) of 2B rows."""

    def __init__(self, cfg: Config, tok: Tokenizer, rank: int = 0, world: int = 1) -> None:
        self.cfg, self.rank, self.world = cfg, rank, world
        self.log_ref: dict[str, Tensor] = {}  # (n, 2) for each split
        path = prepare(cfg, tok)
        found = disk.read_json(path, {"train": [], "val": [], "sources": []})
        self.digest, self.sources = path.stem, found["sources"]
        self.said = changed_code(found.get("code"), CODE, path)
        self.pairs: dict[str, list] = {split: found[split] for split in ("train", "val")}
        if not self.pairs["train"]:
            raise UserError("there is no pair to train on:\n" + self.summary())

    def summary(self) -> str:
        """What went in, and for each source what was left out, and why."""
        lines = [f"  {split:5}  {len(pairs):,} pairs" for split, pairs in self.pairs.items()]
        lines += [account(**state) for state in self.sources]
        return "\n".join([*lines, self.said] if self.said else lines)

    def rows(self, split: str, places: Iterable[int]) -> tuple[Tensor, Tensor, Tensor]:
        pairs = [self.pairs[split][place] for place in places]
        return pad_rows([chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs])

    def __call__(self, split: str, i: int) -> tuple[Tensor, ...] | None:
        places = batch_rows(self.cfg, split, i, self.rank, self.world, len(self.pairs[split]))
        if not places:
            return None
        log_ref = self.log_ref[split][places]                              # (B, 2)
        return *self.rows(split, places), log_ref.T.flatten()              # chosen first, then rejected

    @torch.no_grad()
    def compute_reference(self, model: SmolLM, run: Run) -> None:
        """Compute log_ref with the model before its first step, shared out over all processes, or read it."""
        shape = [getattr(model.cfg, name) for name in checkpoint.SHAPE]
        weights = hashlib.blake2b(json.dumps([run.dtype, shape, code_digest("model.py")]).encode())
        for weight in model.state_dict().values():
            weights.update(weight.numpy().tobytes())
        name = f"reference-{weights.hexdigest()[:10]}-{self.digest}.safetensors"
        path = Path(self.cfg.out_dir) / "data" / name
        if path.exists():
            self.log_ref = disk.read_tensors(path)
            return
        model.to(run.device)
        B = self.cfg.micro_batch
        for split, pairs in self.pairs.items():
            log_ref, mine = torch.zeros(len(pairs), 2), range(run.rank, len(pairs), run.world)
            for i in tqdm(range(0, len(mine), B), f"reference, {split}", disable=run.rank > 0 or None):
                with run.autocast():
                    log_pi = model(*run.move(self.rows(split, mine[i:i + B]))).sum(dim=1)
                log_ref[mine[i:i + B]] = log_pi.float().view(2, -1).T.cpu()
            self.log_ref[split] = run.sum(log_ref).cpu()
        if run.rank == 0:
            disk.write_tensors(path, self.log_ref)


# ---------------------------------------------------------------------------------------------------------
# the pairs of a run: files and messages; skip the rest at a first reading


CODE = (*READING, *SCHEMAS, "tokenizer.py", "dpo.py")  # what makes pairs of records


def pairs_file(cfg: Config, tok: Tokenizer) -> Path:
    """The file of the encoded pairs. Its name hashes all they depend on, so stale ones are never read."""
    sources = [[describe(source, cfg), fraction] for source, fraction in cfg.data]
    recipe = json.dumps([sources, tok.digest(), cfg.data_seed, cfg.val_fraction, cfg.dpo_max_length,
                         cfg.dpo_max_prompt_length, cfg.ignore, tok.template])
    return Path(cfg.out_dir) / "data" / f"pairs-{hashlib.sha256(recipe.encode()).hexdigest()[:10]}.json"


def prepare(cfg: Config, tok: Tokenizer) -> Path:
    """Encode all pairs of a config, unless that is done; returns their file.

    A pair whose answers are the same, or became so by cutting, teaches nothing. AdamW would still take full
    steps along the rounding errors of its gradient, so it is left out.
    """
    path = pairs_file(cfg, tok)
    if path.exists():
        return path
    pairs: dict[str, list] = {"train": [], "val": []}
    readers = preferences(cfg)
    for documents in readers:
        for pair in tqdm(pairs_of(documents), "reading pairs", unit=" pairs", disable=None):
            rows, cut = encode_pair(pair, tok, cfg)
            if rows[0] == rows[1]:
                documents.left_out["the two answers are the same" + (" after the cut" if cut else "")] += 1
                continue
            if cut:
                documents.notes[f"lost a part of their {cut}, by dpo_max_length={cfg.dpo_max_length} and "
                                f"dpo_max_prompt_length={cfg.dpo_max_prompt_length}"] += 1
            # split by the prompt: pairs with the same prompt are on the same side
            pairs[split_of(pair[0], cfg.val_fraction)].append(rows)
    states = [documents.state() for documents in readers]
    disk.write_text(path, json.dumps({**pairs, "sources": states, "code": code_digest(*CODE)}))
    return path


def main(argv: list[str]) -> None:
    cfg = config.load(argv)
    if cfg.dpo_max_length > cfg.seq_len:
        raise UserError(f"dpo_max_length={cfg.dpo_max_length} must be at most seq_len={cfg.seq_len}")
    with start("dpo", cfg) as run:
        cfg, model, tok = load_chat_model(cfg, "dpo")
        run.rank_0_first(lambda: prepare(cfg, tok))
        pairs = Pairs(cfg, tok, run.rank, run.world)
        pairs.compute_reference(model, run)
        cfg = replace(cfg, max_steps=cfg.max_steps or n_steps(cfg, len(pairs.pairs["train"])))
        run.say(f"{pairs.summary()}\n{cfg.length} from {cfg.init_from}")
        fit(cfg, run, model, tok, pairs, partial(loss_fn, beta=cfg.dpo_beta),
            {text: ask(tok, text) for text in PROMPTS})


if __name__ == "__main__":
    command(main)
