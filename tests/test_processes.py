"""processes.py: several processes that start, wait and stop together, and what a failed command leaves."""

import json
import os
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import children
import pytest
import torch
from children import several
from conftest import write_preset
from safetensors.torch import load_file

import dpo
import sft
import train
from config import UserError
from plumbing import checkpoint, disk, shards
from plumbing.processes import peak_of, prefetch, start

ROOT = Path(__file__).parent.parent
TIMES = {"seconds", "elapsed", "tokens_per_second", "peak_gb"}


def torchrun(*words):
    """Run two processes to their end; what children.run returns."""
    return children.run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words)


def ended(processes, folder, seconds=100):
    """Wait for processes; ([exit code], what all of them wrote to stderr)."""
    for process in processes:
        process.join(seconds)
    said = "".join(path.read_text() for path in sorted(folder.glob("process_*/stderr")))
    return [process.exitcode for process in processes], said


def worker(path, body):
    """Write a script for several processes; returns its path."""
    path.write_text("import os, signal, sys, time\nfrom pathlib import Path\n"
                    f"sys.path.insert(0, {str(ROOT)!r})\n"
                    "import train\n"
                    "from plumbing import checkpoint, processes\n"
                    "RANK = os.environ['RANK']\n" + body, encoding="utf-8")
    return str(path)


@pytest.fixture
def short(small, tok):
    """A prepared Config of a run that never ends by itself within these tests."""
    cfg = replace(small, max_steps=10**6, save_every=0, eval_every=0)
    shards.write_shards(cfg.sources[0], cfg, tok)
    return cfg


# ---------------------------------------------------------------------------------------------------------
# several processes


