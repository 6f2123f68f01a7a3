"""learn/pictures.py and diagrams.py: what the pictures of the course show is what the code does."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, WORDS, small_config

import train
from config import Config, UserError
from learn import diagrams, pictures
from model import rope_tables, rotate
from plumbing import disk
from tokenizer import FIRST_MERGE

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def run(tok, tmp_path_factory):
    """The folder of a tiny run. Its later stages are copies of pretraining, with a log of rewards."""
    folder = tmp_path_factory.mktemp("run")
    cfg = replace(small_config(folder, tok), keep_checkpoints=0, seq_len=64)
    fields = [f"--{name}={value}" for name, value in vars(cfg).items()
              if value is not None and name not in ("data", "ignore")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        train.main(["config/demo.py", *fields, f"--data={cfg.data[0][0]}", "--decay_steps=10"])
    out = Path(cfg.out_dir)
    for stage in ("sft", "dpo"):
        shutil.copytree(disk.find(out / "pretrain"), out / stage / "step_0000040")
    log = [{"step": step, "margin": 0.1 * step, "chosen_reward": 0.0, "rejected_reward": -0.1 * step}
           for step in range(1, 9)]
    (out / "dpo" / "log.jsonl").write_text("\n".join(map(json.dumps, log)) + "\n")
    return out


def test_a_smaller_tokenizer_cuts_the_same_text_into_more_tokens(tok):
    text = "the dog, 27 hills; é"
    found = diagrams.cuts(tok, text, (FIRST_MERGE, 278, tok.vocab_size))
    assert list(found) == [FIRST_MERGE, 278, tok.vocab_size]
    assert found[tok.vocab_size] == [tok.decode([i]) for i in tok.encode(text)]
    assert len(found[FIRST_MERGE]) == len(text.encode()) > len(found[278]) > len(found[tok.vocab_size])
    assert "".join(found[278][:-2]) == "the dog, 27 hills; "  # the last two are the bytes of é


def test_a_picture_of_rows_has_all_documents_and_every_target_is_the_next_id(tok):
    ids, rows = diagrams.rows_of(tok, ("the cat", "a mat and a dog", "rain"), 2)
    assert tok.decode(ids) == "the cat<|endoftext|>a mat and a dog<|endoftext|>rain<|endoftext|>"
    inputs, targets = torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])
    assert inputs.tolist() == ids[:len(inputs)] and targets.tolist() == ids[1:len(inputs) + 1]
    assert len(ids) - 2 <= len(inputs) < len(ids)


def test_the_targets_of_a_chat_are_the_answer_and_the_end_of_its_turn(tok):
    columns = diagrams.chat_columns(tok, [{"role": "user", "content": "the cat"},
                                          {"role": "assistant", "content": "a mat"}])
    names = [diagrams.visible(tok.decode([i])) for i in tok.encode("a mat")]
    assert [target for _, target in columns if target] == [*names, "<|im_end|>"]
    first = [target for _, target in columns].index(names[0])
    assert columns[first][0] == "⏎"  # from which the first token of the answer is predicted
    assert columns[-1] == (names[-1], "<|im_end|>")


@pytest.mark.parametrize("cfg", [Config(), Config(tie_embeddings=False, n_kv_head=9, n_layer=2)])
def test_the_parts_of_a_model_add_up_to_its_parameters(cfg):
    parts = diagrams.parameters_of(cfg)
    assert sum(parts.values()) == cfg.n_params
    assert [parts[name] for name in ("q", "k", "v", "o")] == [
        cfg.n_layer * cfg.d_model * heads * cfg.head_dim
        for heads in (cfg.n_head, cfg.n_kv_head, cfg.n_kv_head, cfg.n_head)]
    if cfg == Config():
        shares = {name: round(100 * parts[name] / cfg.n_params) for name in parts}
        assert cfg.n_params == 134_515_008 and shares["feed-forward"] == 59 and shares["embedding"] == 21


def test_the_hands_of_the_clocks_turn_as_queries_and_keys_do():
    cfg, pairs, positions = Config(d_model=32, n_head=2, n_kv_head=2, rope_theta=1e3), [0, 3, 7], [0, 1, 50]
    angles = pictures.hands(cfg, pairs, positions)
    assert angles[:, 0].tolist() == [0, 0, 0] and angles[0, 1].item() == pytest.approx(1)  # one radian
    q = torch.zeros(1, 1, 3, 16)
    q[..., :8] = 1  # each pair points to (1, 0)
    turned = rotate(q, rope_tables(torch.tensor(positions), 16, 1000.0))[0, 0]
    for pair, row in zip(pairs, angles):
        ways = torch.atan2(turned[:, pair + 8], turned[:, pair]) % (2 * math.pi)
        assert torch.allclose(row, ways, atol=1e-4)


def test_the_clearest_head_is_the_one_that_looks_at_the_keys_from_every_query():
    weights = torch.zeros(2, 3, 5, 5)
    weights[0, 1, 3, 1] = 1.0  # from one of the queries only
    weights[1, 2, 3, 1] = weights[1, 2, 4, 1] = weights[1, 2, 4, 2] = 0.4
    assert pictures.clearest_head(weights, [3, 4], [1, 2]) == (1, 2)


def test_progress_begins_with_fresh_weights_and_ends_with_the_last_step(run, tok):
    lines = list(diagrams.progress(run, "the cat", (0, 10)))
    assert [step for step, _, _ in lines] == [0, 10, 40]
    log = disk.read_lines(run / "pretrain" / "log.jsonl")
    assert [loss for _, loss, _ in lines] == pytest.approx(
        [log[0]["loss"], sum(line["loss"] for line in log[:10]) / 10,
         sum(line["loss"] for line in log) / len(log)])
    assert len({text for _, _, text in lines}) == 3
    words = [sum(word in WORDS for word in text.split()) for _, _, text in lines]
    assert words[0] < words[2]
    with pytest.raises(UserError, match="no step 100: train it again with --save_every=100"):
        list(diagrams.progress(run, "the cat", (0, 100)))


def test_all_pictures_are_written_from_a_run_and_what_is_missing_is_said(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pictures.main([str(run), f"--out={tmp_path}"])
    out = capsys.readouterr().out
    for name in pictures.PICTURES:
        if name in ("schedule", "progress"):  # two more runs; steps 100 and 400
            assert f"no {name}.png: " in out and not (tmp_path / f"{name}.png").exists()
        else:
            assert (tmp_path / f"{name}.png").read_bytes()[:4] == PNG
    stage = str(run / "pretrain")
    pictures.main([str(run), "schedule", f"--out={tmp_path}", "--schedules", stage, stage])
    assert (tmp_path / "schedule.png").read_bytes()[:4] == PNG


def test_a_picture_that_was_asked_for_and_cannot_be_drawn_is_an_error(run, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="there is no picture 'ropes': choose from tokens, "):
        pictures.main([str(run), "ropes"])
    with pytest.raises(UserError, match="needs --schedules"):
        pictures.main([str(run), "schedule", f"--out={tmp_path}"])
    with pytest.raises(UserError, match="no log.jsonl"):
        pictures.main([str(tmp_path), "schedule", "--schedules", str(tmp_path), str(tmp_path)])
    with pytest.raises(UserError, match="there is no checkpoint"):
        pictures.main([str(tmp_path), "rope"])


def test_every_picture_of_the_course_is_drawn_by_the_script_and_small():
    drawn = {path.stem: path.stat().st_size for path in (ROOT / "docs" / "pictures").glob("*.png")}
    # pages of learn/look.py and export/page.html; those that need runs of their own
    others = {"look", "web", "schedule", "scaling_law"}
    assert drawn.keys() | others == pictures.PICTURES.keys() | others
    assert max(drawn.values()) < 200_000 and sum(drawn.values()) < 1_500_000
