"""
plumbing/card.py: the model card of a finished run: README.md in its last step folder, as the hub shows it.

It repeats what is on the disk: train.json says how the model was made and on which machine, log.jsonl how the
losses fell, eval.jsonl what python -m evals found. Only the sample is new. A card is no part of the
checkpoint: it has no digest in B2SUMS, and nothing reads it.
"""

from pathlib import Path
from statistics import median
from textwrap import indent

import torch

from config import Config, UserError
from corpus.sources import is_builtin
from model import SmolLM
from plumbing import checkpoint, disk
from plumbing.processes import escape_controls
from sample import DEFAULTS, generate
from tokenizer import Tokenizer

MARK = "<!-- python -m evals writes this file again: delete this line to keep your changes -->"
STAGES = {"pretrain": "pretraining", "sft": "fine-tuning on chats", "dpo": "training on preferences"}
SHOWN_ELSEWHERE = ("data", "fractions", "out_dir", "init_from", "dtype")
NOT_RESULTS = ("checkpoint", "task", "generation_prompt", "seconds")
LENGTH = 60  # tokens of the sample


def write(folder: Path, model: SmolLM, tok: Tokenizer) -> None:
    """Write the card of a step folder. A model that was not trained here, and an edited card, keep theirs."""
    path, log = folder / "README.md", disk.read_lines(folder.parent / "log.jsonl")
    is_ours = not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace")
    if is_ours and log and (folder / "train.json").exists():
        facts = disk.read_json(folder / "train.json", {"step": int, "config": {"data": []}})
        log = [line for line in log if line.get("step") in range(facts["step"] + 1)]
        parts = [*about(folder, facts, log, model, tok), *evaluation(folder), *sample(model, tok),
                 *limits(model, tok), MARK]
        try:
            disk.write_text(path, "\n".join(parts) + "\n")
        except UserError as error:  # a finished run stays finished
            print(f"no model card: {error}")


def about(folder: Path, facts: dict, log: list[dict], model: SmolLM, tok: Tokenizer) -> list[str]:
    """The lines up to the evaluation: what the model is, how it was made, how long that took."""
    cfg, start, default = facts["config"], facts.get("started_from"), Config()
    seconds, tokens, speeds = ([line[name] for line in log if isinstance(line.get(name), float | int)] or [0]
                               for name in ("seconds", "tokens", "tokens_per_second"))
    last = [f"{name} {value:.3f}" for name, value in (log or [{}])[-1].items()
            if isinstance(value, float) and (name == "loss" or name.startswith("val_"))]
    versions = [f"{name} {version}" for name, version in facts.get("versions", {}).items()]
    rows = {"data, with " + ("fractions of sources" if cfg.get("fractions") else "shares of the text"):
            ", ".join(" ".join(map(str, entry)) for entry in cfg["data"]),
            "work": f"{len(log):,} steps, {sum(tokens):,} tokens, in {cfg.get('dtype')}",
            "time": f"{sum(seconds):,.0f} s in steps, a median of {median(speeds):,.0f} tokens per second",
            "machine": "; ".join([facts.get("machine", "unknown"), *versions]),
            "last losses": ", ".join(last),
            "settings unlike SmolLM-135M's": " ".join(
                f"`{name}={value}`" for name, value in cfg.items()
                if name not in SHOWN_ELSEWHERE and value != getattr(default, name, None))}
    n_params, stage = sum(weight.numel() for weight in model.parameters()), folder.parent.name
    return [*front_matter(model, [entry[0] for entry in cfg["data"]], start),
            f"# {folder.resolve().parents[1].name}, {stage}", "",
            f"A language model of {n_params:,} parameters and {tok.vocab_size:,} tokens, after "
            f"{STAGES.get(stage, stage)}" + (f", which started from `{start}`." if start else "."), "",
            f"    {facts.get('command', '')}", "", *table("how it was made", rows)]


def front_matter(model: SmolLM, sources: list, start: str | None) -> list[str]:
    """What the hub reads. Language and license are known only where all text is the built-in one."""
    before = Path(start) / "README.md" if start else None
    known = all(map(is_builtin, sources)) and (
        not before or before.exists() and "license: mit" in before.read_text("utf-8", "replace"))
    return ["---", *(["language: en", "license: mit"] if known else []),
            *([] if checkpoint.not_llama(model) else ["library_name: transformers"]),
            "pipeline_tag: text-generation", "---", ""]


def evaluation(folder: Path) -> list[str]:
    """A table for each task: its newest evaluation of this checkpoint, with the generation prompt."""
    found = {line.get("task"): line for line in disk.read_lines(folder.parent / "eval.jsonl")
             if line.get("checkpoint") == folder.name
             and (line.get("task") != "builtin" or line.get("generation_prompt"))}
    lines = []
    for task, line in found.items():
        rows = {}
        for name, value in line.items():
            if name not in NOT_RESULTS and not name.endswith("stderr"):
                form = "" if not isinstance(value, float) else (
                    ".3f" if name.startswith(("bits", "loss", "perplexity")) else ".1%")
                error = line.get(f"{name} stderr", line.get(f"{name}_stderr"))
                rows[name] = f"{value:{form}}" + (f" +- {error:{form}}" if isinstance(error, float) else "")
        lines += table(f"python -m evals, {task}", rows)
    return lines


def sample(model: SmolLM, tok: Tokenizer) -> list[str]:
    """What the model writes, with the command that makes it write the same again."""
    if tok.is_chat:
        said, flag = "Who are you?", "chat"
        ids, _ = tok.chat([{"role": "user", "content": said}], add_generation_prompt=True)
    else:
        said, flag = "Once upon a time", "prompt"
        ids = tok.encode(said)
    with torch.compiler.set_stance("force_eager"):  # or each length would be compiled
        settings: dict = DEFAULTS | {"max_new_tokens": LENGTH}
        new = list(generate(model, ids, **settings, stop_ids=tok.stop_ids))
    text = escape_controls(tok.decode(new))
    return [f"## A sample\n\n    python sample.py FOLDER --{flag} \"{said}\" --max_new_tokens={LENGTH}\n",
            indent(text if tok.is_chat else said + text, "    ", lambda line: True), ""]


def limits(model: SmolLM, tok: Tokenizer) -> list[str]:
    flag = "--chat" if tok.is_chat else '--prompt "..."'
    return ["## Use and limits", "", f"    python sample.py FOLDER {flag}", "",
            "FOLDER is the one that contains this file. The model reads at most "
            f"{model.cfg.seq_len:,} tokens, knows only what was in its data, and can be wrong in fluent "
            "sentences: check what it says.", ""]


def table(title: str, rows: dict[str, str]) -> list[str]:
    return [f"| {title} | |", "|---|---|",
            *(f"| {name} | {value} |".replace("\n", " ") for name, value in rows.items()), ""]
