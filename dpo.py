"""
dpo.py: from preferences to a model that acts on them (Rafailov et al. 2023, direct preference optimization).

Of two answers to one prompt people preferred y_w to y_l. The model pi shall make y_w more likely and y_l
less, measured from where it started, the reference pi_ref (the model after sft.py):

    L = -log sigmoid( beta * [ log pi(y_w|x) / pi_ref(y_w|x)  -  log pi(y_l|x) / pi_ref(y_l|x) ] )     (eq. 7)

beta * log pi / pi_ref is the answer's *reward*. At the start pi = pi_ref, both rewards are 0, and L = ln 2.
Only the difference counts: L also falls when both answers become less likely, the rejected one faster. So the
log-probability of chosen answers may well sink while the model improves; the log shows it.

The reference never changes. Its log-probabilities are computed once and kept beside the tokens.

    python dpo.py config/demo_dpo.py            writes out/demo/dpo/step_.../                 next: eval.py
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from plumbing import checkpoint
import config
from config import Config, UserError
from corpus.conversations import preferences
from data import split_of
from mixture import drawn
from model import IGNORE, SmolLM
from plumbing.processes import Run, start
from sft import PROMPTS, ask, chat_model
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


def encoded(pair: tuple, tok: Tokenizer, cfg: Config) -> list[tuple[list[int], list[int]]]:
    """(prompt, chosen, rejected) -> [(ids, targets)] of both answers, the prompt being no target.

    Too long, the prompt keeps its last dpo_max_prompt_length ids; if that is not enough, the answers keep
    their first ones. Both sides are cut by the longer answer, so their prompts stay the same: SmolLM's rule.
    """
    prompt, *answers = pair
    sides = []
    for answer in answers:
        ids, mask = tok.chat([*prompt, {"role": "assistant", "content": answer}])
        last = prompt_ends = len(ids) - mask[::-1].index(True)             # behind the last target
        while mask[prompt_ends - 1]:
            prompt_ends -= 1
        sides.append((ids[:prompt_ends], ids[prompt_ends:last]))
    longest, limit = max(len(answer) for _, answer in sides), cfg.dpo_max_length
    rows = []
    for question, answer in sides:
        if len(question) + longest > limit:
            question = question[-cfg.dpo_max_prompt_length:]
        if len(question) + longest > limit:
            answer = answer[:limit - cfg.dpo_max_prompt_length]
        rows.append((question + answer[:-1], [IGNORE] * (len(question) - 1) + answer))
    return rows


def padded(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """[(ids, targets)] of unequal length -> ids, targets, doc (rows, T): padding stands on the right, where
    no answer sees it, and is no target."""
    T = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (T - len(row)) for row, _ in rows])
    targets = torch.tensor([row + [IGNORE] * (T - len(row)) for _, row in rows])
    return ids, targets, torch.zeros_like(ids)


class Pairs:
    """get_batch(split, i): micro-batch i of this device, (ids, targets, doc, log_ref) of 2B rows."""

    def __init__(self, cfg: Config, tok: Tokenizer, rank: int = 0, world: int = 1) -> None:
        self.cfg, self.rank, self.world = cfg, rank, world
        self.log_ref: dict[str, Tensor] = {}
        self.pairs: dict[str, list] = {"train": [], "val": []}
        for pair in tqdm(preferences(cfg), "reading pairs", unit=" pairs", disable=rank > 0 or None):
            split = split_of(pair[0], cfg.val_fraction)  # a prompt is on one side only
            self.pairs[split].append(encoded(pair, tok, cfg))
        if not self.pairs["train"]:
            raise UserError(f"there is no pair to train on in {', '.join(cfg.sources)}")

    def rows(self, split: str, numbers: Iterable[int]) -> tuple[Tensor, Tensor, Tensor]:
        some = [self.pairs[split][n] for n in numbers]
        return padded([chosen for chosen, _ in some] + [rejected for _, rejected in some])

    def __call__(self, split: str, i: int) -> tuple[Tensor, ...] | None:
        n, B = len(self.pairs[split]), self.cfg.micro_batch
        if not n:
            return None
        first = (i * self.world + self.rank) * B
        some = [drawn(d, n, self.cfg.data_seed, split) for d in range(first, first + B)]
        return *self.rows(split, some), self.log_ref[split][some].T.flatten()

    def steps(self) -> int:
        """How many steps cfg.epochs passes over all pairs take."""
        return max(1, math.ceil(self.cfg.epochs * len(self.pairs["train"]) / self.cfg.batch))

    @torch.no_grad()
    def refer(self, model: SmolLM, run: Run) -> None:
        """Fill log_ref, (n, 2) for each split: what the model as it is now, the reference, says of them."""
        digest = hashlib.sha256(json.dumps([self.cfg.dtype, self.pairs]).encode())
        for weight in model.state_dict().values():
            digest.update(weight.numpy().tobytes())
        path = Path(self.cfg.out_dir) / "data" / f"reference-{digest.hexdigest()[:10]}.safetensors"
        if path.exists():
            self.log_ref = checkpoint.read_tensors(path)
            return
        model.to(run.device)
        for split, pairs in self.pairs.items():
            sums = [torch.zeros(0, 2)]
            for i in tqdm(range(0, len(pairs), self.cfg.micro_batch), f"reference, {split}",
                          disable=run.rank > 0 or None):
                batch = run.move(self.rows(split, range(i, min(i + self.cfg.micro_batch, len(pairs)))))
                with run.autocast():
                    log_ref = model(*batch).sum(dim=1)                     # (2B,)
                sums.append(log_ref.float().view(2, -1).T.cpu())
            self.log_ref[split] = torch.cat(sums)
        if run.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.write_tensors(path, self.log_ref)


def main(argv: list[str]) -> None:
    cfg = config.load(argv)
    if cfg.dpo_max_length > cfg.seq_len:
        raise UserError(f"dpo_max_length={cfg.dpo_max_length} must be at most seq_len={cfg.seq_len}")
    with start("dpo", cfg) as run:
        cfg, model, tok = chat_model(cfg)
        run.prompts = {text: ask(tok, text) for text in PROMPTS}
        pairs = Pairs(cfg, tok, run.rank, run.world)
        pairs.refer(model, run)
        run.cfg = cfg = replace(cfg, max_steps=cfg.max_steps or pairs.steps())
        run.say(f"{len(pairs.pairs['train']):,} pairs, {len(pairs.pairs['val']):,} to validate: "
                f"{cfg.max_steps:,} steps from {cfg.init_from}")
        fit(cfg, run, model, tok, (pairs, partial(loss_fn, beta=cfg.dpo_beta)))


if __name__ == "__main__":
    config.command(main)
