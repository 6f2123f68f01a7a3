"""python -m bench plan: figures computed by hand, memory as autograd keeps it, and this machine's rate."""

import re
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TINY, write_preset

import config
from bench import plan
from config import Config, UserError
from model import SmolLM
from train import loss_fn


@pytest.fixture(autouse=True)
def rate(tmp_path, monkeypatch):
    """No measured rate yet, and a file of its own for one."""
    monkeypatch.setattr(plan, "RATE", tmp_path / "out" / "rate.json")


def table(capsys, preset, *flags):
    """{first word or words of a line: the rest} of what is printed."""
    plan.main([str(ROOT / f"config/{preset}.py"), *flags])
    return dict(re.findall(r"^ {4}(\S+(?: \S+)*?) {2,}(.*)$", capsys.readouterr().out, re.M))


def test_the_figures_of_the_day_are_those_computed_by_hand(capsys):
    """6 N + 6 L C T = 807,090,048 + 212,336,640 per token, and 10,300 x 128 x 2,048 tokens."""
    found = table(capsys, "day")
    assert found["parameters"] == "134,515,008"
    assert found["tokens"] == "2,700,083,200, 20.1 per parameter: 10,300 steps of 262,144"
    operations = 2_700_083_200 * (807_090_048 + 212_336_640)
    assert found["operations"].startswith(f"{operations:.2e}, ") and f"{operations:.2e}" == "2.75e+18"
    # two bytes for each of 2% more tokens; at steps 2,000 to 10,000 and 10,300: weights and two averages
    assert found["disk"] == "15.2 GB: 5.5 of tokens, 6 checkpoints of 1.61"
    assert 6 * 12 * 134_515_008 + 2 * 1.02 * 2_700_083_200 == pytest.approx(15.2e9, rel=1e-3)
    for card, peak in {"RTX 3090": 71, "RTX 4090": 165, "L20": 119.5, "L40S": 362, "A100": 312, "H100": 989,
                       "Apple M4": 2.9}.items():
        assert found[card].split()[:2] == [f"{operations / (0.4 * peak * 1e12) / 3600:,.2f}", f"{peak:g}"]
    assert found["H100"].startswith("1.93 ")


@pytest.mark.parametrize("preset", ["stories", "evening", "day", "smol_360m", "smol_1p7b", "demo"])
def test_there_is_a_plan_for_every_preset_of_pretraining_and_its_flags(preset, capsys):
    found, twice = table(capsys, preset), table(capsys, preset, "--batch=1024", "--micro_batch=1")
    cfg = config.load([str(ROOT / f"config/{preset}.py")])
    memory = plan.memory_bytes(cfg, cfg.micro_batch) / 1e9
    assert found[f"{cfg.micro_batch}"] == f"{memory:,.1f}    the preset's"
    hours = [float(each["A100"].split()[0].replace(",", "")) for each in (found, twice)]
    assert hours[1] == pytest.approx(1024 / cfg.batch * hours[0], rel=0.02, abs=0.02 * 1024 / cfg.batch)


def test_the_disk_holds_one_checkpoint_more_than_are_kept_while_it_is_written():
    cfg = config.load([str(ROOT / "config/smol_135m.py")])
    for kept, saved_every, held in ((3, 2000, 4), (0, 200_000, 3), (5, 400_000, 2), (3, 0, 1)):
        assert plan.disk_bytes(replace(cfg, keep_checkpoints=kept, save_every=saved_every))[2] == held


# ---------------------------------------------------------------------------------------------------------
# memory


def kept_bytes(cfg, rows, half):
    """What autograd keeps of a forward pass besides the weights, by asking it: each memory once."""
    model = SmolLM(cfg)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}  # {address: tensor}, which also keeps the address from being used again

    def pack(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids = torch.zeros(rows, cfg.seq_len, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), \
            torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss, _, _ = loss_fn(model, (ids, ids.clone(), ids))
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()
               if tensor.untyped_storage().data_ptr() not in weights)


@pytest.mark.parametrize("half", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [{}, dict(n_head=3, n_kv_head=1, d_model=48, d_ff=80), dict(n_kv_head=4)],
                         ids=str)
