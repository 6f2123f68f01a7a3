"""model.py against transformers, against plain formulas in float64, and against itself."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import model as ours
from config import Config
from model import IGNORE, KVCache, SmolLM

GQA = Config(vocab_size=300, n_layer=3, n_head=6, n_kv_head=2, d_model=96, d_ff=160, seq_len=64, init_std=0.1)
MHA = replace(GQA, n_head=4, n_kv_head=4, tie_embeddings=False)


@pytest.fixture(params=[GQA, MHA], ids=["GQA tied", "MHA untied"])
def model(request):
    torch.manual_seed(0)
    return SmolLM(request.param)


@pytest.fixture
def ids():
    return torch.randint(17, 300, (2, 40), generator=torch.Generator().manual_seed(1))


def test_transformers_opens_our_folder_and_computes_the_same(model, ids, tmp_path):
    transformers = pytest.importorskip("transformers")
    model.save(tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert not any(info.values())  # no missing, unexpected or mismatched names
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-4)
    F.cross_entropy(
        theirs(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    ).backward()
    (-model(ids[:, :-1], ids[:, 1:]).sum()).backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-4)


def test_32_greedy_tokens_are_those_of_transformers(model, ids, tmp_path):
    transformers = pytest.importorskip("transformers")
    from sample import generate

    model.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = ids[:1, :10]
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False, eos_token_id=None
    )
    assert list(generate(model.eval(), prompt[0].tolist(), 32, temperature=0)) == expected[0, 10:].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_we_open_what_transformers_writes(model, ids, tmp_path, dtype):
    transformers = pytest.importorskip("transformers")
    model.save(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    back = SmolLM.load(tmp_path / "theirs")
    torch.testing.assert_close(back(ids), theirs.float()(ids).logits, rtol=0, atol=1e-4)
    assert back.cfg.n_kv_head == model.cfg.n_kv_head and back.cfg.rope_theta == 10000.0


@pytest.mark.parametrize("autocast", [False, True])
def test_chunked_log_probabilities_are_the_plain_formula_in_value_and_gradient(
    model, ids, monkeypatch, autocast
):
    monkeypatch.setattr(ours, "LOGITS_AT_ONCE", 300 * 7)  # 7 positions at a time, the last chunk is shorter
    targets = ids.roll(-1, 1)
    targets[0, :9] = IGNORE
    plain = SmolLM(model.cfg).double()
    plain.load_state_dict(model.state_dict())
    logits = plain(ids)
    expected = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (
        targets != IGNORE
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = model(ids, targets)
    assert found.dtype == torch.float32 and (found[0, :9] == 0).all()
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    (found * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    tolerance = 0.15 if autocast else 1e-4
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
    for mine, exact in zip(model.parameters(), plain.parameters()):
        assert (mine.grad.double() - exact.grad).norm() < (0.05 if autocast else 1e-5) * exact.grad.norm()


def test_compiled_log_probabilities_are_the_same(ids, monkeypatch):
    monkeypatch.setattr(ours, "LOGITS_AT_ONCE", 300 * 50)
    torch.manual_seed(0)
    model = SmolLM(replace(GQA, n_layer=1))
    try:
        compiled = torch.compile(model)
        found = compiled(ids, ids)
    except Exception as error:
        pytest.skip(f"torch.compile does not work here: {str(error).splitlines()[0]}")
    found.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    plain = model(ids, ids)
    plain.sum().backward()
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    for grad, parameter in zip(grads, model.parameters()):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "chunks", [[40], [1] * 40, [16, 1, 1, 7, 15]], ids=["at once", "one by one", "mixed"]
)
def test_the_cache_changes_no_logit(model, ids, chunks):
    cache, parts = KVCache(model.cfg, 2, 40), []
    for part in ids.split(chunks, dim=1):
        parts.append(model(part, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=0, atol=1e-5)
    same = KVCache(model.cfg, 3, 40)  # one prompt, three times
    out = [model(part, cache=same) for part in ids[:1].expand(3, -1).split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(out, 1), model(ids[:1]).expand(3, -1, -1), rtol=0, atol=1e-5)


def test_a_later_id_changes_no_earlier_logit(model, ids):
    changed = ids.clone()
    changed[:, 25] = 18
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :25], after[:, :25]) and not torch.allclose(before[:, 25:], after[:, 25:])


def test_with_doc_mask_packed_documents_are_as_if_alone(ids):
    torch.manual_seed(0)
    model = SmolLM(replace(GQA, doc_mask=True))
    row, doc = ids[:1], torch.tensor([[0] * 15 + [1] * 20 + [2] * 5])
    targets = row.roll(-1, 1)
    targets[0, [14, 34, 39]] = IGNORE  # the last position of each has its answer in the next document
    packed = model(row, targets, doc)
    packed.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    alone = torch.cat([model(row[:, a:b], targets[:, a:b]) for a, b in ((0, 15), (15, 35), (35, 40))], 1)
    alone.sum().backward()
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-5)
    for grad, parameter in zip(grads, model.parameters()):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-3)


def test_with_doc_mask_one_document_cannot_move_another_and_without_it_can(ids):
    torch.manual_seed(0)
    model = SmolLM(replace(GQA, doc_mask=True))
    doc = torch.tensor([[0] * 15 + [1] * 25]).expand(2, -1)
    changed = ids.clone()
    changed[:, 3] = 18
    assert torch.equal(model(ids, doc=doc)[:, 15:], model(changed, doc=doc)[:, 15:])
    open_model = SmolLM(GQA)
    assert not torch.allclose(open_model(ids, doc=doc)[:, 15:], open_model(changed, doc=doc)[:, 15:])


def test_rope_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def score(m, n):
        at = [ours.rope_tables(torch.tensor([position]), 16, 10000.0) for position in (m, n)]
        return (ours.rotate(q, at[0]) * ours.rotate(k, at[1])).sum().item()

    assert score(3, 1) == pytest.approx(score(103, 101), abs=1e-4) != pytest.approx(score(3, 2), abs=1e-4)


def test_rope_tables_stay_float32_in_a_bfloat16_model():
    """Position 2,001 in bfloat16 would be 2,000."""
    cos, _ = ours.rope_tables(torch.arange(2048), 64, 10000.0)
    assert cos.dtype == torch.float32
    assert cos[2001, 0].item() == pytest.approx(math.cos(2001), abs=1e-4)
    half = SmolLM(GQA).bfloat16()
    assert half(torch.tensor([[20, 21]])).dtype == torch.bfloat16


def test_fresh_weights_have_the_published_spread():
    torch.manual_seed(0)
    cfg = replace(GQA, d_model=384, d_ff=512, n_head=6, init_std=0.0416)
    for name, weight in SmolLM(cfg).named_parameters():
        if "norm" in name:
            assert (weight == 1).all()
        else:
            scaled = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert weight.std().item() == pytest.approx(0.0416 / (math.sqrt(6) if scaled else 1), rel=0.03), (
                name
            )


def test_parameters_and_tensors_are_as_many_as_published(model, tmp_path):
    assert sum(p.numel() for p in model.parameters()) == model.cfg.n_params
    assert len(model.state_dict()) == 9 * model.cfg.n_layer + (2 if model.cfg.tie_embeddings else 3)
