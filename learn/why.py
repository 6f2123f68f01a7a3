"""
why.py: what if we had chosen otherwise?

The demo's training again and again, each time with one thing changed, with three seeds each:

    python -m learn.why --jobs=2                          everything: a night on two cores
    python -m learn.why --max_steps=150 --jobs=2          pretraining of a sixth of the length
    python -m learn.why adamw digits                      only these, and what they are compared with

Every run is scored in two ways: the questions of python -m evals, and bits per byte of texts that no stage
trained on, 100 kB of each of the demo's sources. The scores go to out/why/runs/*/score.json, and a table with
means and ranges to the screen. Interrupted, it resumes with the runs that have no score. The results, and
what they mean: docs/why.md.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import plumbing  # noqa: F401  # isort: skip  # before torch: it sets how threads wait

import torch
from tqdm import tqdm

from config import UserError
from config.demo import config as demo
from corpus.pairs import pairs
from curate.experiment import mean_and_range
from evals.answers import answers, ask_all, prompt_of
from evals.score import bits_per_byte, score_pairs, share_of_chosen, text_losses, unseen_texts
from learn.exercise import ROOT, copy_project
from plumbing import checkpoint, disk
from plumbing.processes import command

SEEDS = (8, 9, 10)
BYTES = 100_000  # of unseen text of each source
STAGES = {"pretrain": ("train.py", "config/demo.py"), "sft": ("sft.py", "config/demo_sft.py"),
          "dpo": ("dpo.py", "config/demo_dpo.py")}


@dataclass(frozen=True)
class Change:
    """One thing that is different: flags of a stage, or an edit of the code (file, old text, new text)."""

    name: str
    what: str
    flags: str = ""
    stage: str = "pretrain"
    edit: tuple[str, str, str] | None = None
    steps: float = 1.0  # of the usual number


# Where a change would alter the number of parameters, 2,213,568, the width was adapted to give the same.
CHANGES = (
    Change("base", "the demo as it is"),
    Change("adamw", "AdamW instead of Muon", "--optimizer=adamw"),
    Change("adamw_low", "AdamW, half the rate", "--optimizer=adamw --lr=3e-3"),
    Change("adamw_lower", "AdamW, a quarter of the rate", "--optimizer=adamw --lr=1.5e-3"),
    Change("wide", "2 layers of 256 instead of 4 of 192", "--n_layer=2 --d_model=256 --d_ff=672"),
    Change("wide_longer", "the same two layers for the same time", "--n_layer=2 --d_model=256 --d_ff=672",
           steps=1.16),  # its steps take 0.86 of the time
    Change("untied", "a head of its own, width 168", "--tie_embeddings=False --d_model=168 --d_ff=416"),
    Change("mha", "4 key/value heads instead of 2", "--n_kv_head=4"),
    Change("mqa", "1 key/value head instead of 2", "--n_kv_head=1"),
    Change("rope", "rope_theta 10,000 instead of 1,000", "--rope_theta=10000"),
    Change("no_mask", "documents in a row see each other", "--doc_mask=False"),
    Change("init", "init_std 0.02 instead of 0.06", "--init_std=0.02"),
    Change("no_warmup", "no warm-up", "--warmup_ratio=0"),
    Change("no_decay", "no decay", "--decay_steps=0"),
    Change("cosine", "a cosine instead of warm-up, stable, decay", "--schedule=cosine"),
    Change("no_clip", "no clipping of the gradient", "--grad_clip=1e9"),
    Change("no_weight_decay", "no weight decay", "--weight_decay=0"),
    Change("vocab_1024", "1,024 token ids instead of 3,072", "--vocab_size=1024"),
    Change("vocab_8192", "8,192 token ids instead of 3,072", "--vocab_size=8192"),
    Change("digits", "digits in groups of up to three", edit=(
        "tokenizer.py", "pre_tokenizers.Digits(individual_digits=True)",
        'pre_tokenizers.Split(tokenizers.Regex("[0-9]{1,3}"), "isolated")')),
    Change("sft", "the demo's fine-tuning as it is", stage="sft"),
    Change("every_token", "loss on every token, also the user's", "--train_on_prompts=True", "sft"),
    Change("dpo", "the demo's preferences as they are", stage="dpo"),
    Change("beta_0.03", "beta 0.03 instead of 0.3", "--dpo_beta=0.03", "dpo"),
    Change("beta_3", "beta 3 instead of 0.3", "--dpo_beta=3", "dpo"),
    Change("unbalanced", "pairs not balanced by length", stage="dpo", edit=(
        "corpus/pairs.py", "balanced(faulty(exchanges, rng))", "faulty(exchanges, rng)")),
)
USUAL = {"pretrain": "base", "sft": "sft", "dpo": "dpo"}  # what the changes of a stage are compared with

# ---------------------------------------------------------------------------------------------------------
# one run: everything happens in processes of their own, since an edit needs a copy of the code


def code_of(change: Change, folder: Path) -> Path:
    """The folder of the project with a change's edit."""
    if change.edit is None:
        return ROOT
    file, old, new = change.edit
    text = (ROOT / file).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file} contains this {text.count(old)} times, not once: {old}"
    copy_project(folder / "code" / change.name, {file: text.replace(old, new)})
    return folder / "code" / change.name


