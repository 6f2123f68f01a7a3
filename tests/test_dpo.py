"""dpo.py: the loss against TRL and a formula in float64; truncation; the reference; a whole run."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY
from test_sft import at_home, chat_cfg, flags  # noqa: F401  fixtures

import dpo
import sft
from config import Config, UserError
from corpus.conversations import exchange
from dpo import Pairs, dpo_loss, encode_pair, loss_fn, pad_rows
from model import IGNORE, SmolLM
from plumbing import checkpoint
from plumbing.processes import Run
from tokenizer import Tokenizer

CFG = Config(**TINY, seq_len=128, init_std=0.3, dpo_max_length=128, dpo_max_prompt_length=64)
PAIRS = [
    (exchange("the cat sat", "x")[:1], "a mat", "the dog run over green hills while rain fell"),
    (exchange("a", "x")[:1], "the rain fell softly and the cat saw", "green"),
    ([*exchange("the dog", "a mat and the cat"), *exchange("over hills", "x")[:1]], "softly", "rain rain"),
]


def batch_of(pairs, tok, cfg=CFG):
    """ids, targets, doc of the pairs: the chosen answers, then the rejected ones."""
    rows = [encode_pair(pair, tok, cfg)[0] for pair in pairs]
    return pad_rows([chosen for chosen, _ in rows] + [rejected for _, rejected in rows])


def two_models():
    torch.manual_seed(0)
    return SmolLM(CFG), SmolLM(CFG)


def test_the_loss_is_that_of_the_formula_in_float64_on_a_toy_of_six_tokens():
    """Log-probabilities of the six tokens are given; prompt: 2 tokens, chosen: 3, rejected: 1."""
    pi_w, pi_l, ref_w, ref_l, beta = [-0.5, -1.25, -0.125], [-2.0], [-0.75, -1.0, -1.5], [-1.75], 0.3
    h = (sum(pi_w) - sum(ref_w)) - (sum(pi_l) - sum(ref_l))
    expected = math.log(1 + math.exp(-beta * h))
    log_pi = torch.tensor([sum(pi_w), sum(pi_l)], dtype=torch.float64)
    log_ref = torch.tensor([sum(ref_w), sum(ref_l)], dtype=torch.float64)
    loss, chosen, rejected = dpo_loss(log_pi, log_ref, beta)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert chosen.item() == pytest.approx(beta * (sum(pi_w) - sum(ref_w)), abs=1e-12)
    assert rejected.item() == pytest.approx(beta * (sum(pi_l) - sum(ref_l)), abs=1e-12)


def test_in_a_batch_each_pair_has_the_loss_and_the_rewards_that_it_has_alone():
    log_pi, log_ref = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    alone = [dpo_loss(log_pi[[n, n + 3]], log_ref[[n, n + 3]], 0.3) for n in range(3)]
    for together, parts in zip(dpo_loss(log_pi, log_ref, 0.3), zip(*alone)):
        torch.testing.assert_close(together, torch.cat(parts))


def test_loss_rewards_and_gradients_are_those_of_trl(tok, tmp_path):
    """TRL's own trainer computes on the same ids and masks; the prompts are of unequal length."""
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    policy, reference = two_models()
    for name, model in (("policy", policy), ("reference", reference)):
        checkpoint.save(tmp_path / name, model, tok)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, their_reference = (load(tmp_path / name, dtype=torch.float32) for name in ("policy", "reference"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "policy")
    tokenizer.pad_token = tokenizer.eos_token
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
    args = trl.DPOConfig(str(tmp_path / "trl"), beta=0.3, use_cpu=True, report_to=[], bf16=False,
                         gradient_checkpointing=False, disable_dropout=True)
    trainer = trl.DPOTrainer(model=theirs, ref_model=their_reference, processing_class=tokenizer, args=args,
                             train_dataset=datasets.Dataset.from_list(rows))

    ids, targets, doc = batch_of(PAIRS, tok)
    rows, T = ids.shape
    whole = torch.cat([ids, torch.zeros(rows, 1, dtype=torch.long)], dim=1)  # ids, then the last target
    answer = torch.zeros_like(whole)
    for r in range(rows):
        for t in range(T):
            if targets[r, t] != IGNORE:
                whole[r, t + 1], answer[r, t + 1] = targets[r, t], 1
    there = torch.zeros_like(whole)
    for r in range(rows):
        there[r, : answer[r].nonzero().max() + 1] = 1
    inputs = {"input_ids": whole, "attention_mask": there, "completion_mask": answer}
    trainer.model.train()
    their_loss = trainer.compute_loss(trainer.model, inputs)
    their_loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}

    with torch.no_grad():
        log_ref = reference(ids, targets, doc).sum(1)
    loss, count, sums = loss_fn(policy, (ids, targets, doc, log_ref), beta=0.3)
    (loss / count).backward()
    assert count == 3 and (loss / count).item() == pytest.approx(their_loss.item(), abs=1e-5)
    assert abs(loss.item() / count - math.log(2)) > 1e-3  # the two models do differ
    names = {"chosen_reward": "rewards/chosen", "rejected_reward": "rewards/rejected",
             "margin": "rewards/margins", "accuracy": "rewards/accuracies",
             "chosen_logp": "logps/chosen", "rejected_logp": "logps/rejected"}
    for ours, name in names.items():
        assert (sums[ours] / count).item() == pytest.approx(float(metrics[name]), rel=1e-5, abs=1e-5), name
    gradients = dict(theirs.named_parameters())
    for name, p in policy.named_parameters():
        assert torch.allclose(p.grad, gradients[name].grad, atol=1e-5), name


