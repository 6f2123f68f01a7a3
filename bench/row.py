"""
bench/row.py: the figures of one training, as cells of a table (bench/gpu.sh).

    python -m bench.row 24 train config/smol_135m.py --data=builtin --max_steps=16 ...
    python -m bench.row 24 sft config/smol_135m_sft.py ...            from random weights

The first word n means chunks of 2^n logits in the head. Nothing is saved: a checkpoint takes longer than the
steps, of which the last half counts.
"""

import importlib
import sys
from pathlib import Path
from statistics import median

import plumbing  # noqa: F401  # isort: skip  # before torch: it sets how threads wait

import config
import model
import train
from plumbing import checkpoint, disk
from plumbing.processes import command
from tokenizer import load_or_train

STAGES = {"train": "pretrain", "sft": "sft"}


def main(argv: list[str]) -> None:
    chunk, script, *flags = argv
    cfg = config.load(flags)
    out = Path(cfg.out_dir)
    if script == "sft":
        checkpoint.save(out / "start", model.SmolLM(cfg), load_or_train(cfg))
        flags.append(f"--init_from={out / 'start'}")
    model.LOGITS_AT_ONCE = 2**int(chunk)
    checkpoint.save_step = train.write_card = lambda *_: None  # type: ignore[assignment]
    importlib.import_module(script).main(flags)
    log = disk.read_lines(out / STAGES[script] / "log.jsonl")
    lines = log[len(log) // 2:]
    mfu = f"{median(line['mfu'] for line in lines):.1%}" if "mfu" in lines[0] else "peak unknown"
    print(f"cells: {cfg.tokens_per_step / median(line['seconds'] for line in lines):,.0f} | {mfu} | "
          f"{lines[-1].get('peak_gb', 0):.1f}")


if __name__ == "__main__":
    sys.argv[0] = "bench/row.py"
    command(main)
