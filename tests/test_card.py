"""plumbing/card.py: the model card of a finished run, read as the hub and a user read it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
from conftest import write_preset
from huggingface_hub import ModelCard

from config import UserError
from evals import __main__ as evaluation
from model import SmolLM
from plumbing import card, checkpoint, disk
from plumbing.processes import Run


@pytest.fixture
def stage(small, run_here, tmp_path):
    """The stage folder of a finished run of 8 steps."""
    cfg = replace(small, max_steps=8, warmup_steps=1, decay_steps=2, save_every=4)
    code, _, err = run_here("train.py", write_preset(tmp_path / "mine.py", cfg), "--eval_every=4")
    assert code == 0, err
    return Path(cfg.out_dir) / "pretrain"


def test_the_card_of_a_finished_run_says_what_the_disk_says(stage, small, tmp_path):
    last = stage / "step_0000008"
    assert [path.parent for path in stage.glob("*/README.md")] == [last]  # only a finished run has one
    text = (last / "README.md").read_text()
    log = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    model, tok = checkpoint.load(last)
    speed = median(line["tokens_per_second"] for line in log)
    for said in (
        f"{sum(p.numel() for p in model.parameters()):,} parameters and {tok.vocab_size:,} tokens",
        f"| data, with shares of the text | {tmp_path / 'texts.jsonl'} 1.0 |",
        f"| work | 8 steps, {sum(line['tokens'] for line in log):,} tokens, in float32 |",
        f"{sum(line['seconds'] for line in log):,.0f} s in steps, a median of {speed:,.0f} tokens per second",
        f"loss {log[-1]['loss']:.3f}, val_loss {log[-1]['val_loss']:.3f}, val_bits_per_byte ",
        f"    python train.py {tmp_path / 'mine.py'} --eval_every=4\n",
        "`vocab_size=300` `n_layer=2` ",
        "1 x ",
    ):
        assert said in text
    assert "`lr=0.01` " in text and "`beta1" not in text  # what differs from SmolLM-135M, and only that
    facts = ModelCard(text).data
    assert (facts.library_name, facts.pipeline_tag) == ("transformers", "text-generation")
    assert facts.license is None and facts.language is None  # nobody knows those of a text of the user


def test_a_card_is_no_part_of_the_checkpoint(stage, small, tok, run_here):
    """It has no digest, so it may change; the checkpoint loads, resumes and is removed with it."""
    last = stage / "step_0000008"
    (last / "README.md").write_text("mine")
    assert checkpoint.damage(last) is None
    argv = f"{stage.parents[1] / 'mine.py'}", "--eval_every=4"
    assert "nothing is left to do" in run_here("train.py", *argv)[1]
    assert (last / "README.md").read_text() == "mine"
    assert run_here("train.py", *argv, "--max_steps=12", "--keep_checkpoints=1")[0] == 0
    assert [path.name for path in stage.glob("step_*")] == ["step_0000012"]
    assert "| work | 12 steps, " in (stage / "step_0000012" / "README.md").read_text()


def test_the_command_on_the_card_writes_the_text_on_the_card(stage, run_here):
    text = (stage / "step_0000008" / "README.md").read_text()
    said, length, sample = re.search(
        r'python sample.py FOLDER --prompt "(.*)" --max_new_tokens=(\d+)\n\n(.*)\n\n## Use', text, re.S
    ).groups()
    code, out, _ = run_here("sample.py", stage, "--prompt", said, f"--max_new_tokens={length}")
    assert code == 0 and sample == "\n".join("    " + line for line in out.removesuffix("\n").split("\n"))


def test_an_evaluation_appears_on_the_card_and_a_newer_one_replaces_it(stage, tmp_path, capsys):
    path = stage / "step_0000008" / "README.md"
    (tmp_path / "new.txt").write_text("the cat sat on a mat " * 20)
    for _ in range(2):
        evaluation.main([str(stage), "--tasks=text", f"--text={tmp_path / 'new.txt'}"])
    row = re.search(r"bits per byte +([\d.]+) \+- ([\d.]+)", capsys.readouterr().out)
    text = path.read_text()
    assert "| python -m evals, text | |\n|---|---|\n| loss | " in text
    assert text.count(f"| bits per byte | {row[1]} +- {row[2]} |") == text.count("| bits per byte |") == 1
    path.write_text(text.replace(card.MARK, "mine"))
    evaluation.main([str(stage), "--tasks=text", f"--text={tmp_path / 'new.txt'}"])
    assert path.read_text() == text.replace(card.MARK, "mine")  # an edited card is kept


def test_shares_are_percentages_and_an_evaluation_without_the_generation_prompt_is_an_experiment(tmp_path):
    lines = [
        {"checkpoint": "step_0000001", "task": "builtin", "generation_prompt": True, "sums": 0.125},
        {"checkpoint": "step_0000001", "task": "builtin", "generation_prompt": False, "sums": 0.5},
        {"checkpoint": "step_0000002", "task": "builtin", "generation_prompt": True, "sums": 0.75},
        {"checkpoint": "step_0000001", "task": "piqa", "acc": 0.5, "acc_stderr": 0.02, "questions": 1838},
    ]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert card.evaluation(tmp_path / "step_0000001") == [
        *("| python -m evals, builtin | |", "|---|---|", "| sums | 12.5% |", ""),
        *("| python -m evals, piqa | |", "|---|---|", "| acc | 50.0% +- 2.0% |", "| questions | 1838 |", ""),
    ]


def test_a_model_that_was_not_trained_here_keeps_its_card(tmp_path, tok, small):
    model = SmolLM(small)
    checkpoint.save(tmp_path / "hub", model, tok)
    card.write(tmp_path / "hub", model, tok)
    assert not (tmp_path / "hub" / "README.md").exists()
    (tmp_path / "hub" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    checkpoint.load(tmp_path / "hub")
    card.write(tmp_path / "hub", model, tok)
    assert (tmp_path / "hub" / "README.md").read_text() == "---\nlicense: apache-2.0\n---\n"


def test_language_and_license_are_those_of_the_built_in_corpus_and_of_what_began_with_it(tmp_path, small):
    model = SmolLM(small)
    first = card.front_matter(model, ["builtin-world", "builtin-code"], None)
    assert "language: en" in first and "license: mit" in first
    assert "license: mit" not in card.front_matter(model, ["builtin-world", "book.txt"], None)
    assert "license: mit" not in card.front_matter(model, ["builtin-chats"], str(tmp_path))  # of the hub
    (tmp_path / "README.md").write_text("\n".join(first))
    assert "license: mit" in card.front_matter(model, ["builtin-chats"], str(tmp_path))


def test_a_chat_model_is_shown_answering(tmp_path, small, tok):
    stage = tmp_path / "demo" / "sft"
    settings = {"data": [["builtin-chats", 0.79]], "fractions": True}
    facts = {"config": settings, "started_from": "out/demo/pretrain"}
    checkpoint.save_step(3, Run("sft", stage), SmolLM(small), tok.for_chat(), [], facts, keep=0)
    (stage / "log.jsonl").write_text('{"step": 3, "loss": 0.5}\n{"step": 4, "loss": 0.4}\n')
    card.write(stage / "step_0000003", *checkpoint.load(stage))
    text = (stage / "step_0000003" / "README.md").read_text()
    assert "# demo, sft\n" in text and "fine-tuning on chats, which started from `out/demo/pretrain`." in text
    assert 'python sample.py FOLDER --chat "Who are you?"' in text
    assert "sources | builtin-chats 0.79 |" in text
    assert "loss 0.500" in text and "| work | 1 steps" in text  # not what came after this checkpoint


def test_a_damaged_log_does_not_end_an_evaluation(stage, tok):
    lines = '{"step": 8, "loss": "low", "seconds": null}\n{"step": [], "tokens": 1}\n'
    (stage / "log.jsonl").write_text(lines)
    card.write(stage / "step_0000008", *checkpoint.load(stage))
    assert "| work | 1 steps, 0 tokens, " in (stage / "step_0000008" / "README.md").read_text()
    assert disk.read_json(stage / "step_0000008" / "train.json")["step"] == 8


def test_a_finished_run_that_lost_its_card_gets_it_when_the_command_runs_again(stage, run_here):
    path = stage / "step_0000008" / "README.md"
    path.unlink()
    assert "nothing is left to do" in run_here("train.py", stage.parents[1] / "mine.py", "--eval_every=4")[1]
    assert "| work | 8 steps, " in path.read_text()


def test_a_card_that_cannot_be_written_does_not_fail_a_finished_run(stage, monkeypatch, capsys):
    def full(path, text):
        raise UserError(f"{path} cannot be written: no space left")

    (stage / "step_0000008" / "README.md").unlink()
    monkeypatch.setattr(disk, "write_text", full)
    card.write(stage / "step_0000008", *checkpoint.load(stage))
    assert "no model card: " in capsys.readouterr().out