def test_at_the_start_the_loss_is_ln_2_and_every_reward_is_0(tok):
    policy, _ = two_models()
    ids, targets, doc = batch_of(PAIRS, tok)
    alone = [batch_of([pair], tok) for pair in PAIRS]  # padded differently, as when the reference is computed
    with torch.no_grad():
        log_ref = torch.cat([policy(*batch).sum(1)[None] for batch in alone]).T.flatten()
    loss, count, sums = loss_fn(policy, (ids, targets, doc, log_ref), beta=0.05)
    assert loss.item() / count == pytest.approx(math.log(2), abs=1e-6)
    assert abs(sums["chosen_reward"]) / count < 1e-5 and abs(sums["rejected_reward"]) / count < 1e-5


def test_the_prompt_is_no_target_and_the_end_of_the_answer_is(tok):
    ((ids, targets), _), _ = encode_pair(PAIRS[0], tok, CFG)
    prompt = tok.chat(PAIRS[0][0], add_generation_prompt=True)[0]
    assert ids[: len(prompt)] == prompt
    assert [t for t in targets if t != IGNORE] == [*tok.encode("a mat"), tok.im_end_id]
    assert targets[len(prompt) - 1] == tok.encode("a mat")[0] and len(ids) == len(targets)


def test_truncation_follows_the_published_recipe(tok):
    """At most 20 ids, 12 of them the prompt's: the prompt keeps its last 12, both answers their first 8."""
    cfg = replace(CFG, dpo_max_length=20, dpo_max_prompt_length=12)
    question = "the cat sat on a mat and saw the dog run"
    answer = "over green hills while rain fell softly and"
    prompt = tok.chat([{"role": "user", "content": question}], add_generation_prompt=True)[0]
    words = tok.encode(answer)
    assert len(prompt) > 12 and len(words) > 8
    (long, short), cut = encode_pair((exchange(question, "x")[:1], answer, "rain"), tok, cfg)
    assert cut == "prompt and answers"
    assert long == (prompt[-12:] + words[:7], [IGNORE] * 11 + words[:8])
    rain = [*tok.encode("rain"), tok.im_end_id]
    assert short == (prompt[-12:] + rain[:-1], [IGNORE] * 11 + rain)  # the same prompt on both sides
    roomy = replace(cfg, dpo_max_length=len(prompt) + len(words) + 1)
    ((complete, _), _), _ = encode_pair((exchange(question, "x")[:1], answer, "rain"), tok, roomy)
    assert complete[:len(prompt)] == prompt


def test_padding_changes_nothing(tok):
    policy, _ = two_models()
    ids, targets, doc = batch_of(PAIRS, tok)
    together = policy(ids, targets, doc).sum(1)
    for n, pair in enumerate(PAIRS):
        alone = policy(*batch_of([pair], tok)).sum(1)
        assert torch.allclose(alone, together[[n, n + 3]], atol=1e-4)


