"""train.py: the arithmetic of a step, schedules, and what survives an interruption."""

import copy
import itertools
import json
import math
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import children
import pytest
import torch
from conftest import write_preset
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import config
import data
import train
from config import Config, UserError
from model import IGNORE, SmolLM
from plumbing import checkpoint, disk, shards
from plumbing.processes import Run, prefetch

BYTES_PER_TOKEN = 3.0
TIMES = "seconds", "elapsed", "tokens_per_second", "peak_gb"


@pytest.fixture
def prepared(small, tok):
    shards.write_shards(small.sources[0], small, tok)
    return small


def run_of(cfg):
    return Run("pretrain", Path(cfg.out_dir) / "pretrain")


def trained(cfg, tok, get_batch=None):
    """Run the loop as main does; returns its folder."""
    torch.manual_seed(8)
    run = run_of(cfg)
    train.fit(cfg, run, SmolLM(cfg), tok, get_batch or data.Batches(cfg, tok), train.loss_fn,
              {"the cat": tok.encode("the cat")}, BYTES_PER_TOKEN)
    return run.folder


def logged(folder):
    """The lines of the log without their times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in TIMES} for line in lines]


def weights(folder):
    newest = checkpoint.find(folder)
    return {**load_file(newest / "model.safetensors"), **load_file(newest / "optimizer.safetensors")}


def one_step(cfg, model, get_batch, step=0):
    sgd = [torch.optim.SGD(model.parameters(), lr=1)]
    return train.train_step(step, train.lr_at(step, cfg), cfg, run_of(cfg), model, sgd, get_batch,
                            train.loss_fn)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------------
# schedules


def test_wsd_is_the_published_formula_of_the_135m():
    cfg = config.load(["config/smol_135m.py"])
    for step, lr in {0: 0, 2500: 1.5e-3, 5000: 3e-3, 300_000: 3e-3, 499_999: 3e-3, 500_000: 3e-3}.items():
        assert train.lr_at(step, cfg) == lr
    assert train.lr_at(525_000, cfg) == pytest.approx(3e-3 * 0.5)
    assert 0 < train.lr_at(599_999, cfg) < 2e-8


def test_cosine_rises_and_falls_to_zero():
    cfg = Config(schedule="cosine", max_steps=110, warmup_steps=10, lr=1.0)
    assert [train.lr_at(step, cfg) for step in (0, 5, 10)] == [0, 0.5, 1.0]
    assert train.lr_at(60, cfg) == pytest.approx(0.5) and train.lr_at(109, cfg) < 3e-4
    assert train.lr_at(0, Config(schedule="cosine", max_steps=10, warmup_steps=0, lr=1.0)) == 1.0


def test_no_schedule_that_config_accepts_lets_the_learning_rate_jump_down():
    """It reaches its peak, then falls by at most the first step of 1 - sqrt, or a cosine's steepest."""
    accepted, schedules = 0, config.choices_of("schedule")
    for warmup, decay, schedule in itertools.product((0, 1, 30, 80, 90, 99), (None, 0, 10, 70), schedules):
        for fields in ({"warmup_steps": warmup}, {"warmup_ratio": warmup / 100}):
            try:
                cfg = Config(max_steps=100, lr=1.0, decay_steps=decay, schedule=schedule, **fields)
            except UserError:
                continue
            lrs = [train.lr_at(step, cfg) for step in range(100)]
            falls = [before - after for before, after in zip(lrs, lrs[1:])]
            steepest = math.sqrt(1 / cfg.decay) if cfg.decay else math.pi / 2 / (100 - cfg.warmup)
            assert max(lrs) == 1.0 and max(falls) <= steepest + 1e-12, cfg
            accepted += 1
    assert accepted > 40


# ---------------------------------------------------------------------------------------------------------
# one step