def test_a_block_keeps_exactly_the_bytes_of_the_formula(shape, half):
    """The difference of models of three blocks and of one; with bfloat16, also a copy of each matrix."""
    cfg = Config(**TINY | shape, seq_len=64)
    kept = [kept_bytes(replace(cfg, n_layer=n), 2, half) for n in (1, 3)]
    matrices = 2 * plan.n_linear(replace(cfg, n_layer=2)) if half else 0
    assert kept[1] - kept[0] - matrices == 2 * 2 * 64 * plan.activation_bytes(cfg, half)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_memory_of_a_step_is_what_is_held_and_what_autograd_keeps_and_a_chunk_of_logits(dtype):
    """Besides, there are the tables of RoPE, the ids, and a few numbers per position."""
    cfg = Config(**TINY, seq_len=64, dtype=dtype)
    held, chunk = 16 * cfg.n_params, 2 * 64 * 300 * (14 if dtype == "bfloat16" else 12)
    kept = kept_bytes(cfg, 2, dtype == "bfloat16")
    if dtype == "bfloat16":  # the head keeps a copy of its input, and its caller holds the input itself
        kept += 2 * 64 * 4 * cfg.d_model
    assert plan.memory_bytes(cfg, 2) == pytest.approx(held + chunk + kept, rel=0.02)


# ---------------------------------------------------------------------------------------------------------
# this machine, and mistakes


def test_what_bench_train_measured_becomes_hours_of_any_preset(capsys):
    """At 150,000 tokens per second of the same shape and rows, 2.7 billion take 18,001 s."""
    assert table(capsys, "day")["this machine"] == "measure it first: python -m bench train"
    o = Namespace(config=str(ROOT / "config/smol_135m.py"), T=2048, batch=8, dtype="bfloat16", device="cpu")
    plan.remember(o, 150_000)
    hours, source = table(capsys, "day")["this machine"].split(maxsplit=1)
    assert hours == f"{2_700_083_200 / 150_000 / 3600:.2f}" == "5.00"
    assert "measured with" in source and "smol_135m.py, 8 rows of 2048, bfloat16" in source
    day, longer = (table(capsys, "day", f"--max_steps={n}")["this machine"].split()[0] for n in (103, 1030))
    assert (day, longer) == ("0.05", "0.50")


def test_chats_pairs_and_epochs_have_no_known_number_of_tokens(tmp_path):
    for stage in ("sft", "dpo"):
        with pytest.raises(UserError, match=f"config/day_{stage}.py is for chats or pairs, .*plan the pretr"):
            plan.main([str(ROOT / f"config/day_{stage}.py")])
    mine = write_preset(tmp_path / "mine.py", Config(max_steps=0, epochs=3.0))
    with pytest.raises(UserError, match="mine.py trains for epochs=3 .*--max_steps=1000"):
        plan.main([mine])
    plan.main([mine, "--max_steps=1000"])


@pytest.mark.parametrize(("argv", "says"), [
    (["config/gone.py"], "there is no preset 'config/gone.py'"), ([], "name a preset"),
    (["config/day.py", "--max_step=3"], "there is no config field 'max_step'"),
    (["config/day_sft.py"], "plan the pretraining")])
def test_mistakes_end_in_one_sentence_and_exit_code_2(run_here, argv, says):
    code, _, error = run_here("bench/__main__.py", "plan", *argv)
    assert code == 2 and says in error and "Traceback" not in error


def test_a_run_that_the_clock_ends_has_no_plan_and_help_is_help(capsys):
    with pytest.raises(UserError, match="max_seconds=3600, and nobody knows how many steps"):
        plan.main([str(ROOT / "config/day.py"), "--max_seconds=3600"])
    plan.main(["--help"])
    assert "bench/plan.py: what will a run cost" in capsys.readouterr().out
    plan.main(["--max_steps", "50", str(ROOT / "config/day.py")])
    assert capsys.readouterr().out.startswith(f"{ROOT / 'config/day.py'}, computed, not run")