def test_a_step_makes_the_chosen_answer_likelier_relative_to_the_rejected_one(tok):
    policy, _ = two_models()
    batch = batch_of(PAIRS, tok)
    with torch.no_grad():
        log_ref = policy(*batch).sum(1)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    before, _, _ = loss_fn(policy, (*batch, log_ref), beta=0.5)
    before.backward()
    optimizer.step()
    after, count, sums = loss_fn(policy, (*batch, log_ref), beta=0.5)
    assert after < before and sums["margin"] > 0 and sums["accuracy"] == count


def write_pairs(path, n):
    lines = [json.dumps({"prompt": f"the cat {i}", "chosen": "a mat", "rejected": "rain " * (1 + i % 3)})
             for i in range(n)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def dpo_cfg(chat_cfg, tmp_path):  # noqa: F811
    return replace(chat_cfg, data=((write_pairs(tmp_path / "pairs.jsonl", 60), 1.0),), doc_mask=False,
                   dpo_max_length=128, dpo_max_prompt_length=64, max_steps=5, batch=4, micro_batch=2)


@pytest.fixture
def start(dpo_cfg):
    """(model, tok) that dpo.py starts from, and its Run."""
    _, model, tok = sft.load_chat_model(dpo_cfg, "dpo")
    return model, tok, Run("dpo", Path(dpo_cfg.out_dir) / "dpo")


def test_dpo_runs_from_pairs_to_a_chat_model_and_prefers_what_was_chosen(dpo_cfg, capfd):
    dpo.main(["config/demo_dpo.py", *flags(replace(dpo_cfg, max_steps=20, lr=3e-3))])
    folder = checkpoint.find(f"{dpo_cfg.out_dir}/dpo")
    log = [json.loads(line) for line in (folder.parent / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert {"accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp",
            "val_loss", "val_accuracy", "val_margin"} <= set(log[-1])
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["val_accuracy"] == 1.0
    assert log[0]["tokens"] > 4 * 2 and Tokenizer.load(folder).ends == (2,)


def test_a_step_divides_by_the_number_of_pairs(dpo_cfg, start):
    """The logged norm is that of the mean over the 4 pairs, however many tokens their answers have."""
    dpo.main(["config/demo_dpo.py", *flags(replace(dpo_cfg, max_steps=1))])
    (line,) = (Path(dpo_cfg.out_dir) / "dpo" / "log.jsonl").read_text().splitlines()
    model, tok, run = start
    pairs = Pairs(dpo_cfg, tok)
    pairs.compute_reference(model, run)
    (sum(loss_fn(model, pairs("train", m), dpo_cfg.dpo_beta)[0] for m in (0, 1)) / 4).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert json.loads(line)["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_the_reference_is_computed_once_and_again_when_weights_or_pairs_change(dpo_cfg, start):
    model, tok, run = start
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    first = Pairs(dpo_cfg, tok)
    first.compute_reference(model, run)
    n = len(calls)
    again = Pairs(dpo_cfg, tok)
    again.compute_reference(model, run)
    assert n and len(calls) == n
    assert all(torch.equal(first.log_ref[split], again.log_ref[split]) for split in ("train", "val"))
    with torch.no_grad():
        model.model.norm.weight.add_(0.1)
    other = Pairs(dpo_cfg, tok)
    other.compute_reference(model, run)
    assert len(calls) > n and not torch.equal(first.log_ref["train"], other.log_ref["train"])


def test_each_pair_has_its_own_reference(dpo_cfg, start):
    """log_ref in a batch is what the model computes for its rows, so the first loss is ln 2."""
    model, tok, run = start
    pairs = Pairs(dpo_cfg, tok)
    pairs.compute_reference(model, run)
    for split, i in (("train", 0), ("train", 7), ("val", 0)):
        ids, targets, doc, log_ref = pairs(split, i)
        assert torch.allclose(model(ids, targets, doc).sum(1), log_ref, atol=1e-4)
    halves = [Pairs(dpo_cfg, tok, rank, 2) for rank in (0, 1)]
    for half in halves:
        half.log_ref = pairs.log_ref
    for a, b in zip(halves, (pairs("train", 2), pairs("train", 3))):
        assert all(torch.equal(x, y) for x, y in zip(a("train", 1), b))


def test_two_processes_each_compute_half_of_the_reference(dpo_cfg, start, monkeypatch):
    """They run one after the other here: Run.sum adds up what has come so far."""
    kept = {}

    def add(run, totals):
        kept[totals.shape] = kept.get(totals.shape, 0) + totals
        return kept[totals.shape]

    model, tok, run = start
    alone = Pairs(dpo_cfg, tok)
    alone.compute_reference(model, run)
    next((Path(dpo_cfg.out_dir) / "data").glob("reference-*")).unlink()  # so that it is computed again
    rows_read, halves = [], []
    monkeypatch.setattr(Run, "sum", add)
    model.register_forward_pre_hook(lambda _, batch: rows_read[-1].append(len(batch[0])))
    for rank in (1, 0):  # rank 0 last: it writes the file
        rows_read.append([])
        halves.append(Pairs(dpo_cfg, tok, rank, 2))
        halves[-1].compute_reference(model, Run("dpo", run.folder, rank=rank, world=2))
    n = {split: len(pairs) for split, pairs in alone.pairs.items()}
    assert [sum(rows) for rows in rows_read] == [2 * sum(k // 2 for k in n.values()),
                                                2 * sum(k - k // 2 for k in n.values())]
    for split in ("train", "val"):
        torch.testing.assert_close(halves[1].log_ref[split], alone.log_ref[split], rtol=0, atol=1e-4)
        assert ((halves[0].log_ref[split] == 0).all(1) == (torch.arange(n[split]) % 2 == 0)).all()
    written = Pairs(dpo_cfg, tok)
    written.compute_reference(model, run)  # rank 0 has written all of it
    assert len(rows_read) == 2 and all(map(torch.equal, written.log_ref.values(), halves[1].log_ref.values()))


def test_validation_counts_every_pair_once(dpo_cfg, start):
    model, tok, run = start
    cfg = replace(dpo_cfg, val_fraction=0.3)
    for world in (1, 2):
        ranks = [Pairs(cfg, tok, rank, world) for rank in range(world)]
        n, seen = len(ranks[0].pairs["val"]), []
        for pairs in ranks:
            pairs.log_ref = {"val": torch.arange(2 * n).view(n, 2).float()}  # which pair it is can be read
        for i in range(100):
            if (parts := [pairs("val", i) for pairs in ranks])[0] is None:
                break
            seen += [number for part in parts for number in part[3].tolist()]
        assert n > 4 and 2 * (n - world) < len(seen) <= 2 * n and len(set(seen)) == len(seen)


def test_in_bfloat16_the_first_loss_is_near_ln_2(dpo_cfg, start):
    """The bound in docs/measured.md: 0.01."""
    model, tok, run = start
    cfg, run = replace(dpo_cfg, dtype="bfloat16"), replace(run, dtype="bfloat16")
    pairs = Pairs(cfg, tok)
    pairs.compute_reference(model, run)
    with run.autocast():
        loss, count, _ = partial(loss_fn, beta=0.05)(model, pairs("train", 0))
    assert loss.item() / count == pytest.approx(math.log(2), abs=0.01)


def test_dpo_says_what_does_not_fit(dpo_cfg, tmp_path):
    with pytest.raises(UserError, match="dpo_max_length=500 must be at most seq_len=128"):
        dpo.main(["config/demo_dpo.py", *flags(replace(dpo_cfg, dpo_max_length=500))])
    with pytest.raises(UserError, match="dpo_max_prompt_length"):
        replace(dpo_cfg, dpo_max_prompt_length=128)
    (tmp_path / "x.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match=r"x.jsonl line 1: no pair"):
        dpo.main(["config/demo_dpo.py", *flags(replace(dpo_cfg, data=((str(tmp_path / "x.jsonl"), 1.0),)))])
    with pytest.raises(UserError, match="there is no checkpoint"):
        dpo.main(["config/demo_dpo.py", *flags(replace(dpo_cfg, init_from=str(tmp_path / "none")))])


def test_the_same_prompts_are_printed_in_every_stage():
    assert dpo.PROMPTS is sft.PROMPTS and {"hello", "1+1="} <= set(sft.PROMPTS)
