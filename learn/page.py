"""
page.py: what the model computed for one text, as a page to explore. Part of learn/look.py.

The page is learn/look.html, a template without any dependency, with the numbers in it as JSON.
"""

import base64
import html
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import UserError
from plumbing import disk

TEMPLATE = Path(__file__).with_name("look.html")
MOST_BYTES = 20_000_000  # of attention weights: one for each pair of positions in each head


def packed(weights: Tensor) -> str:
    """Weights (L, H, T, T) as base64: a byte, 255 for 1, for each position that may be seen, row by row."""
    L, H, T, _ = weights.shape
    if L * H * T * (T + 1) // 2 > MOST_BYTES:
        raise UserError(f"{T} tokens are too many for a page with {L * H} heads: shorten the text")
    seen = torch.ones(T, T).tril().bool()
    return base64.b64encode((weights[..., seen] * 255).round().byte().numpy().tobytes()).decode()


def fill(name: str, numbers: dict[str, Any]) -> str:
    """The template with a name and numbers. "<" in the JSON is escaped, or "</script>" would end it."""
    text = json.dumps(numbers, ensure_ascii=False).replace("<", "\\u003c")
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace("{{name}}", html.escape(name)).replace("{{data}}", text)


def write(path: str, name: str, numbers: dict[str, Any]) -> None:
    disk.write_text(Path(path), fill(name, numbers))
