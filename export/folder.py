"""export/folder.py: a checkpoint as a small Hugging Face folder: what others need to use it, in 16 bits."""

import shutil
from pathlib import Path

import torch

from plumbing import checkpoint, disk

QUANTS = {"bf16": torch.bfloat16, "f32": torch.float32}


def write(folder: Path, out: Path, quant: str) -> Path:
    """Write weights, tokenizer, card and digests to `out`, which must not exist. Returns `out`.

    bfloat16 keeps 8 of the 24 bits of precision of each weight.
    """
    model, tok = checkpoint.load(folder)
    with disk.new_folder(out) as new:
        checkpoint.save(new, model, tok, QUANTS[quant])
        if (folder / "train.json").exists():  # which texts are unseen
            shutil.copyfile(folder / "train.json", new / "train.json")
        checkpoint.write_sums(new)
        if (folder / "README.md").exists():  # the card, which may be edited
            shutil.copyfile(folder / "README.md", new / "README.md")
    return out