def test_two_processes_equal_one(short, tmp_path):
    """torchrun with two gloo processes against one process: same losses, norms and weights to rounding."""
    cfg = replace(short, max_steps=6, warmup_steps=2, decay_steps=2, eval_every=3)
    preset, logs, weights = write_preset(tmp_path / "preset.py", cfg), [], []
    for name in ("one", "two"):
        shutil.copytree(Path(cfg.out_dir) / "data", tmp_path / name / "data")
        words = ["train.py", preset, f"--out_dir={tmp_path / name}"]
        done = (children.run if name == "one" else torchrun)(*words)
        assert done.returncode == 0, done.stderr
        lines = map(json.loads, (tmp_path / name / "pretrain" / "log.jsonl").read_text().splitlines())
        logs.append([{key: line[key] for key in line.keys() - TIMES} for line in lines])
        newest = checkpoint.find(tmp_path / name / "pretrain")
        weights.append({**load_file(newest / "model.safetensors"),
                        **load_file(newest / "optimizer.safetensors")})
    for one, two in zip(*logs, strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-5)


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step_with_a_checkpoint(short, tmp_path):
    """It reaches rank 1 in the middle of an update, when the sums of the step have been exchanged. And rank 1
    does not leave before rank 0 has saved: torchrun gives the others 30 seconds once one has ended."""
    script = worker(tmp_path / "worker.py", f"""
make, save, folder = train.make_optimizers, checkpoint.save_step, Path({short.out_dir!r}) / "pretrain"

def make_and_hook(model, cfg):
    optimizers = make(model, cfg)
    steps = []
    def hook(*_):
        steps.append(1)
        if RANK == "1" and len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    optimizers[0].register_step_pre_hook(hook)
    return optimizers

def save_slowly(step, *others):
    Path({str(tmp_path)!r}, f"rank_{{RANK}}_after_{{step}}").touch()
    time.sleep(0.5)
    save(step, *others)

train.make_optimizers, checkpoint.save_step = make_and_hook, save_slowly
try:
    train.main(sys.argv[1:])
finally:
    if checkpoint.checkpoints(folder):
        Path({str(tmp_path)!r}, f"rank_{{RANK}}_left_a_checkpoint").touch()
""")
    with several(2, script, write_preset(tmp_path / "preset.py", short), folder=tmp_path) as processes:
        codes, said = ended(processes, tmp_path)
    assert codes == 2 * [128 + signal.SIGTERM] and "Traceback" not in said, said
    assert [step for step, _ in checkpoint.checkpoints(f"{short.out_dir}/pretrain")] == [3]
    assert sorted(path.name for path in tmp_path.glob("rank_*")) == [
        "rank_0_after_3", "rank_0_left_a_checkpoint", "rank_1_after_3", "rank_1_left_a_checkpoint"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no FIFOs")
def test_the_clock_of_rank_0_ends_a_run_of_two_processes_after_the_same_step(short, tmp_path):
    """The clock of rank 1 runs ten times as fast: alone it would end at a tenth of the time, and hang."""
    script = worker(tmp_path / "worker.py", f"""
clock = time.perf_counter
if RANK == "1":
    time.perf_counter = lambda: 10 * clock()
train.main(sys.argv[1:])
Path({str(tmp_path)!r}, f"rank_{{RANK}}_ended").touch()
""")
    cfg = replace(short, max_seconds=1.5, max_steps=100, warmup_steps=0, decay_steps=None, save_every=0)
    with several(2, script, write_preset(tmp_path / "preset.py", cfg), folder=tmp_path) as processes:
        codes, said = ended(processes, tmp_path)
    assert codes == [0, 0], said
    assert {path.name for path in tmp_path.glob("rank_*")} == {"rank_0_ended", "rank_1_ended"}
    lines = (Path(cfg.out_dir) / "pretrain" / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["elapsed"] >= 1.5 and json.loads(lines[-2])["elapsed"] < 1.6
    assert checkpoint.find(Path(cfg.out_dir) / "pretrain").name == f"step_{len(lines):07}"


def test_where_the_reader_of_two_processes_ends_as_head_does_both_save_and_stop(short, tmp_path):
    preset = write_preset(tmp_path / "preset.py", replace(short, eval_every=1))
    (tmp_path / "process_0").mkdir()
    os.mkfifo(tmp_path / "process_0" / "stdout")
    with several(2, "train.py", preset, folder=tmp_path) as processes:
        with open(tmp_path / "process_0" / "stdout") as reader:
            for _ in range(3):
                assert reader.readline()
        codes, said = ended(processes, tmp_path)
    assert codes == 2 * [128 + signal.SIGTERM] and "Traceback" not in said, said
    ((step, folder),) = checkpoint.checkpoints(f"{short.out_dir}/pretrain")
    lines = (folder.parent / "log.jsonl").read_text().splitlines()
    assert len(lines) == step > 1


def test_the_others_wait_for_the_preparation_of_rank_0_longer_than_for_a_step(short, tmp_path):
    """A process group gives up after PATIENCE; packing millions of chats takes longer than that."""
    script = worker(tmp_path / "worker.py", f"""
import torch
from datetime import timedelta
import config
processes.PATIENCE = timedelta(seconds=2)
here = Path({str(tmp_path)!r})
(here / f"ready_{{RANK}}").touch()
while len(list(here.glob("ready_*"))) < 2:
    time.sleep(0.01)
with processes.start("pretrain", config.load(sys.argv[1:])) as run:
    run.rank_0_first(lambda: (time.sleep(3), (here / "prepared").touch()))
    assert (here / "prepared").exists()
    assert run.sum(torch.ones(1)).item() == 2
""")
    with several(2, script, write_preset(tmp_path / "preset.py", short), folder=tmp_path) as processes:
        codes, said = ended(processes, tmp_path)
    assert codes == [0, 0], said
    assert (tmp_path / "prepared").exists()


def test_a_process_whose_partner_falls_silent_ends_with_an_error_and_intact_checkpoints(short, tmp_path):
    """As two hosts do when the cable between them is cut (tests/long/workers.py)."""
    script = worker(tmp_path / "worker.py", f"""
from datetime import timedelta
processes.PATIENCE, step = timedelta(seconds=3), train.train_step
here = Path({str(tmp_path)!r})

def stopping(number, *others):
    if (RANK, number) == ("1", 3):
        os.kill(os.getpid(), signal.SIGSTOP)
    return step(number, *others)

train.train_step = stopping
(here / f"ready_{{RANK}}").touch()
while len(list(here.glob("ready_*"))) < 2:
    time.sleep(0.01)
train.main(sys.argv[1:])
""")
    cfg = replace(short, save_every=1, keep_checkpoints=0)
    with several(2, script, write_preset(tmp_path / "preset.py", cfg), folder=tmp_path) as processes:
        processes[0].join(100)
        assert processes[0].exitcode == 1 and processes[1].is_alive()
    steps = checkpoint.checkpoints(f"{short.out_dir}/pretrain")
    assert [step for step, _ in steps] == [1, 2, 3]
    assert not any(checkpoint.damage(step) for _, step in steps)


def test_a_mistake_that_rank_0_finds_while_it_prepares_ends_all_with_one_sentence(small, tmp_path):
    """The second document is damaged; the tokenizer is there, so that only the preparation reads texts."""
    (tmp_path / "bad.jsonl").write_text('{"text": "the cat"}\n{"text": 7}\n')
    cfg = replace(small, data=((str(tmp_path / "bad.jsonl"), 1.0),))
    done = torchrun("train.py", write_preset(tmp_path / "preset.py", cfg))
    said = done.stderr
    reports = said.count("ChildFailedError:")  # torchrun's own, that a process has ended
    assert done.returncode != 0 and said.count("Traceback") == reports, said
    assert said.count("error: ") == said.count("bad.jsonl line 2") == 1


def test_the_machine_is_checked_in_the_first_second(small):
    absent = "cuda" if torch.backends.mps.is_available() else "mps"
    with pytest.raises(UserError, match="not available"):
        with start("pretrain", replace(small, device=absent)):
            pass


# ---------------------------------------------------------------------------------------------------------
# batches in advance


def test_a_thread_makes_two_batches_in_advance_in_the_order_of_one_split_and_then_waits():
    made, proceed = [], threading.Semaphore(0)

    def get_batch(split, i):
        assert threading.current_thread() is not threading.main_thread()
        made.append((split, i))
        proceed.release()
        return None if (split, i) == ("val", 1) else (torch.tensor([i]),)

    def asked(split, i, new):
        """What is answered, when `new` more batches are made."""
        batch = fetch(split, i)
        for _ in range(new):
            assert proceed.acquire(timeout=10)
        assert not proceed.acquire(timeout=0.05)
        return batch and int(batch[0])

    with prefetch(get_batch) as fetch:
        assert [asked("train", 5, 3), asked("train", 6, 1)] == [5, 6]
        assert [asked("val", 0, 3), asked("val", 1, 1)] == [0, None]  # a validation ends
        assert [asked("train", 7, 1), asked("val", 0, 2)] == [7, 0]  # and the next one begins
        assert asked("train", 40, 3) == 40
    assert made == [*(("train", i) for i in (5, 6, 7, 8)), *(("val", i) for i in (0, 1, 2, 3)), ("train", 9),
                    ("val", 0), ("val", 1), *(("train", i) for i in (40, 41, 42))]


def test_a_mistake_in_a_batch_is_reported_when_that_batch_is_needed_and_the_thread_ends():
    def get_batch(split, i):
        if i == 2:
            raise UserError("the tokens are damaged")
        return (torch.tensor([i]),)

    before = threading.active_count()
    with pytest.raises(UserError, match="damaged"):
        with prefetch(get_batch) as fetch:
            for i in range(9):
                last = fetch("train", i)
    assert last[0] == 1 and threading.active_count() == before


def test_a_run_that_fails_or_is_interrupted_ends_the_thread_although_a_batch_is_being_made():
    begun, end, before = threading.Event(), threading.Event(), threading.active_count()

    def get_batch(split, i):
        if i:
            begun.set()
            end.wait(10)
        return (torch.tensor([i]),)

    threading.Timer(0.2, end.set).start()
    with pytest.raises(KeyboardInterrupt), prefetch(get_batch) as fetch:
        fetch("train", 0)
        assert begun.wait(10)
        raise KeyboardInterrupt
    assert end.is_set() and threading.active_count() == before


# ---------------------------------------------------------------------------------------------------------
# what a failed command leaves


@pytest.mark.parametrize("main, fields, says", [
    (train.main, dict(init_from="nowhere/at/all"), "there is no checkpoint nowhere/at/all"),
    (train.main, dict(data=(("fineweb-edu-dedup", 1.0),)), "are not ready"),
    (train.main, dict(device="mps"), "not available"),
    (sft.main, dict(init_from="nowhere/at/all", fractions=True), "there is no checkpoint nowhere/at/all"),
    (sft.main, dict(fractions=True), "sft.py continues from a model"),
    (dpo.main, dict(init_from="nowhere/at/all", fractions=True), "there is no checkpoint nowhere/at/all"),
    (dpo.main, dict(init_from="nowhere/at/all"), "this config is for train.py")])
def test_a_command_that_fails_before_its_work_leaves_no_folder(small, tmp_path, main, fields, says):
    cfg = replace(small, **{"dpo_max_length": 32, "dpo_max_prompt_length": 16, **fields})
    if cfg.device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has what it must lack here")
    with pytest.raises(UserError, match=says):
        main([write_preset(tmp_path / "preset.py", cfg)])
    assert not Path(cfg.out_dir).exists()


def test_a_second_process_that_is_refused_leaves_the_folder_of_the_first_one(short, tmp_path):
    folder = Path(short.out_dir) / "pretrain"
    with disk.lock(folder / "lock"), pytest.raises(UserError, match="another process is writing"):
        train.main([write_preset(tmp_path / "preset.py", short)])
    assert (folder / "lock").exists()


# ---------------------------------------------------------------------------------------------------------
# what a training command prepares by itself


def test_training_prepares_a_local_source_by_itself_and_says_so(small, tmp_path, capsys):
    cfg = replace(small, max_steps=1, warmup_steps=0, decay_steps=0)
    train.main([write_preset(tmp_path / "preset.py", cfg)])
    assert f"preparing the tokens of {cfg.sources[0]}" in capsys.readouterr().out
    assert checkpoint.find(f"{cfg.out_dir}/pretrain").name == "step_0000001"


@pytest.mark.parametrize("trained", [True, False])
def test_training_on_a_source_of_the_hub_stops_with_the_command_that_prepares_it(small, tmp_path, trained):
    """Immediately, without asking the hub; with a trained tokenizer or without one."""
    cfg = replace(small, data=(("fineweb-edu-dedup", 1.0),), tokenizer=small.tokenizer if trained else None)
    preset = write_preset(tmp_path / "preset.py", cfg)
    with pytest.raises(UserError, match=f"prepare them with python data.py {preset} --lr=0.01"):
        train.main([preset, "--lr=0.01"])


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("Tesla T4", None)])
def test_the_peak_of_a_card_is_found_by_its_name(name, peak):
    assert peak_of(name) == peak
