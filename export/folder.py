"""export/folder.py: a checkpoint as a small Hugging Face folder: what others need to use it, in 16 bits."""

import shutil
from pathlib import Path

import torch

from plumbing import checkpoint, disk

QUANTS = {"bf16": torch.bfloat16, "f32": torch.float32}
KEPT = ("README.md", "train.json")  # the card, and what the model was trained on; not what resuming needs


def write(folder: Path, out: Path, quant: str) -> Path:
    """Write weights, tokenizer, card and digests to `out`, which must not exist. Returns `out`.

    bfloat16 keeps 8 of the 24 bits of precision of each weight.
    """
    model, tok = checkpoint.load(folder)
    with disk.new_folder(out) as new:
        checkpoint.save(new, model, tok, QUANTS[quant])
        for name in KEPT:
            if (folder / name).exists():
                shutil.copyfile(folder / name, new / name)
        checkpoint.write_sums(new)
    return out