@pytest.mark.parametrize(("optimizer", "rel"), [("adamw", 1e-4), ("muon", 1e-3)])  # Muon rounds to bfloat16
def test_any_split_into_micro_batches_gives_the_same_steps(prepared, tok, optimizer, rel):
    logs = []
    for micro in (8, 2, 1):
        cfg = replace(prepared, micro_batch=micro, max_steps=4, warmup_steps=0, decay_steps=0, eval_every=2,
                      optimizer=optimizer, out_dir=f"{prepared.out_dir}_{micro}")
        shards.write_shards(cfg.sources[0], cfg, tok)
        logs.append(logged(trained(cfg, tok)))
    for log in logs[1:]:
        for mine, theirs in zip(log, logs[0], strict=True):
            assert mine == pytest.approx(theirs, rel=rel)


def test_the_logged_loss_tokens_and_norm_are_those_of_one_big_batch_in_float64(prepared, tok):
    """Ragged masks: every row has another number of targets, so a mean of means would differ."""
    cfg = replace(prepared, micro_batch=1, max_steps=1, warmup_steps=0, decay_steps=0, grad_clip=1e9)
    batches = data.Batches(replace(cfg, micro_batch=8), tok)
    ids, targets, doc = batches("train", 0)
    for row in range(8):
        targets[row, : 4 * row] = IGNORE
    torch.manual_seed(0)
    model = SmolLM(cfg)
    big = copy.deepcopy(model).double()
    logits = big(ids)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in big.parameters()))

    def get_batch(split, i):
        return ids[i : i + 1], targets[i : i + 1], doc[i : i + 1]

    line = one_step(cfg, model, get_batch)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert line["tokens"] == sum(32 - 4 * row for row in range(8))
    for mine, theirs in zip(model.parameters(), big.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_three_plain_steps_are_three_steps_in_parts(prepared, tok, optimizer):
    cfg = replace(prepared, micro_batch=2, max_steps=4, warmup_steps=0, decay_steps=0, optimizer=optimizer,
                  dtype="float32", grad_clip=0.5)
    models = [SmolLM(cfg), SmolLM(cfg)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [train.make_optimizers(model, cfg) for model in models]
    whole, parts = data.Batches(replace(cfg, micro_batch=8), tok), data.Batches(cfg, tok)
    for step in range(3):
        loss = train.plain_step(models[0], optimizers[0], whole("train", step), train.loss_fn, 1e-3, 0.5)
        line = train.train_step(step, 1e-3, cfg, run_of(cfg), models[1], optimizers[1], parts, train.loss_fn)
        assert line["loss"] == pytest.approx(loss, rel=1e-5) and line["grad_norm"] > 0.5
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_clipping_comes_after_the_division(prepared, tok):
    cfg = replace(prepared, micro_batch=2, max_steps=1, warmup_steps=0, decay_steps=0, grad_clip=1e-3)
    model = SmolLM(cfg)
    one_step(cfg, model, data.Batches(cfg, tok))
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    assert norm == pytest.approx(1e-3, rel=1e-3)


class Operations(TorchDispatchMode):
    """Counts operations by name. For two of them Python waits: a number that is read, and nonzero."""

    def __init__(self):
        super().__init__()
        self.made = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.made[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_a_micro_batch_reads_nothing_from_the_device_but_where_the_targets_are(prepared, tok):
    """On a GPU each of these would wait until everything before it is computed."""
    counted = []
    for micro_batch in (8, 2):
        cfg = replace(prepared, micro_batch=micro_batch, max_steps=2, warmup_steps=0, decay_steps=0,
                      doc_mask=True)
        with Operations() as counter:
            one_step(cfg, SmolLM(cfg), data.Batches(cfg, tok))
        counted.append([counter.made[name] for name in ("_local_scalar_dense", "nonzero", "_log_softmax")])
    (read, *others), (read_in_four, *four_times) = counted
    assert read == read_in_four < 10  # these belong to the step, not to its parts
    assert others == [1, 1] and four_times == [4, 4]  # and the head is computed once


def test_mfu_is_the_share_of_the_peak_that_the_operations_of_all_positions_are(prepared, tok):
    """Also where some positions are no targets. Rows of another length, like those of pairs, have none."""
    cfg = replace(prepared, micro_batch=8, max_steps=5, warmup_steps=0, decay_steps=0)
    model, (ids, targets, doc) = SmolLM(cfg), data.Batches(cfg, tok)("train", 0)
    targets[:, 8:] = IGNORE

    def line_of(rows, world=1):
        run, sgd = replace(run_of(cfg), peak=1e6), [torch.optim.SGD(model.parameters(), lr=0)]
        return train.train_step(0, 0.0, cfg, run, model, sgd, lambda split, i: rows, train.loss_fn)

    line = line_of((ids, targets, doc))
    assert line["tokens"] == 8 * 8 and line["peak_gb"] > 0.05
    assert line["mfu"] == pytest.approx(cfg.flops_per_token * 8 * 32 / line["seconds"] / 1e6, abs=1e-3)
    assert "mfu" not in line_of((ids[:, :20], targets[:, :20], doc[:, :20]))
    assert "mfu" not in one_step(cfg, model, lambda split, i: (ids, targets, doc))  # no peak is known


def test_a_loss_that_is_not_finite_stops_before_the_update(prepared, tok):
    cfg = replace(prepared, max_steps=5, warmup_steps=0, decay_steps=0)
    model = SmolLM(cfg)
    model.model.norm.weight.data[0] = math.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"step 3 \(draws 16 to 23 of the run\): the loss is nan.*--step=3$"):
        one_step(cfg, model, data.Batches(cfg, tok), step=2)
    assert same(before, model.state_dict())


def test_a_batch_without_targets_is_an_error(prepared, tok):
    cfg = replace(prepared, max_steps=5, warmup_steps=0, decay_steps=0)
    model, batches = SmolLM(cfg), data.Batches(cfg, tok)

    def get_batch(split, i):
        ids, targets, doc = batches(split, i)
        return ids, torch.full_like(targets, IGNORE), doc

    with pytest.raises(UserError, match="no target at all"):
        one_step(cfg, model, get_batch)


class Twins(Run):
    """As if a second process had the same sums, and a source that this one has not."""

    def union(self, names):
        return [*super().union(names), "theirs"]

    def sum(self, totals):
        return 2 * totals


def test_sums_are_added_name_by_name_over_micro_batches_and_processes():
    parts = [{"loss": (torch.tensor(1.5), 2**24), "a source": (1.0, 1)}, {"loss": (3.0, torch.tensor(1))}]
    total = train.add_up(parts, Twins("x", Path("x")))
    assert total == {"loss": (9.0, 2 * (2**24 + 1)), "a source": (2.0, 2.0), "theirs": (0.0, 0.0)}


def loss_per_half(model, batch):
    """train.loss_fn, and the loss of rows 0 to 3 and 4 to 7 apart: batch[3] is the number of each row."""
    loss, count, _ = train.loss_fn(model, batch)
    log_p, learned, row = model(*batch[:3]).detach(), batch[1] != IGNORE, batch[3]
    halves = {"loss_low": row < 4, "loss_high": row >= 4}
    return loss, count, {name: (-log_p[rows].sum(), learned[rows].sum()) for name, rows in halves.items()
                         if rows.any()}


@pytest.mark.parametrize("micro_batch", [8, 2, 1])
def test_a_sum_of_the_log_may_have_its_own_divisor_and_be_missing_in_a_micro_batch(
        prepared, tok, micro_batch):
    """A batch may have a fourth part; and what nothing was counted for is not in the log."""
    cfg = replace(prepared, micro_batch=micro_batch, max_steps=1, warmup_steps=0, decay_steps=0)
    ids, targets, doc = data.Batches(replace(cfg, micro_batch=8), tok)("train", 0)
    for row in range(8):
        targets[row, : 4 * row] = IGNORE
    model, B = SmolLM(cfg), micro_batch
    losses = -model(ids, targets, doc).detach()

    def line_of(numbers):
        def get_batch(split, i):
            return tuple(part[i * B : (i + 1) * B] for part in (ids, targets, doc, numbers))

        sgd = [torch.optim.SGD(model.parameters(), lr=0)]
        return train.train_step(0, 0.0, cfg, run_of(cfg), model, sgd, get_batch, loss_per_half)

    line = line_of(torch.arange(8))
    for name, rows in (("loss", slice(8)), ("loss_low", slice(4)), ("loss_high", slice(4, 8))):
        expected = losses[rows].sum() / (targets[rows] != IGNORE).sum()
        assert line[name] == pytest.approx(expected.item(), rel=1e-5)
    assert "loss_high" not in line_of(torch.zeros(8))


# ---------------------------------------------------------------------------------------------------------
# the loop


def stopping(batches, at):
    """get_batch that sends this process SIGTERM while it makes the batches named in `at`."""

    def get_batch(split, i):
        if split == "train" and i in at:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(split, i)

    return get_batch


def test_40_steps_equal_13_and_9_and_18_bit_for_bit(prepared, tok, tmp_path):
    cfg = replace(prepared, optimizer="muon")
    undisturbed = replace(cfg, out_dir=str(tmp_path / "undisturbed"))
    shards.write_shards(cfg.sources[0], undisturbed, tok)
    expected = trained(undisturbed, tok)
    for step in (13, 22):
        with pytest.raises(SystemExit) as stop:
            trained(cfg, tok, stopping(data.Batches(cfg, tok), {2 * step - 1}))
        assert stop.value.code == 128 + signal.SIGTERM
        assert checkpoint.checkpoints(Path(cfg.out_dir) / "pretrain")[-1][0] == step
    folder = trained(cfg, tok)
    assert logged(folder) == logged(expected) and len(logged(folder)) == 40
    assert same(weights(folder), weights(expected))


def test_a_thread_that_makes_batches_in_advance_changes_no_bit_also_if_it_stops_and_resumes(
        prepared, tok, tmp_path):
    undisturbed = replace(prepared, out_dir=str(tmp_path / "undisturbed"))
    shards.write_shards(prepared.sources[0], undisturbed, tok)
    expected, steps = trained(undisturbed, tok), []
    for ends in (True, True, False):
        with prefetch(stopping(data.Batches(prepared, tok), {25, 43} if ends else ())) as get_batch:
            if ends:
                with pytest.raises(SystemExit):
                    trained(prepared, tok, get_batch)
            else:
                trained(prepared, tok, get_batch)
        steps += [step for step, _ in checkpoint.checkpoints(Path(prepared.out_dir) / "pretrain")][-1:]
    assert steps[-1] == 40 > steps[1] > steps[0] > 10
    folder = Path(prepared.out_dir) / "pretrain"
    assert logged(folder) == logged(expected) and same(weights(folder), weights(expected))


def test_validation_reads_the_rows_of_validation_and_training_those_of_training(prepared, tok):
    batches, asked = data.Batches(prepared, tok), []

    def get_batch(split, i):
        asked.append((split, i))
        return batches(split, i)

    trained(replace(prepared, max_steps=2, warmup_steps=0, decay_steps=0, eval_every=2), tok, get_batch)
    assert asked == [("train", i) for i in range(4)] + [("val", i) for i in range(4)]


def test_log_lines_after_the_checkpoint_are_dropped(prepared, tok):
    folder = trained(replace(prepared, max_steps=20), tok)
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 21, "loss": 0}\n{"step": 2')
    trained(replace(prepared, max_steps=30), tok)
    assert [line["step"] for line in logged(folder)] == list(range(1, 31))


def test_a_finished_run_says_that_nothing_is_left_to_do(prepared, tok, capsys):
    folder = trained(replace(prepared, max_steps=20), tok)
    assert "MFU" not in capsys.readouterr().out  # a CPU has no peak that anybody states
    before = weights(folder)
    trained(replace(prepared, max_steps=20), tok)
    assert "nothing is left to do" in capsys.readouterr().out
    assert same(before, weights(folder))


def test_old_checkpoints_are_removed_only_when_the_new_one_is_complete(prepared, tok, monkeypatch):
    cfg = replace(prepared, keep_checkpoints=2)
    folder = trained(cfg, tok)
    assert [step for step, _ in checkpoint.checkpoints(folder)] == [30, 40]
    replace_atomically = disk.replace

    def break_down(temporary, path):
        if Path(path).name == "step_0000050":
            raise OSError("no space left on device")
        replace_atomically(temporary, path)

    monkeypatch.setattr(disk, "replace", break_down)
    with pytest.raises(UserError, match="step_0000050 cannot be written: no space left on device"):
        trained(replace(cfg, max_steps=50, save_every=50), tok)
    assert [step for step, _ in checkpoint.checkpoints(folder)] == [30, 40]


def test_a_process_killed_while_it_saves_loses_no_more_than_the_steps_since_the_last_checkpoint(prepared):
    """SIGKILL just before a file gets its name, four times: the end has the bits of an undisturbed run."""
    cfg = replace(prepared, max_steps=8, save_every=4, eval_every=4, decay_steps=2)
    preset = Path(cfg.out_dir).parent / "preset.py"
    code = ("import os, signal, sys, train; from plumbing import disk\n"
            "replace = disk.replace\n"
            "def killed(a, b):\n"
            "    killed.n += 1\n"
            "    if killed.n == {n}: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    replace(a, b)\n"
            "killed.n = 0; disk.replace = killed; train.main([{preset!r}])")

    def run(out, n):
        write_preset(preset, replace(cfg, out_dir=out))
        return children.run("-c", code.format(n=n, preset=str(preset))).returncode

    undisturbed = str(Path(prepared.out_dir).parent / "undisturbed")
    shutil.copytree(Path(prepared.out_dir) / "data", Path(undisturbed) / "data")
    assert run(undisturbed, 0) == 0
    kills = 0
    for n in (3, 9, 10, 11):  # the weights, train.json, the digests, the name of the folder
        kills += run(prepared.out_dir, n) == -signal.SIGKILL
    assert kills == 4 and run(prepared.out_dir, 0) == 0
    assert logged(Path(prepared.out_dir) / "pretrain") == logged(Path(undisturbed) / "pretrain")
    assert same(weights(Path(prepared.out_dir) / "pretrain"), weights(Path(undisturbed) / "pretrain"))


def test_the_loss_falls_and_validation_is_in_bits_per_byte(prepared, tok):
    log = logged(trained(prepared, tok))
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert [line["step"] for line in log if "val_loss" in line] == [10, 20, 30, 40]
    assert all(line["tokens"] == 8 * 32 for line in log)
    bits = log[-1]["val_loss"] / math.log(2) / BYTES_PER_TOKEN
    assert log[-1]["val_bits_per_byte"] == pytest.approx(bits)


def test_the_seed_of_a_run_decides_its_printed_samples(prepared, tok, capsys):
    """The weights of all three runs are the same, so only the seed can make their samples differ."""
    samples = []
    for number, seed in enumerate((1, 1, 2)):
        cfg = replace(prepared, max_steps=1, warmup_steps=0, decay_steps=0, sample_every=1, seed=seed,
                      out_dir=f"{prepared.out_dir}_{number}")
        trained(cfg, tok, data.Batches(prepared, tok))
        samples.append([line for line in capsys.readouterr().out.splitlines() if "the cat | " in line])
    assert len(samples[0]) == 1
    assert samples[0] == samples[1] != samples[2]


def test_a_compiled_run_learns_the_same_and_samples_are_not_compiled(prepared, tok, capsys):
    """Each length of a sample would be another graph; the steps and the validation have theirs."""
    cfg = replace(prepared, max_steps=3, warmup_steps=0, decay_steps=0, sample_every=1, eval_every=3)
    logs = [logged(trained(cfg, tok))]
    counted = []
    for sample_every in (0, 1):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        out_dir = f"{cfg.out_dir}_{sample_every}"
        compiled = replace(cfg, compile=True, sample_every=sample_every, out_dir=out_dir)
        shards.write_shards(compiled.sources[0], compiled, tok)
        logs.append(logged(trained(compiled, tok)))
        counted.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    said = capsys.readouterr().out
    if "does not work here" in said:
        pytest.skip("torch.compile does not work here")
    assert said.count("the cat | ") == 6  # of the eager run, and of the second compiled one
    assert counted[0] == counted[1] > 0
    for log in logs[1:]:
        for mine, theirs in zip(log, logs[0], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3)


def test_where_a_block_does_not_compile_training_says_why_and_continues(prepared, tok, capsys, monkeypatch):
    def refuse(module):
        return lambda *example: 1 / 0

    cfg = replace(prepared, max_steps=2, warmup_steps=0, decay_steps=0, compile=True)
    monkeypatch.setattr(torch, "compile", refuse)
    folder = trained(cfg, tok)
    assert "training without torch.compile, which does not work here: division by zero" in (
        capsys.readouterr().out)
    assert len(logged(folder)) == 2


# ---------------------------------------------------------------------------------------------------------
# where a run starts from


def test_init_from_brings_shape_and_tokenizer_and_a_conflict_is_an_error(prepared, tok):
    folder = trained(replace(prepared, max_steps=10, warmup_steps=0, decay_steps=0), tok)
    cfg, model = checkpoint.initial_model(Config(init_from=str(folder)))
    assert (cfg.n_layer, cfg.d_model, cfg.vocab_size) == (2, 32, 300)
    assert same(model.state_dict(), checkpoint.load(folder)[0].state_dict())
    with pytest.raises(UserError, match="n_layer=5 conflicts with 2"):
        checkpoint.initial_model(Config(init_from=str(folder), n_layer=5))


def test_only_longer_rows_may_bring_a_larger_rope_theta(tmp_path, prepared, tok):
    """rope_theta belongs to the weights, unless the context grows; then it may only grow, too."""
    old = replace(prepared, seq_len=64, rope_theta=500.0)
    checkpoint.save(tmp_path / "m", SmolLM(old), tok)
    init = dict(init_from=str(tmp_path / "m"))

    def loaded(**fields):
        cfg, model = checkpoint.initial_model(Config(**init, **fields))
        assert cfg.rope_theta == model.cfg.rope_theta
        return cfg.rope_theta, cfg.seq_len, model.cfg.seq_len

    assert loaded(seq_len=64) == loaded(seq_len=64, rope_theta=500.0) == (500.0, 64, 64)
    assert loaded(seq_len=32) == (500.0, 32, 64)  # short rows do not make the context shorter
    assert loaded(seq_len=256) == (500.0, 256, 256)  # 10,000 is Config's default, which nobody asked for
    assert loaded(seq_len=256, rope_theta=4000.0) == (4000.0, 256, 256)
    for fields in (dict(seq_len=64, rope_theta=4000.0), dict(seq_len=256, rope_theta=400.0)):
        with pytest.raises(UserError, match=r"rope_theta=4000?.0 conflicts with 500.0 .*--rope_theta=500.0"):
            checkpoint.initial_model(Config(**init, **fields))


def test_a_resumed_run_remembers_the_checkpoint_that_it_started_from(prepared, tok):
    """init_from names a stage, whose newest checkpoint may be another one by the time of the second run."""
    short = dict(max_steps=2, warmup_steps=0, decay_steps=0)
    first = trained(replace(prepared, **short), tok)
    cfg = replace(prepared, **short, init_from=str(first), out_dir=f"{prepared.out_dir}_2")
    shards.write_shards(cfg.sources[0], cfg, tok)

    def started_from(cfg):
        return disk.read_json(checkpoint.find(trained(cfg, tok)) / "train.json")["started_from"]

    assert started_from(cfg) == str(first / "step_0000002")
    trained(replace(prepared, **{**short, "max_steps": 3}), tok)
    assert checkpoint.find(first).name == "step_0000003"
    assert started_from(replace(cfg, max_steps=4)) == str(first / "step_0000002")
