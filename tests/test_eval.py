"""eval.py and plot.py: answers to the built-in questions, bits per byte, the log of it, and the picture."""

import importlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_packing import at_home, chat_cfg, flags  # noqa: F401  fixtures

import checkpoint
import plot
import sft
from config import Config, UserError
from model import SmolLM
from sample import generate
from tokenizer import Tokenizer

evaluation = importlib.import_module("eval")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def chat_model(chat_cfg):  # noqa: F811
    """The stage folder of a tiny chat model, and its model and tokenizer."""
    sft.main(["config/demo_sft.py", *flags(replace(chat_cfg, max_steps=2))])
    folder = checkpoint.find(f"{chat_cfg.out_dir}/sft")
    return folder.parent, SmolLM.load(folder).eval(), Tokenizer.load(folder)


def test_many_prompts_at_once_give_the_answers_that_they_give_one_by_one(chat_model):
    _, model, tok = chat_model
    prompts = [
        evaluation.prompt_of(model, tok, text) for text in ("the cat", "a", "1+1=", "the dog", "rain fell")
    ]
    stops = (tok.eos_id, model.stop_id)
    for prompt, (text, ended) in zip(prompts, evaluation.answers(model, tok, prompts, limit=20)):
        ids = list(generate(model, prompt, 20, temperature=0, stop_ids=stops))
        assert text == tok.decode(ids).strip() and ended == (len(ids) < 20)


def test_a_chat_model_is_asked_in_its_template_and_a_base_model_as_in_transcripts(chat_model):
    _, model, tok = chat_model
    chat = [{"role": "user", "content": "hello"}]
    assert evaluation.prompt_of(model, tok, "hello") == tok.chat(chat, True)[0]
    assert evaluation.prompt_of(model, tok, "hello", False) == tok.chat(chat)[0]
    model.stop_id = 0
    assert tok.decode(evaluation.prompt_of(model, tok, "hello")) == "User: hello\nAssistant:"


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary(tok):
    """All weights 0: every id is equally likely, and each costs log2(300) bits."""
    model = SmolLM(Config(vocab_size=300, n_layer=1, n_head=2, n_kv_head=1, d_model=16, d_ff=16, seq_len=16))
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    texts = ["the cat sat on a mat", "and saw the dog run over green hills while rain fell softly " * 3]
    n_ids = sum(len(tok.encode(text)) + 1 for text in texts)
    expected = n_ids * math.log2(300) / sum(len(text.encode()) for text in texts)
    assert evaluation.bits_per_byte(model, tok, texts) == pytest.approx(expected, rel=1e-5)


def test_the_table_is_printed_and_kept_beside_the_stage(chat_model, capsys):
    stage, _, _ = chat_model
    evaluation.main([str(stage), "--tasks=builtin"])
    out = capsys.readouterr().out
    (line,) = [json.loads(line) for line in (stage / "eval.jsonl").read_text().splitlines()]
    for name in (
        "hello and 1+1=",
        "two-digit sums, held out",
        "rambling or unfinished answers",
        "preferred answer is the likelier one",
        "bits per byte, documentation, unseen",
    ):
        assert name in out and name in line
    assert line["checkpoint"] == "step_0000002" and 0 <= line["two-digit sums, held out"] <= 1
    assert "reward accuracy" not in line  # there is no reference before dpo.py


def test_an_unknown_task_is_named_with_the_known_ones(chat_model):
    with pytest.raises(UserError, match="no task cooking: there are builtin"):
        evaluation.main([str(chat_model[0]), "--tasks=builtin,cooking"])


def test_the_picture_shows_the_stages_that_there_are(chat_model, capsys):
    pytest.importorskip("matplotlib")
    out = chat_model[0].parent
    plot.main([str(out)])
    assert (out / "stages.png").read_bytes()[:4] == b"\x89PNG" and "stages.png" in capsys.readouterr().out
    with pytest.raises(UserError, match="no log.jsonl"):
        plot.main([str(out / "data")])


def test_a_line_of_the_log_that_is_being_written_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"st')
    assert plot.read(tmp_path / "log.jsonl") == [{"step": 1}] and plot.read(tmp_path / "none") == []


def chat(stage, *words, said=None):
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", stage, "--device=cpu", *words],
        input=said,
        capture_output=True,
        encoding="utf-8",
        timeout=100,
    )
    return done.returncode, done.stdout, done.stderr


def test_one_question_on_the_command_line_gives_one_answer(chat_model):
    stage, model, tok = chat_model
    code, out, err = chat(stage, "--chat", "the cat", "--temperature=0", "--max_new_tokens=12")
    ids = list(
        generate(model, evaluation.prompt_of(model, tok, "the cat"), 12, temperature=0, stop_ids=(0, 2))
    )
    assert (code, out, err) == (0, tok.decode(ids) + "\n", "")


def test_a_conversation_has_commands_and_ends_with_quit_or_the_end_of_input(chat_model):
    lines = ["the cat", "/system You are a dog.", "a mat", "/reset", "/dance", "", "/quit", "never read"]
    code, out, err = chat(chat_model[0], "--chat", "--max_new_tokens=5", said="\n".join(lines))
    assert code == 0 and err == ""
    assert out.count("(a new conversation)") == 2 and "there is no command /dance" in out
    assert chat(chat_model[0], "--chat", "--max_new_tokens=5", said="the cat\n")[0] == 0


def test_a_base_model_is_not_talked_to(chat_cfg):  # noqa: F811
    code, out, err = chat(chat_cfg.init_from, "--chat", "hello")
    assert code == 2 and "base model" in err and "sft.py" in err and out == ""
