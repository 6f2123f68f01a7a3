"""Mistakes that people make, in complete commands: each gets a sentence, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import children
import numpy as np
import pytest
import torch
from conftest import write_preset, write_texts

import config
import data
import sample
import sft
import tokenizer
import train
from config import Config, UserError
from corpus import hub, synthesize
from corpus.conversations import exchange, pair_of, pairs_of, preferences
from corpus.files import Bad
from curate import __main__ as curate
from curate import classifier, experiment
from evals import __main__ as evaluation
from evals import plot
from export import __main__ as export
from model import SmolLM
from plumbing import checkpoint, disk, processes, shards
from plumbing.processes import Run
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent


def trained(small, **changes):
    """A run of a few steps; returns its Config."""
    cfg = replace(small, max_steps=4, save_every=2, eval_every=0, decay_steps=1, warmup_steps=1, **changes)
    train.main(argv_of(cfg))
    return cfg


@pytest.fixture
def chats(small, tmp_path, tok):
    """A Config for sft.py on 100 chats, and an untrained base model to begin with."""
    saved(Path(small.out_dir) / "pretrain", SmolLM(small), tok)
    rows = [{"messages": exchange(f"{i} the cat", "a dog " * (1 + i % 9))} for i in range(100)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(small, data=((str(tmp_path / "chats.jsonl"), 1.0),), fractions=True, tokenizer=None,
                   init_from=f"{small.out_dir}/pretrain", seq_len=128, max_steps=1, warmup_steps=0,
                   decay_steps=0)


def saved(stage, model, tok):
    """Write a complete checkpoint of step 1 into the folder of a stage."""
    checkpoint.save_step(1, Run(stage.name, stage), model, tok, [], {"config": {}}, keep=0)


def argv_of(cfg):
    return [write_preset(Path(cfg.out_dir).parent / "mine.py", cfg)]


# ---------------------------------------------------------------------------------------------------------
# training resumes, or says why not


def test_a_checkpoint_resumes_only_with_its_own_tokenizer_and_its_own_heads(small, tmp_path):
    cfg = replace(trained(small), max_steps=6)
    with pytest.raises(UserError, match=r"is another model \(n_head 4 -> 2, n_kv_head 2 -> 1\)"):
        train.main(argv_of(replace(cfg, n_head=2, n_kv_head=1)))
    Tokenizer.train(["an other text, another tokenizer " * 9], 300).save(tmp_path / "other")
    with pytest.raises(UserError, match="was trained with another tokenizer: continue with --tokenizer="):
        train.main(argv_of(replace(cfg, tokenizer=str(tmp_path / "other"))))
    train.main(argv_of(cfg))
    assert checkpoint.checkpoints(f"{cfg.out_dir}/pretrain")[-1][0] == 6


def test_an_empty_folder_with_the_name_of_a_checkpoint_does_not_swallow_one(small):
    folder = Path(small.out_dir) / "pretrain" / "step_0000004"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="step_0000004 is damaged: .*restore one, or delete them all"):
        trained(small)
    folder.rmdir()
    trained(small)
    assert (folder / "train.json").exists()


def test_a_log_that_lacks_lines_is_cut_by_step_numbers(small):
    folder = Path(small.out_dir) / "pretrain"
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text('{"step": 9}\n{"step": 10}\n[]\n{"ste\n{"step": 11}\n')
    checkpoint.Log(Run("pretrain", folder), 10)
    assert (folder / "log.jsonl").read_text() == '{"step": 9}\n{"step": 10}\n'


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no FIFOs")
def test_where_nobody_reads_the_output_any_more_training_saves_and_ends(small, tmp_path):
    cfg = replace(trained(small), max_steps=10**6, save_every=0, eval_every=1)
    os.mkfifo(tmp_path / "stdout")
    training = children.start("train.py", *argv_of(cfg), folder=tmp_path)
    with open(tmp_path / "stdout") as reader:
        reader.readline()
    training.join(200)
    assert training.exitcode == 128 + signal.SIGTERM, (tmp_path / "stderr").read_text()
    assert checkpoint.checkpoints(f"{cfg.out_dir}/pretrain")[-1][0] > 4


@pytest.mark.parametrize("surroundings", [{"env": {**os.environ, "PYTHONIOENCODING": "ascii"}},
                                          {"preexec_fn": lambda: (os.close(0), os.close(2))}])
@pytest.mark.skipif(os.name == "nt", reason="closes descriptors")
def test_a_narrow_or_closed_terminal_does_not_end_training(small, surroundings):
    cfg = replace(trained(small), max_steps=6, sample_every=1)
    training = subprocess.run([sys.executable, "train.py", *argv_of(cfg)], cwd=ROOT, capture_output=True,
                              text=True, timeout=200, **surroundings)
    said, error = training.stdout, training.stderr
    assert training.returncode == 0 and "done" in said and "Traceback" not in error
    assert checkpoint.checkpoints(f"{cfg.out_dir}/pretrain")[-1][0] == 6


# ---------------------------------------------------------------------------------------------------------
# command lines and presets


def test_a_missing_value_does_not_take_the_next_field():
    with pytest.raises(UserError, match="--out_dir needs a value"):
        config.load([str(ROOT / "config/demo.py"), "--out_dir", "--max_steps=5"])
    with pytest.raises(UserError, match="out_dir must name a folder"):
        Config(out_dir="")


@pytest.mark.parametrize("line, sentence", [("config = Confg()", "NameError: name 'Confg'"),
                                            ("from config.demoo import config", ".*No module named")])
def test_a_mistake_in_a_preset_is_reported_with_its_line(tmp_path, line, sentence):
    (tmp_path / "mine.py").write_text(f"\n{line}")
    with pytest.raises(UserError, match=f"mine.py, line 2: {sentence}"):
        config.load([str(tmp_path / "mine.py")])


def test_presets_are_listed_with_their_folder_if_that_is_not_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begin = f"begin with {ROOT.as_posix()}/config/demo.py"
    with pytest.raises(UserError, match=f"there is no preset 'x.py': {begin}"):
        config.load(["x.py"])


def test_a_path_may_contain_commas(tmp_path):
    folder = tmp_path / "a, b:0.5"
    folder.mkdir()
    assert config.parse_data(str(folder)) == ((str(folder), 1.0),)


def test_too_little_memory_and_a_reader_that_ended_are_no_traceback(monkeypatch, capsys):
    def full(argv):
        torch.empty(2**60, dtype=torch.uint8)

    def wide(argv):
        np.ones(2**60, np.uint8)

    def gone(argv):
        raise BrokenPipeError

    before = sys.stdout
    monkeypatch.setattr(sys, "argv", ["x.py"])
    for work, code in ((full, 2), (wide, 2), (gone, 141)):
        with pytest.raises(SystemExit) as ended:
            processes.command(work)
        assert ended.value.code == code
    sys.stdout.close()  # /dev/null
    monkeypatch.setattr(sys, "stdout", before)
    said = capsys.readouterr().err
    assert said.count("error: there is not enough memory: ") == 2 and said.count("\n") == 4


# ---------------------------------------------------------------------------------------------------------
# data


def test_an_empty_source_leaves_no_tokenizer(small, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    cfg = replace(small, data=((str(tmp_path / "empty.jsonl"), 1.0),), tokenizer=None)
    with pytest.raises(UserError, match="there is no text in .*empty.jsonl"):
        tokenizer.load_or_train(cfg)
    assert not (Path(cfg.out_dir) / "tokenizer").exists()


def test_machines_that_share_the_work_train_the_same_tokenizer(small):
    digests = set()
    for part in ("1/2", "2/2"):
        cfg = replace(small, tokenizer=None, vocab_size=290, part=part, out_dir=f"{small.out_dir}{part[0]}")
        data.main(argv_of(cfg))
        digests.add(Tokenizer.load(f"{cfg.out_dir}/tokenizer").digest())
    assert len(digests) == 1


def test_a_copy_of_a_manifest_is_no_manifest(small, tok):
    shards.write_shards(small.sources[0], small, tok)
    folder = shards.shard_folder(small.sources[0], small, tok)
    manifest = next(folder.glob("manifest_*"))
    manifest.with_name(f"{manifest.stem} (copy).json").write_bytes(manifest.read_bytes())
    assert len(shards.read_manifests(folder, tok)) == 1


def test_a_manifest_may_contain_an_impossible_file_name(small, tok):
    shards.write_shards(small.sources[0], small, tok)
    folder = shards.shard_folder(small.sources[0], small, tok)
    (manifest,) = folder.glob("manifest_*")
    manifest.write_text(manifest.read_text().replace("train_1of1", "x" * 3000))
    with pytest.raises(UserError, match="is damaged: it has 0 bytes, and its manifest says"):
        data.Rows(folder, "train", 32, tok)


def test_half_a_surrogate_pair_in_a_text_is_replaced(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "half of \\ud83d a pair"}\n')
    curate.main([str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--steps=dedup"])
    assert json.loads((tmp_path / "out.jsonl").read_text("utf-8")) == {"text": "half of \ufffd a pair"}


def test_a_score_that_is_no_number_is_bad():
    assert classifier.scored({"text": "a page", "score": 5.2}) == ("a page", 5)
    for score in (float("inf"), 87, -3):  # of another scale
        with pytest.raises(Bad, match="a score that is not from 0 to 5"):
            classifier.scored({"text": "a page", "score": score})
    with pytest.raises(Bad, match="no text and score"):
        classifier.scored({"text": "a page", "score": float("nan")})


def test_rated_answers_and_pairs_may_share_a_file_in_any_order(tmp_path):
    rows = [{"prompt": "hi", "response": str(n), "helpfulness": n, "correctness": n} for n in (0, 4)]
    pair = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
    for number, order in enumerate(([*rows, pair], [pair, *rows])):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in order))
        found = list(pairs_of(preferences(Config(data=((str(path), 1.0),), fractions=True))[0]))
        assert sorted(made[1:] for made in found) == [("2", "3"), ("4", "0")]
    with pytest.raises(Bad, match="it is a document"):
        pair_of("a page")


def test_fine_tuning_on_a_part_of_the_chats_is_refused(chats):
    for main in (sft.main, data.main):
        with pytest.raises(UserError, match="--part=1/2 is for documents, .*leave it out"):
            main(argv_of(replace(chats, part="1/2")))
    assert not (Path(chats.out_dir) / "sft").exists()


def test_packed_rows_are_reused_and_damaged_ones_are_reported(chats, tok):
    data.main(argv_of(chats))
    (packed,) = Path(chats.out_dir).glob("data/chats-*")
    sft.main(argv_of(chats))
    assert list(packed.parent.glob("chats-*")) == [packed] == [sft.pack(chats, tok)]
    assert disk.read_json(packed / "counts.json") == sft.ChatBatches(packed, chats).counts
    file = packed / "train_ids.bin"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="train_ids.bin is damaged: delete .*, and it is made again"):
        sft.ChatBatches(packed, chats)


def test_fine_tuning_refuses_weights_and_pretraining_refuses_fractions(chats):
    with pytest.raises(UserError, match="this config is for train.py: .* run python sft.py"):
        sft.main(argv_of(replace(chats, fractions=False)))
    with pytest.raises(UserError, match="this config is for sft.py or dpo.py"):
        train.main(argv_of(chats))


def test_two_writers_of_one_file_are_one_too_many(tmp_path):
    source = write_texts(tmp_path / "in.jsonl", 9)
    for name, main in (
            ("a.jsonl", lambda: synthesize.main(["--n=2", f"--out={tmp_path / 'a.jsonl'}"])),
            ("b.jsonl", lambda: curate.main([source, str(tmp_path / "b.jsonl"), "--steps=dedup"]))):
        with disk.FileLock(tmp_path / f".{name}.lock"), pytest.raises(UserError, match="is writing"):
            main()
        main()
        assert (tmp_path / name).stat().st_size


def test_a_key_that_is_no_text_is_named(tmp_path):
    (tmp_path / "key").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="--key_file=.*key cannot be read"):
        synthesize.main(["--n=2", f"--out={tmp_path / 'a.jsonl'}", f"--key_file={tmp_path / 'key'}",
                         "--model=m", "--writer=http://localhost:9/v1"])


def test_a_folder_that_is_neither_here_nor_on_a_hub_in_reach_is_named(monkeypatch):
    monkeypatch.setattr(hub, "ask_hub", lambda _: OSError("no network"))
    with pytest.raises(UserError, match=r"'my/texts' is not here, and the hub cannot be reached \(no net"):
        hub.open_hub(hub.Hub("my/texts", None), as_text=True)


def test_a_line_of_somebody_else_is_not_cut_off(tmp_path):
    out = tmp_path / "mine.jsonl"
    out.write_text(content := '{"id": "1", "text": "a page without a newline at its end"}')
    with pytest.raises(UserError, match="line 1 is not of this command"):
        synthesize.main(["--n=2", f"--out={out}"])
    assert out.read_text() == content


# ---------------------------------------------------------------------------------------------------------
# what a model writes, and what is made of it


def test_what_does_not_fit_into_the_context_is_reported(small, tok, tmp_path, capsys):
    model, tok = SmolLM(small), tok.for_chat()
    settings = {"max_new_tokens": 30, "temperature": 0, "top_k": 0, "top_p": 1.0}
    sample.reply(model, tok, [{"role": "user", "content": "the cat " * 99}], settings)
    assert "(the model reads only the last 32 of " in capsys.readouterr().err
    short = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    ids = tok.chat(short, add_generation_prompt=True)[0]
    model.cfg = replace(small, seq_len=2 * len(ids))  # an answer may fill it all, and the question still fits
    sample.reply(model, tok, short, {**settings, "max_new_tokens": 2 * len(ids) - 1})
    assert "left out" not in capsys.readouterr().err


def test_control_characters_of_a_prompt_are_printed_as_pictures_too(small, tok, tmp_path, capsys):
    saved(tmp_path, SmolLM(small), tok)
    for n in ("1", "2"):
        sample.main([str(tmp_path), "--prompt", "a\x1b[2Jb", "--max_new_tokens=1", "--num_samples", n])
    said = capsys.readouterr().out
    assert "\x1b" not in said and said.count("a␛[2Jb") == 3


def test_bytes_that_are_no_text_do_not_end_a_conversation(small, tok, tmp_path):
    saved(tmp_path, SmolLM(small), tok.for_chat())
    done = children.run("sample.py", tmp_path, "--chat", "--max_new_tokens=4", said=b"hi\xff\n/quit\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 2


def test_an_export_does_not_take_the_place_of_a_checkpoints_file(tmp_path):
    for out in ("model.safetensors", "config.json"):
        with pytest.raises(UserError, match="looks like a file of a checkpoint"):
            export.parse_args([str(tmp_path), "--format=gguf", f"--out={tmp_path / out}"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file: name a folder"):
        export.parse_args([str(tmp_path), "--format=onnx", f"--out={tmp_path / 'file'}"])


def test_a_template_that_is_no_text_is_reported(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="chat_template.jinja cannot be read"):
        disk.read_template(tmp_path)


@pytest.mark.parametrize("facts", [{"config": {"init_from": "gone"}},
                                   {"config": {"init_from": "here"}, "started_from": "gone"}])
def test_an_evaluation_opens_the_start_of_dpo_before_its_work(small, tok, tmp_path, monkeypatch, facts):
    """The step that DPO started from, and not what init_from means by now."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "ask_all", lambda *_: pytest.fail("the work has begun"))
    saved(tmp_path / "here", SmolLM(small), tok)
    checkpoint.save_step(1, Run("dpo", tmp_path / "dpo"), SmolLM(small), tok, [], facts, keep=0)
    with pytest.raises(UserError, match="there is no checkpoint gone"):
        evaluation.builtin(tmp_path / "dpo" / "step_0000001", SmolLM(small), tok, None)


