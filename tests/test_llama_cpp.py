"""The files of python -m export --format=gguf in the real llama.cpp. It compiles for ten minutes, so by hand:

pip install -r requirements-interop.txt && python -m pytest -m interop tests/test_llama_cpp.py -s
"""

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_tokenizer import CONVERSATION, PYTHON, TEXTS, TRICKY

from config import Config
from export import gguf_file
from model import SmolLM
from plumbing import checkpoint
from sample import generate
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
STORY = (ROOT / "corpus" / "story.txt").read_text(encoding="utf-8")
WINDOW = 128


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, model, tok): a chat model with its own tokenizer, trained for a minute on a story."""
    torch.manual_seed(0)
    tok = Tokenizer.train([STORY, PYTHON], 800).for_chat()
    shape = dict(vocab_size=800, n_layer=3, n_head=4, n_kv_head=2, d_model=96, d_ff=256)
    cfg = Config(**shape, seq_len=WINDOW, rope_theta=2000.0, init_std=0.08)
    model, ids = SmolLM(cfg), torch.tensor(tok.encode(STORY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    for _ in range(250):
        rows = torch.stack(
            [ids[s : s + WINDOW + 1] for s in torch.randint(len(ids) - WINDOW - 1, (12,)).tolist()]
        )
        loss = -model(rows[:, :-1], rows[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("trained")
    checkpoint.save(folder, model, tok)
    return folder, model.eval(), tok


def engine(folder, path, quant):
    llama_cpp = pytest.importorskip("llama_cpp")
    gguf_file.write(folder, path / f"{quant}.gguf", quant)
    return llama_cpp.Llama(
        str(path / f"{quant}.gguf"), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, verbose=False, n_threads=1
    )


def their_logits(llama, ids):
    llama.reset()
    llama.eval(ids)
    return torch.tensor(llama.scores[: len(ids)])


@torch.no_grad()
def perplexity(logits_of, ids):
    """exp of the mean cross-entropy of ids, in windows of WINDOW."""
    found = []
    for start in range(0, len(ids) - 1, WINDOW - 1):
        row = ids[start : start + WINDOW]
        found.append(F.cross_entropy(logits_of(row)[:-1], torch.tensor(row[1:]), reduction="none"))
    return torch.cat(found).mean().exp().item()


def random_texts(n):
    """Texts of characters of all kinds on which llama.cpp's Unicode tables and ours agree."""
    rng = random.Random(0)
    kinds = "ab'sT .,!?\n\t \r12½²Ⅻ٣四é\u0301ßжन中文か한😀👩\u200d🚀\u00a0\u3000\u2028_<|>\x01\x7f\u0378"
    return ["".join(rng.choices(kinds, k=rng.randint(1, 40))) for _ in range(n)]


@pytest.mark.interop
def test_llama_cpp_tokenizes_as_we_do(trained, tmp_path):
    folder, _, tok = trained
    llama = engine(folder, tmp_path, "f16")
    for text in [*TRICKY, *TEXTS.values(), *random_texts(2000)]:
        ids = llama.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == tok.encode(text), text
        assert llama.detokenize(ids) == text.encode()
    assert (llama.token_bos(), llama.token_eos(), llama.n_vocab()) == (1, 2, 800)


@pytest.mark.interop
def test_llama_cpp_prompts_a_chat_model_as_we_do(trained, tmp_path):
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    folder, _, tok = trained
    llama = engine(folder, tmp_path, "q8_0")
    messages = [
        {"role": "system", "content": "Be brief."},
        *CONVERSATION,
        {"role": "user", "content": "1+1=?"},
    ]
    chat = Jinja2ChatFormatter(llama.metadata["tokenizer.chat_template"], "<|im_end|>", "<|im_start|>")
    text = chat(messages=messages).prompt
    assert llama.tokenize(text.encode(), add_bos=False, special=True) == tok.chat(messages, True)[0]


@pytest.mark.interop
@pytest.mark.parametrize("quant", ["f16", "bf16"])
def test_llama_cpp_writes_our_greedy_text(trained, tmp_path, quant):
    """Where our two best logits are more than 0.05 apart, its best token is ours. When it generates, its text
    is ours up to the first position where they are closer."""
    folder, model, tok = trained
    llama = engine(folder, tmp_path, quant)
    compared = 0
    for start in range(0, 6000, 1000):
        prompt = tok.encode(STORY[start : start + 60])
        ids = prompt + list(generate(model, prompt, WINDOW - len(prompt), temperature=0))
        with torch.no_grad():
            ours = model(torch.tensor([ids]))[0]
        best = ours.topk(2).values
        clear = best[:, 0] - best[:, 1] > 0.05
        assert torch.equal(their_logits(llama, ids).argmax(-1)[clear], ours.argmax(-1)[clear])
        compared += clear.sum().item()
        n = clear[len(prompt) - 1 :].long().cumprod(0).sum()  # choices before the first close one
        llama.reset()
        made = llama.generate(prompt, temp=0, repeat_penalty=1.0)
        assert [next(made) for _ in ids[len(prompt) :][:n]] == ids[len(prompt) :][:n]
    assert compared > 500


@pytest.mark.interop
@pytest.mark.parametrize(("quant", "most"), [("f16", 0.001), ("bf16", 0.01), ("q8_0", 0.01), ("q4_0", 0.1)])
def test_llama_cpps_perplexity_is_ours(trained, tmp_path, quant, most):
    folder, model, tok = trained
    ids = tok.encode(STORY)[:4000]
    llama = engine(folder, tmp_path, quant)
    ours = perplexity(lambda row: model(torch.tensor([row]))[0], ids)
    theirs = perplexity(lambda row: their_logits(llama, row), ids)
    print(f"{quant}: perplexity {theirs:.4f}, ours {ours:.4f}, {theirs / ours - 1:+.3%}")
    assert abs(theirs / ours - 1) < most and 1.5 < ours < 100