def python(code: Path, threads: int, log: Path, *words: object) -> None:
    """Run a command of the project at `code`; what it prints goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, *map(str, words)], cwd=code, stdout=file, stderr=file,
                              env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        raise UserError(f"python {' '.join(map(str, words))} failed: see {log}")


def tokens_of(change: Change, folder: Path, threads: int) -> Path:
    """The folder with the tokenizer and the token shards that a run reads, which several runs share."""
    own = change if change.edit or "vocab" in change.flags else CHANGES[0]
    made = folder / "tokens" / own.name
    if not (made / "done").exists():
        python(code_of(own, folder), threads, made / "log.txt", "data.py", "config/demo.py",
               f"--out_dir={made}", *own.flags.split())
        (made / "done").touch()
    return made


def one_run(change: Change, seed: int, folder: Path, threads: int, flags: list[str]) -> None:
    """Train and score one model, unless that is done."""
    out, code = folder / "runs" / f"{change.name}_{seed}", code_of(change, folder)
    if (out / "score.json").exists():
        return
    words: list = [*STAGES[change.stage], f"--out_dir={out}", f"--seed={seed}", *change.flags.split(), *flags]
    if change.stage == "pretrain":
        tokens = tokens_of(change, folder, threads)
        shutil.copytree(tokens / "data", out / "data", dirs_exist_ok=True)
        words += [f"--tokenizer={tokens / 'tokenizer'}", "--eval_every=0", "--save_every=0",
                  "--sample_every=0"]
    else:
        before = "base" if change.stage == "sft" else "sft"
        words.append(f"--init_from={folder}/runs/{before}_{seed}/{'pretrain' if before == 'base' else 'sft'}")
    python(code, threads, out / "log.txt", *words)
    python(code, threads, out / "log.txt", "-m", "learn.why", "--score", out / change.stage, folder)
    shutil.rmtree(out / "data", ignore_errors=True)


def score(stage: Path, folder: Path) -> None:
    """Write score.json of a run: what its newest checkpoint knows, and what its steps took."""
    model, tok = checkpoint.load(stage)
    model.cfg = model.model.cfg = replace(model.cfg, doc_mask=True)  # texts never see their neighbors here
    log = disk.read_lines(stage / "log.jsonl")
    line = {"parameters": sum(weight.numel() for weight in model.parameters()), "steps": log[-1]["step"],
            "seconds per step": statistics.median(each["seconds"] for each in log)}
    texts = disk.read_lines(folder / "unseen.jsonl")
    losses = {source: text_losses(model, tok, [each["text"] for each in texts if each["source"] == source])
              for source in demo.sources}
    line |= {f"bits {source}": bits_per_byte(of)[0] for source, of in losses.items()}
    line["bits"] = bits_per_byte(torch.cat(list(losses.values())))[0]
    if stage.name != "pretrain" or line["steps"] >= demo.max_steps:  # a shorter run cannot answer yet
        line |= {group: right / n for group, (right, n) in ask_all(model, tok).items()}
    if stage.name == "dpo":
        line["pairs"] = share_of_chosen(score_pairs(model, tok))
    if stage.name != "pretrain":
        asked = [pair["chosen"] for pair in pairs("why", 200, held_out=True)]
        written = answers(model, tok, [prompt_of(tok, chat[0]["content"]) for chat in asked])
        usual = sum(len(chat[1]["content"]) for chat in asked)
        line["length"] = sum(len(text) for text, _ in written) / usual
    disk.write_json(stage.parent / "score.json", line)


def write_unseen(folder: Path) -> None:
    """unseen.jsonl: texts that no stage of the demo trains on."""
    lines: list[dict] = []
    if (folder / "unseen.jsonl").exists():
        return
    for source in demo.sources:
        n_bytes = 0
        for text in unseen_texts(source, demo.val_fraction):
            lines.append({"source": source, "text": text})
            n_bytes += len(text.encode())
            if n_bytes > BYTES:
                break
    disk.write_text(folder / "unseen.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


# ---------------------------------------------------------------------------------------------------------
# all runs, and their table

COLUMNS = {"bits": ("bits per byte", ".3f"), "bits builtin-transcripts": ("of chats", ".3f"),
           "all questions": ("questions", ".0%"), "two-digit sums, held out": ("sums", ".0%"),
           "pairs": ("pairs", ".0%"), "length": ("length", ".2f")}


def table(folder: Path) -> Iterator[str]:
    """Mean and range over the seeds that are done, as lines of a Markdown table."""
    yield "| | what is different | runs | " + " | ".join(title for title, _ in COLUMNS.values()) + " |"
    yield "|" + "---|" * (3 + len(COLUMNS))
    for change in CHANGES:
        files = [folder / "runs" / f"{change.name}_{seed}" / "score.json" for seed in SEEDS]
        scores = [disk.read_json(file) for file in files if file.exists()]
        cells = []
        for name, (_, form) in COLUMNS.items():
            values = [score[name] for score in scores if name in score]
            cells.append(mean_and_range(values, form) if values else "")
        if scores:
            yield f"| `{change.name}` | {change.what} | {len(scores)} | {' | '.join(cells)} |"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m learn.why", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="change", help=f"one of {', '.join(names_of())}")
    parser.add_argument("--max_steps", type=int, default=demo.max_steps, help="of pretraining")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--out_dir", default="out/why", help="default out/why")
    parser.add_argument("--score", nargs=2, metavar=("STAGE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.score:
        return score(*map(Path, args.score))
    if unknown := [name for name in args.names if name not in names_of()]:
        raise UserError(f"there is no change {unknown[0]!r}: there are {', '.join(names_of())}")
    for name, value in (("jobs", args.jobs), ("max_steps", args.max_steps)):
        if value < 1:
            raise UserError(f"--{name}={value} must be 1 or more")
    folder, threads = Path(args.out_dir).resolve(), max(1, (os.cpu_count() or 1) // args.jobs)
    with disk.writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    wanted = [change for change in CHANGES if not args.names or change.name in args.names]
    needed = {"base"} | {USUAL[change.stage] for change in wanted} | {change.name for change in wanted}
    needed |= {"sft"} if "dpo" in needed else set()  # a stage begins with a model of the one before
    write_unseen(folder)
    for change in CHANGES:
        if change.name in needed and change.stage == "pretrain":
            tokens_of(change, folder, threads)
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(unit=" runs", disable=None) as bar:
        for stage in STAGES:
            runs = [(change, seed) for seed in SEEDS for change in CHANGES
                    if change.name in needed and change.stage == stage]
            bar.total = (bar.total or 0) + len(runs)
            started = [pool.submit(one_run, change, seed, folder, threads, steps(change, args))
                       for change, seed in runs]
            for run in started:
                run.result()
                bar.update()
    print("\n".join(table(folder)))


def names_of() -> list[str]:
    return [change.name for change in CHANGES]


def steps(change: Change, args: argparse.Namespace) -> list[str]:
    return [f"--max_steps={round(change.steps * args.max_steps)}"] if change.stage == "pretrain" else []


if __name__ == "__main__":
    command(main, own_help=True)
