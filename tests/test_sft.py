"""sft.py: chats in rows, what is learned from them, and a run from chats to a chat model."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

import config
import data
import sft
import train
from config import Config, UserError
from corpus.chats import chats
from corpus.conversations import exchange
from model import IGNORE, SmolLM
from plumbing import checkpoint
from plumbing.processes import Run
from sft import ChatBatches, encode_chat, encode_text, fill_rows, first_fit_decreasing, pack
from tokenizer import Tokenizer


def write_chats(path, n, seed=0):
    rng = random.Random(seed)
    lines = []
    for i in range(n):
        exchanges = [exchange(f"{i} the cat", "a dog " * rng.randint(1, 9)) for _ in range(rng.randint(1, 3))]
        lines.append(json.dumps({"messages": sum(exchanges, [])}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def chat_config(small, folder, tok):
    """A Config for sft.py on 300 chats, and an untrained base model to begin with."""
    run = Run("pretrain", Path(small.out_dir) / "pretrain")
    checkpoint.save_step(1, run, SmolLM(small), tok, [], checkpoint.facts_of(small), keep=3)
    return replace(
        small, init_from=f"{small.out_dir}/pretrain", tokenizer=None, fractions=True,
        data=((write_chats(folder / "chats.jsonl", 300), 1.0),),
        seq_len=128, doc_mask=True, max_steps=6, decay_steps=None, warmup_steps=0)


@pytest.fixture
def chat_cfg(small, tmp_path, tok):
    return chat_config(small, tmp_path, tok)


def flags(cfg):
    """A Config as command-line flags."""
    values = vars(cfg) | {"data": ",".join(":".join(map(str, entry)) for entry in cfg.data)}
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(Path(config.__file__).parent.parent)


def test_each_chat_goes_into_the_first_row_with_room_the_longest_first():
    assert first_fit_decreasing([200, 100, 60, 50], 256) == [[0, 3], [1, 2]]
    assert first_fit_decreasing([50, 100, 60, 200], 256) == [[3, 0], [1, 2]]
    assert first_fit_decreasing([5, 5, 5], 5) == [[0], [1], [2]]
    assert first_fit_decreasing([], 5) == []


def test_rows_hold_every_chat_once_and_are_at_least_97_percent_full():
    rng = random.Random(0)
    sizes = [min(256, int(rng.lognormvariate(4, 0.7)) + 5) for _ in range(5000)]
    rows = first_fit_decreasing(sizes, 256)
    assert sorted(i for row in rows for i in row) == list(range(5000))
    assert all(sum(sizes[i] for i in row) <= 256 for row in rows)
    assert sum(sizes) / (256 * len(rows)) > 0.97


def test_the_built_in_chats_fill_their_rows(tok):
    made = [piece for chat in chats(0, 2000) for piece in encode_chat(chat["messages"], tok, 1024)[0]]
    arrays = fill_rows(made, 1024)
    assert sum(len(ids) for ids, _ in made) / arrays[0].size > 0.97


def test_the_targets_are_the_answers_and_their_ends_and_nothing_else(tok):
    """Of two turns, the targets of a row, read in order, are the answers, each with <|im_end|>."""
    messages = [*exchange("the cat", "a mat"), *exchange("a dog", "the rain")]
    ((ids, targets),), _ = encode_chat(messages, tok, 256)
    learned = [i for i in targets if i != IGNORE]
    assert learned == [*tok.encode("a mat"), tok.im_end_id, *tok.encode("the rain"), tok.im_end_id]
    whole = tok.chat(messages)[0]
    assert ids == whole[: len(ids)]
    assert all(target in (IGNORE, whole[t + 1]) for t, target in enumerate(targets))
    assert len(ids) == len(whole) - 2 and targets[-1] == tok.im_end_id  # the rest is dropped


def test_train_on_prompts_learns_every_token(tok):
    messages = exchange("the cat", "a mat")
    ((ids, targets),), _ = encode_chat(messages, tok, 256, train_on_prompts=True)
    whole = tok.chat(messages)[0]
    assert ids == whole[:-1] and targets == whole[1:]


def test_of_a_document_among_chats_every_token_is_learned(tok):
    text = "the cat sat on a mat " * 40
    parts = encode_text(text, tok, 64)
    whole = [*tok.encode(text), tok.eos_id]
    assert [i for ids, _ in parts for i in ids] == whole[:-1]
    assert [i for _, targets in parts for i in targets] == whole[1:]
    assert all(len(ids) == len(targets) <= 64 for ids, targets in parts)


def test_a_long_chat_ends_with_the_last_answer_that_fits_or_is_left_out(tok):
    first, second = exchange("the cat", "a mat"), exchange("a dog", "the rain " * 50)
    ((whole, _),), lost = encode_chat(first, tok, 256)
    assert lost == 0
    ((cut, targets),), lost = encode_chat([*first, *second], tok, 60)
    assert lost == 1
    assert cut == whole and targets[-1] == tok.im_end_id
    assert encode_chat(second, tok, 60) == ([], 1)
    assert encode_chat(first, tok, len(whole))[0] and not encode_chat(first, tok, len(whole) - 1)[0]


def test_chats_in_a_row_give_the_loss_and_the_gradient_that_they_give_alone(tok):
    cfg = Config(**TINY, seq_len=256, doc_mask=True, init_std=0.1)
    pieces = [piece for text in ("a mat", "the rain fell", "softly")
              for piece in encode_chat(exchange("the cat", text), tok, 256)[0]]
    arrays = fill_rows(pieces, 256)
    assert arrays.shape[1] == 1
    results = []
    for batches in ([arrays], [fill_rows([piece], 256) for piece in pieces]):
        torch.manual_seed(0)
        model = SmolLM(cfg)
        loss = sum(train.loss_fn(model, tuple(map(torch.from_numpy, b.astype(np.int64))))[0] for b in batches)
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
    (packed, grads), (alone, grads_alone) = results
    assert abs(packed - alone) < 1e-4
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads, grads_alone))


def test_packing_is_done_once_and_an_epoch_sees_every_row_once(chat_cfg):
    tok = Tokenizer.load(checkpoint.find(chat_cfg.init_from))
    folder = pack(chat_cfg, tok)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert pack(chat_cfg, tok) == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert pack(replace(chat_cfg, train_on_prompts=True), tok) != folder
    batches = ChatBatches(folder, replace(chat_cfg, micro_batch=1))
    n = batches.counts["train rows"]
    seen = sorted(tuple(batches("train", i)[0][0].tolist()) for i in range(n))
    stored = sorted(map(tuple, np.asarray(batches.rows["train"][0]).tolist()))
    assert seen == stored
    shared = [ChatBatches(folder, replace(chat_cfg, micro_batch=1), rank, 2)("train", 3) for rank in (0, 1)]
    alone = [batches("train", i) for i in (6, 7)]
    assert all(torch.equal(a, b) for x, y in zip(shared, alone) for a, b in zip(x, y))


def test_sft_makes_a_chat_model_of_a_base_model(chat_cfg, capfd):
    sft.main(["config/demo_sft.py", *flags(replace(chat_cfg, sample_every=3))])
    out = capfd.readouterr().out
    assert "% full" in out and "1+1= |" in out
    folder = checkpoint.find(f"{chat_cfg.out_dir}/sft")
    ends = [json.loads((folder / name).read_text())["eos_token_id"]
            for name in ("config.json", "generation_config.json")]
    assert ends == [2, 2] and Tokenizer.load(folder).stop_ids == {0, 2} and Tokenizer.load(folder).is_chat
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    assert Tokenizer.load(checkpoint.find(chat_cfg.init_from)).stop_ids == {0}
    log = [json.loads(line) for line in (folder.parent / "log.jsonl").read_text().splitlines()]
    assert len(log) == 6 and log[-1]["val_loss"] > 0
    sft.main(["config/demo_sft.py", *flags(chat_cfg)])
    assert "nothing is left to do" in capfd.readouterr().out


def test_sft_says_what_is_missing(chat_cfg, tmp_path):
    with pytest.raises(UserError, match="--init_from=out/demo/pretrain"):
        sft.main(["config/demo_sft.py", *flags(replace(chat_cfg, init_from=None))])
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    bad = replace(chat_cfg, data=((str(tmp_path / "bad.jsonl"), 1.0),))
    with pytest.raises(UserError, match=r"bad.jsonl line 1: messages out of order"):
        sft.main(["config/demo_sft.py", *flags(bad)])
    assert all(path.suffix == ".tmp" for path in (tmp_path / "out" / "data").glob("chats-*"))
    with pytest.raises(UserError, match=r"this config is for train.py: .* run python sft.py"):
        sft.main(["config/demo.py", *flags(replace(chat_cfg, fractions=False))])
    with pytest.raises(UserError, match=r"--part=2/3 is for documents"):
        sft.main(["config/demo_sft.py", *flags(replace(chat_cfg, part="2/3"))])


def test_chats_of_the_hub_must_be_packed_first_and_the_error_names_the_command(chat_cfg, capsys):
    argv = ["config/demo_sft.py", *flags(replace(chat_cfg, data=(("webinstruct", 1.0),)))]
    with pytest.raises(UserError, match="the chats of webinstruct are not ready: prepare them with python "
                                        "data.py config/demo_sft.py .* --data=webinstruct:1.0 "):
        sft.main(argv)
    assert not (Path(chat_cfg.out_dir) / "sft").exists() and capsys.readouterr().out == ""


def test_data_py_packs_the_chats_of_a_config_and_sft_py_uses_them(chat_cfg, capsys, monkeypatch):
    data.main(["config/demo_sft.py", *flags(chat_cfg)])
    out = capsys.readouterr().out
    (folder,) = (Path(chat_cfg.out_dir) / "data").glob("chats-*")
    assert str(folder) in out and "chats and 0 documents in" in out and "% full" in out
    assert sft.rows_folder(chat_cfg, Tokenizer.load(checkpoint.find(chat_cfg.init_from))) == folder
    monkeypatch.setattr(sft, "conversations", None)  # nothing is read again
    sft.main(["config/demo_sft.py", *flags(replace(chat_cfg, max_steps=1))])
    assert "done" in capsys.readouterr().out


def test_validation_of_chats_counts_every_row_once(chat_cfg, tok):
    folder = pack(chat_cfg, tok)
    for world in (1, 2):
        ranks = [ChatBatches(folder, replace(chat_cfg, micro_batch=2), rank, world) for rank in range(world)]
        n, seen = ranks[0].counts["val rows"], []
        for i in range(100):
            if (parts := [batches("val", i) for batches in ranks])[0] is None:
                break
            seen += [tuple(row) for ids, _, _ in parts for row in ids.tolist()]
        stored = {tuple(row.tolist()) for row in ranks[0].rows["val"][0]}
        assert n > 4 and n - world < len(seen) <= n and len(set(seen)) == len(seen) and set(seen) <= stored


def test_training_on_fractions_is_for_chats_only(small):
    with pytest.raises(UserError, match="this config is for sft.py or dpo.py"):
        train.main(["config/demo.py", *flags(replace(small, fractions=True))])
