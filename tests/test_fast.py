"""fast.py against model.py and against plain formulas in float64."""

from dataclasses import replace

import pytest
import torch

import data
import fast
import train
from config import Config
from fast import FastLM
from model import KVCache, SmolLM
from plumbing.processes import Run
from sample import generate_many

GQA = Config(vocab_size=300, n_layer=3, n_head=6, n_kv_head=2, d_model=96, d_ff=160, seq_len=64, init_std=0.1)
MHA = replace(GQA, n_head=4, n_kv_head=4, tie_embeddings=False)


@pytest.fixture(params=[GQA, MHA], ids=["GQA tied", "MHA untied"])
def model(request):
    torch.manual_seed(0)
    model = SmolLM(request.param)
    for name, weight in model.named_parameters():
        if "norm" in name:  # fresh ones are all 1, which would hide where they went
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


@pytest.fixture
def ids():
    return torch.randint(17, 300, (3, 40), generator=torch.Generator().manual_seed(1))


def logits(model, ids, read):
    """The scores behind each prefix of ids from `read` ids on, (B, 40 - read, V)."""
    cache = KVCache(model.cfg, len(ids), 64, dtype=model.cache_dtype)
    found = [model.next_logits(ids[:, :read], cache)]
    found += [model.next_logits(ids[:, i : i + 1], cache) for i in range(read, ids.shape[1])]
    return torch.stack(found, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("read", [1, 25])
def test_float32_is_the_model_for_prompts_and_for_single_ids(model, ids, batch, read):
    ids = ids[:batch]
    expected = model(ids)[:, read - 1 :]
    torch.testing.assert_close(logits(FastLM(model, "float32"), ids, read), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(logits(model, ids, read), expected, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype, error", [("bfloat16", 0.02), ("int8", 0.05)])
def test_fewer_bits_change_the_scores_a_little(model, ids, dtype, error):
    expected = model(ids)[:, 24:]
    found = logits(FastLM(model, dtype), ids, 25)
    assert 0 < (found - expected).norm() < error * expected.norm()


@torch.no_grad()
def test_a_product_in_int8_is_that_of_the_rounded_numbers():
    """Whole numbers and scales, multiplied in float64; a row of zeros stays zero."""
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 64, generator=random), torch.randn(40, 64, generator=random)
    x[2] = 0
    rounded = []
    for matrix in (x.double(), weight.double()):
        scale = matrix.abs().amax(1, keepdim=True) / 127
        rounded.append(torch.where(scale > 0, (matrix / scale).round() * scale, 0))
    expected = (rounded[0] @ rounded[1].T).float()
    torch.testing.assert_close(fast.int8(weight)(x), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(fast.int8(weight)(x[:1]), expected[:1], rtol=1e-5, atol=1e-4)
    assert not fast.int8(weight)(x)[2].any()


def test_the_kernel_that_needs_less_time_is_used():
    def slow(x):
        torch.randn(200_000)
        return x

    def quick(x):
        return x

    assert fast.quicker_of(slow, quick, torch.ones(1)) is quick
    assert fast.quicker_of(quick, slow, torch.ones(1)) is quick


def test_text_beyond_the_context_is_the_models(model, ids):
    """The older half is forgotten, and the newer half read again, as a prompt."""
    prompts = ids.tolist()
    plain = list(generate_many(model, prompts, 60, temperature=0))
    assert list(generate_many(FastLM(model, "float32"), prompts, 60, temperature=0)) == plain


def test_it_says_what_the_model_says_about_its_end(model):
    model.stop_id, model.other_stop_ids = 2, [5]
    quick = FastLM(model, "int8")
    assert (quick.stop_id, quick.other_stop_ids, quick.cfg) == (2, [5], model.cfg)


@torch.no_grad()
def test_perplexity_in_fewer_bits_is_within_a_percent_of_float32(small, tok):
    """A model that has learnt something, asked id by id about the rows it is validated on."""
    data.write_shards(small.sources[0], small, tok)
    batches, model = data.Batches(small, tok), SmolLM(small)
    with torch.enable_grad():
        train.fit(small, Run("pretrain", small), model, tok, (batches, train.loss_fn))
    ids, targets, _ = batches("val", 0)
    likely = {}
    for dtype in fast.DTYPES:
        scores = logits(FastLM(model, dtype), ids, 1).log_softmax(-1)
        likely[dtype] = scores.gather(2, targets[..., None]).mean().exp()
    assert likely["float32"] > 3 / 300  # three times as likely as by chance, or better
    for dtype in ("bfloat16", "int8"):
        assert likely[dtype] == pytest.approx(likely["float32"].item(), rel=0.01)
