"""Does it work on this machine's GPU, NVIDIA's or Apple's? python -m pytest -m device answers in a minute.

Five training steps, a resume, and twenty greedy tokens, compared with the CPU. The ordinary tests run this
with the CPU on both sides, so that it stays correct where nobody has a GPU.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_preset

import train
from plumbing import checkpoint
from plumbing.processes import pick_device
from sample import generate


@pytest.fixture(params=["cpu", pytest.param("auto", marks=pytest.mark.device)])
def device(request):
    found = pick_device(request.param).type
    if request.param == "auto" and found == "cpu":
        pytest.skip("this machine has neither cuda nor mps")
    return found


def losses(cfg, device, *stops):
    """Losses and gradient norms of five steps on a device, in a run that ends and resumes after `stops`."""
    out = Path(cfg.out_dir).parent / f"{device}_{len(stops)}"
    preset = write_preset(out.with_suffix(".py"), replace(cfg, device=device, out_dir=str(out)))
    for stop in (*stops, 5):
        train.main([preset, f"--max_steps={stop}"])
    lines = [json.loads(line) for line in (out / "pretrain" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    return [line[name] for line in lines for name in ("loss", "grad_norm")], out / "pretrain"


@pytest.mark.parametrize("dtype, doc_mask, tolerance", [("float32", False, 1e-4), ("bfloat16", True, 0.02)])
def test_five_steps_a_resume_and_twenty_greedy_tokens_are_those_of_the_cpu(
        small, tok, device, dtype, doc_mask, tolerance):
    """A GPU adds in another order. Noise of 1e-5 on every weight changes these losses and norms by 4e-6, so
    1e-4 is generous. bfloat16 itself changes them by 0.4%, and forgetting the mask by 8%: 2% is between."""
    cfg = replace(small, dtype=dtype, doc_mask=doc_mask, warmup_steps=0, decay_steps=0, eval_every=2)
    expected, _ = losses(cfg, "cpu", 1)
    undisturbed, _ = losses(cfg, device)
    resumed, folder = losses(cfg, device, 2, 3)
    assert undisturbed == pytest.approx(expected, rel=tolerance)
    assert resumed == pytest.approx(undisturbed, rel=tolerance)

    model, _ = checkpoint.load(folder)
    prompt = tok.encode("the cat sat on")
    text = prompt + list(generate(model.to(device), prompt, 20, temperature=0))
    logits = model.cpu()(torch.tensor([text]))[0, len(prompt) - 1:-1]  # what the CPU thinks of each choice
    chosen = logits.gather(1, torch.tensor(text[len(prompt):])[:, None])[:, 0]
    assert len(chosen) == 20
    torch.testing.assert_close(chosen, logits.amax(1), rtol=0, atol=1e-3)  # the best, but for a tie