def test_a_line_of_another_evaluation_is_not_drawn():
    lines = [{"step": 1, "generation_prompt": True}, {"step": 2}]
    assert plot.newest({"sft": lines}) == {"sft": lines[0]}


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes")
def test_an_experiment_that_is_asked_to_end_leaves_no_process(tmp_path):
    for name in (*experiment.SETS, "held_out"):
        write_texts(tmp_path / f"{name}.jsonl", 100)
    running = children.start("-m", "curate.experiment", "--jobs=1", f"--out_dir={tmp_path}",
                             "--vocab_size=300", "--n_layer=1", "--n_head=2", "--n_kv_head=1",
                             "--d_model=16", "--d_ff=16", "--seq_len=32", "--batch=4", "--micro_batch=4",
                             "--max_steps=1000000", "--save_every=0", folder=tmp_path)
    until = time.monotonic() + 300
    while not list(tmp_path.glob("*/pretrain/log.jsonl")) and time.monotonic() < until:
        assert running.is_alive(), (tmp_path / "stderr").read_text()
        time.sleep(0.05)
    running.terminate()
    running.join(100)
    assert running.exitcode == 143
    (lock,) = tmp_path.glob("*/pretrain/lock")
    with disk.lock(lock):
        assert checkpoint.checkpoints(lock.parent)
