"""model.py against transformers, against plain formulas in float64, and against itself."""

import gc
import math
from dataclasses import replace
from pathlib import Path

import children
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model as ours
import train
from config import Config
from model import IGNORE, KVCache, SmolLM, log_probs, rope_tables
from plumbing import checkpoint, shards
from plumbing.processes import Run
from sample import generate_batch

GQA = Config(vocab_size=300, n_layer=3, n_head=6, n_kv_head=2, d_model=96, d_ff=160, seq_len=64, init_std=0.1)
MHA = replace(GQA, n_head=4, n_kv_head=4, tie_embeddings=False)


@pytest.fixture(params=[GQA, MHA], ids=["GQA tied", "MHA untied"])
def model(request):
    torch.manual_seed(0)
    model = SmolLM(request.param)
    for name, weight in model.named_parameters():
        if "norm" in name:  # new ones are all 1, which would hide where they are used
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def some_ids():
    return torch.randint(17, 300, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def ids():
    return some_ids()


def with_cache(model, ids, cache):
    """The logits of all of ids (B, T), which come after what the cache holds: (B, T, V)."""
    return F.linear(model.model(ids, cache=cache), model.head)


# ---------------------------------------------------------------------------------------------------------
# next to transformers


def test_transformers_opens_our_folder_and_computes_the_same(model, ids, tmp_path, tok):
    transformers = pytest.importorskip("transformers")
    checkpoint.save(tmp_path, model, tok)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert not any(info.values())  # no missing, unexpected or mismatched names
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-4)
    logits = theirs(ids).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    (-model(ids[:, :-1], ids[:, 1:]).sum()).backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-4)


def test_32_greedy_tokens_are_those_of_transformers(model, ids, tmp_path, tok):
    transformers = pytest.importorskip("transformers")
    checkpoint.save(tmp_path, model, tok)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = found = ids[:1, :10]
    for _ in range(32):
        found = torch.cat([found, model(found)[:, -1:].argmax(-1)], dim=1)
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32,
                               do_sample=False, eos_token_id=None)
    assert found.shape == (1, 42) and found.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_we_open_what_transformers_writes(model, ids, tmp_path, dtype, tok):
    transformers = pytest.importorskip("transformers")
    checkpoint.save(tmp_path / "ours", model, tok)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    tok.save(tmp_path / "theirs")
    back, _ = checkpoint.load(tmp_path / "theirs")
    torch.testing.assert_close(back(ids), theirs.float()(ids).logits, rtol=0, atol=1e-4)
    assert back.cfg.n_kv_head == model.cfg.n_kv_head and back.cfg.rope_theta == 10000.0


# ---------------------------------------------------------------------------------------------------------
# log-probabilities


@pytest.mark.parametrize("autocast", [False, True])
def test_log_probabilities_in_chunks_have_the_values_and_gradients_of_the_plain_formula(
        model, ids, monkeypatch, autocast):
    monkeypatch.setattr(ours, "LOGITS_AT_ONCE", 300 * 7)
    targets = ids.roll(-1, 1)
    targets[0, :9] = IGNORE
    plain = SmolLM(model.cfg).double()
    plain.load_state_dict(model.state_dict())
    logits = plain(ids)
    expected = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    expected = expected * (targets != IGNORE)
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


def test_compiled_log_probabilities_are_the_same_and_one_block_is_compiled_for_all(ids, monkeypatch):
    monkeypatch.setattr(ours, "LOGITS_AT_ONCE", 300 * 40)  # two chunks
    torch.manual_seed(0)
    model = SmolLM(GQA)
    names, said = list(model.state_dict()), []
    plain = model(ids, ids)
    plain.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(Run, "say", lambda run, text: said.append(text))
    rope = rope_tables(torch.arange(40), model.cfg.head_dim, model.cfg.rope_theta)
    Run("pretrain", Path("unused")).compile(model.model.layers, torch.zeros(2, 40, model.cfg.d_model), rope)
    assert "compiling" in said.pop(0)
    if said and "does not work here" in said[0]:  # no C++ compiler, or no headers of Python
        pytest.skip(said[0])
    with torch.compiler.set_stance("force_eager"):  # as when train.py prints samples: nothing is compiled
        list(generate_batch(model, ids.tolist(), 5))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = model(ids, ids)
    found.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
    assert list(model.state_dict()) == names
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    for grad, parameter in zip(grads, model.parameters()):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-4)


def one_of_two_processes(rank, folder):
    """Each process has one of the two rows; process 0 writes the gradient, which DDP has averaged."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", (folder / "meeting").as_uri(), rank=rank, world_size=2)
    ours.LOGITS_AT_ONCE = 300 * 7
    torch.manual_seed(rank)  # DDP copies the weights of process 0 to all
    net = DistributedDataParallel(SmolLM(GQA))
    row = some_ids()[rank:rank + 1]
    net(row[:, :-1], row[:, 1:]).sum().backward()
    if rank == 0:
        save_file({name: p.grad for name, p in net.module.named_parameters()}, folder / "grads.safetensors")
    del net
    gc.collect()  # DDP refers to itself; freed after the process group, it could wait forever
    dist.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(ids, tmp_path):
    both = [children.SERVER.Process(target=one_of_two_processes, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    torch.manual_seed(0)
    model = SmolLM(GQA)
    model(ids[:, :-1], ids[:, 1:]).sum().backward()
    averaged = load_file(tmp_path / "grads.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(2 * averaged[name], parameter.grad, rtol=1e-4, atol=1e-4)


V, C, N = 300, 24, 40


@pytest.fixture(params=[7, 100], ids=["chunks of 7", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(ours, "LOGITS_AT_ONCE", V * request.param + 1)


def numbers(dtype, n=N):
    random = torch.Generator().manual_seed(0)
    x, head = torch.randn(n, C, generator=random), torch.randn(V, C, generator=random) / 4
    targets = torch.randint(0, V, (n,), generator=random)
    targets[::5] = IGNORE
    return *(t.to(dtype).requires_grad_() for t in (x, head)), targets


def plain(x, head, targets):
    logs = (x @ head.T).log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets == IGNORE, 0, logs)


def with_gradients(function, dtype, loss_of):
    x, head, targets = numbers(dtype)
    found = function(x, head, targets)
    loss_of(found).backward()
    return found.detach().double(), x.grad.double(), head.grad.double()


WEIGHTS = torch.randn(N, generator=torch.Generator().manual_seed(1)).double()
LOSSES = {
    "sum": lambda found: -found.sum(),
    "mean": lambda found: found.mean(),
    "weighted": lambda found: (found * WEIGHTS).sum(),
    "one weight differs": lambda found: found.sum() + found[7],
    "one of two": lambda found: found[:N // 2].sum(),
    "not linear": lambda found: found.square().sum(),
    "no weight": lambda found: 0 * found.sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_are_those_of_the_plain_formula(chunk, dtype, loss):
    expected = with_gradients(plain, torch.float64, LOSSES[loss])
    found = with_gradients(log_probs, dtype, LOSSES[loss])
    for mine, exact in zip(found, expected):
        assert (mine - exact).norm() <= (1e-12 if dtype == torch.float64 else 1e-6) * exact.norm()


def test_the_two_lines_of_plain_log_probs_are_the_formula_with_its_gradients():
    expected = with_gradients(plain, torch.float64, LOSSES["weighted"])
    found = with_gradients(ours.plain_log_probs, torch.float32, LOSSES["weighted"])
    assert all((mine - exact).norm() <= 1e-6 * exact.norm() for mine, exact in zip(found, expected))


@pytest.mark.parametrize("loss", ["sum", "weighted"])
def test_under_autocast_they_agree_as_far_as_bfloat16_goes(chunk, loss):
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(log_probs, torch.float32, LOSSES[loss])
    expected = with_gradients(plain, torch.float64, LOSSES[loss])
    assert all(0 < (mine - exact).norm() < 0.01 * exact.norm() for mine, exact in zip(found, expected))


class Results(TorchDispatchMode):
    """Remembers how many numbers the largest result of any operation has, and the shapes of all."""

    def __init__(self):
        super().__init__()
        self.size, self.shapes = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.size = max(self.size, made.numel())
            self.shapes.append(tuple(made.shape))
        return made


def test_without_gradients_the_values_are_the_same_and_no_gradient_is_computed(chunk):
    x, head, targets = numbers(torch.float32)
    with torch.no_grad(), Results() as made:
        found = log_probs(x, head, targets)
    assert found.dtype == torch.float32 and (V, C) not in made.shapes
    with Results() as made:
        assert torch.equal(found, log_probs(x, head, targets))
    assert (V, C) in made.shapes
    assert ours.log_probs_in_chunks(x, head, targets)[1:] == (None, None)


def test_without_a_target_everything_is_0(chunk):
    x, head, targets = numbers(torch.float32)
    found = log_probs(x, head, torch.full_like(targets, IGNORE))
    found.sum().backward()
    assert not found.any() and not x.grad.any() and not head.grad.any()


@pytest.mark.parametrize("loss", ["sum", "weighted"])
def test_memory_grows_with_the_chunk_and_not_with_the_batch(monkeypatch, loss):
    monkeypatch.setattr(ours, "LOGITS_AT_ONCE", V * 50)

    def largest(function, n):
        x, head, targets = numbers(torch.float32, n)
        weights = torch.arange(n) if loss == "weighted" else 1
        with Results() as mode:
            (function(x, head, targets) * weights).sum().backward()
        return mode.size

    assert [largest(log_probs, n) for n in (100, 200, 400)] == [V * 50] * 3
    assert [largest(plain, n) for n in (100, 200, 400)] == [V * 100, V * 200, V * 400]


# ---------------------------------------------------------------------------------------------------------
# the cache


@pytest.mark.parametrize(
    "chunks", [[40], [1] * 40, [16, 1, 1, 7, 15]], ids=["in one call", "one by one", "mixed"])
def test_the_cache_changes_no_logit(model, ids, chunks):
    cache = KVCache(model.cfg, 2, 40)
    parts = [with_cache(model, part, cache) for part in ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=0, atol=1e-5)
    same = KVCache(model.cfg, 3, 40)  # one prompt, three times
    out = [with_cache(model, part, same) for part in ids[:1].expand(3, -1).split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(out, 1), model(ids[:1]).expand(3, -1, -1), rtol=0, atol=1e-5)


def scores(model, ids, *first):
    """next_logits after a prompt that is read in chunks of these lengths, and then after each next id."""
    cache = KVCache(model.cfg, len(ids), ids.shape[1], dtype=model.head.dtype)
    chunks = [*first, *[1] * (ids.shape[1] - sum(first))]
    found = [model.next_logits(part, cache) for part in ids.split(chunks, dim=1)]
    return torch.stack(found[len(first) - 1:], dim=1)  # (B, T - sum(first) + 1, V)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("first", [(1,), (25,), (16, 1, 8)], ids=str)
def test_next_logits_are_those_of_the_forward_pass_without_a_cache(model, batch, first):
    ids = torch.cat((some_ids(), some_ids().flip(1)))[:batch]
    expected = model(ids)[:, sum(first) - 1:]
    torch.testing.assert_close(scores(model, ids, *first), expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_bfloat16_changes_the_scores_a_little(model, ids):
    expected = model(ids)[:, 24:]
    found = scores(model.bfloat16(), ids, 25).float()
    assert 0 < (found - expected).norm() < 0.02 * expected.norm()


def test_perplexity_in_bfloat16_is_within_a_percent_of_float32(small, tok):
    """Of a trained model, asked id by id about validation rows."""
    shards.write_shards(small.sources[0], small, tok)
    batches, model = data.Batches(small, tok), SmolLM(small)
    run = Run("pretrain", Path(small.out_dir) / "pretrain")
    train.fit(small, run, model, tok, batches, train.loss_fn, {})
    ids, targets, _ = batches("val", 0)
    likely = {}
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            logs = scores(model.to(dtype), ids, 1).float().log_softmax(-1)
            likely[dtype] = logs.gather(2, targets[..., None]).mean().exp().item()
    assert likely[torch.float32] > 3 / 300  # at least three times as likely as by chance
    assert likely[torch.bfloat16] == pytest.approx(likely[torch.float32], rel=0.01)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layout_for_decoding_changes_no_weight_and_no_score(model, ids, tmp_path, tok, dtype):
    """A tall float32 matrix is stored by columns: the same numbers in another order in memory."""
    model = model.to(dtype)
    before, expected = {name: weight.clone() for name, weight in model.state_dict().items()}, model(ids)
    checkpoint.save(tmp_path / "before", model, tok)
    assert model.for_decoding() is model
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
        tall = weight.ndim == 2 and weight.shape[0] >= weight.shape[1]
        assert weight.is_contiguous() == (not tall or dtype == torch.bfloat16), name
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-5)
    checkpoint.save(tmp_path / "after", model, tok)  # files do not depend on it
    before, after = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "after"))
    assert before == after
    loaded, _ = checkpoint.load(tmp_path / "after")
    assert not loaded.model.layers[0].mlp.gate_proj.weight.is_contiguous()
    torch.testing.assert_close(loaded(ids), model.float()(ids), rtol=0, atol=1e-4)
    assert all(weight.is_contiguous() for weight in loaded.to(torch.bfloat16).for_decoding().parameters())


# ---------------------------------------------------------------------------------------------------------
# attention


class Calls:
    """scaled_dot_product_attention that remembers the arguments and the result of every call."""

    def __init__(self, monkeypatch):
        self.calls, real = [], F.scaled_dot_product_attention

        def recorded(q, k, v, **settings):
            self.calls.append((q, k, v, settings, real(q, k, v, **settings)))
            return self.calls[-1][-1]

        monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
        self.real = real


def test_a_single_position_gives_the_result_of_the_general_path(model, ids, monkeypatch):
    """One matrix product per group of queries instead of one per query: the same sums."""
    attention, cache = model.model.layers[0].self_attn, KVCache(model.cfg, 2, 40)
    H, K, D = model.cfg.n_head, model.cfg.n_kv_head, model.cfg.head_dim
    x, rope = torch.randn(2, 9, model.cfg.d_model), rope_tables(torch.arange(9), D, model.cfg.rope_theta)
    general = attention(x, rope)
    attention(x[:, :8], [table[:8] for table in rope], cache=cache)
    cache.length = 8
    sdpa = Calls(monkeypatch)
    single = attention(x[:, 8:], [table[8:] for table in rope], cache=cache)
    torch.testing.assert_close(single, general[:, 8:], rtol=0, atol=1e-6)
    ((q, k, v, settings, y),) = sdpa.calls
    assert q.shape == (2, K, H // K, D) and k.shape == v.shape == (2, K, 9, D) and settings == {}
    grouped = sdpa.real(q.reshape(2, H, 1, D), k, v, enable_gqa=True)
    torch.testing.assert_close(y.reshape(2, H, 1, D), grouped, rtol=0, atol=1e-6)
    alone = attention(x[:, :1], [table[:1] for table in rope])  # a row of one id, without a cache
    torch.testing.assert_close(alone, general[:, :1], rtol=0, atol=1e-6)


def test_where_there_is_a_mask_keys_are_repeated_for_each_query_head_with_the_same_result(ids, monkeypatch):
    """A mask together with enable_gqa has no fast kernel on a GPU."""
    torch.manual_seed(0)
    model, sdpa = SmolLM(replace(GQA, doc_mask=True)), Calls(monkeypatch)
    doc = torch.tensor([[0] * 15 + [1] * 25]).expand(2, -1)
    with torch.no_grad():
        found = model(ids, doc=doc)
    assert len(sdpa.calls) == GQA.n_layer
    torch.testing.assert_close(model(ids, doc=doc), found, rtol=0, atol=1e-5)
    assert len(sdpa.calls) == GQA.n_layer  # in training a CPU uses `attend`
    for q, k, v, settings, y in sdpa.calls:
        assert set(settings) == {"attn_mask"} and q.shape == k.shape == v.shape == (2, 6, 40, 16)
        mask = settings["attn_mask"]
        grouped = sdpa.real(q, k[:, ::3], v[:, ::3], attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(y, grouped, rtol=0, atol=1e-6)
        weights = (q.double() @ k.double().mT / 16**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        torch.testing.assert_close(y, (weights @ v.double()).float(), rtol=0, atol=1e-5)
    assert mask.shape == (2, 1, 40, 40)  # two documents, and nobody sees a later position
    assert torch.equal(mask[0, 0], torch.block_diag(torch.ones(15, 15), torch.ones(25, 25)).tril().bool())


@pytest.mark.parametrize("function", ["attend", "attend_slowly"])
@pytest.mark.parametrize("B", [1, 2])
def test_attention_written_out_is_the_fused_one_with_its_gradients(function, B):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 8, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2))
    mask = (torch.rand(B, 1, 9, 9) < 0.5) | torch.eye(9, dtype=torch.bool)
    weights = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    results = []
    for y in (getattr(ours, function)(q, k, v, mask),
              torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)):
        results.append((y, *torch.autograd.grad((y * weights).sum(), (q, k, v))))
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_attend_slowly_is_attention_with_a_cache_for_one_key_head_for_groups_and_for_all(K):
    """Three new positions look at five cached ones and at the new ones up to themselves; scores of a
    thousand do not overflow."""
    torch.manual_seed(0)
    q = torch.randn(2, 4, 3, 8) * 1000
    k, v = torch.randn(2, 2, K, 8, 8)
    mask = torch.ones(3, 8, dtype=torch.bool).tril(5)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(ours.attend_slowly(q, k, v, mask), expected)


def test_attend_slowly_inside_the_model_changes_no_logit(model, ids, monkeypatch):
    def slowly(q, k, v, is_causal, enable_gqa):
        return ours.attend_slowly(q, k, v, torch.ones(40, 40, dtype=torch.bool).tril())

    expected = model(ids)
    monkeypatch.setattr(F, "scaled_dot_product_attention", slowly)
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-5)


def test_a_later_id_changes_no_earlier_logit(model, ids):
    changed = ids.clone()
    changed[:, 25] = 18
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :25], after[:, :25]) and not torch.allclose(before[:, 25:], after[:, 25:])


def test_with_doc_mask_documents_in_a_row_are_computed_as_if_alone(ids):
    torch.manual_seed(0)
    model = SmolLM(replace(GQA, doc_mask=True))
    row, doc = ids[:1], torch.tensor([[0] * 15 + [1] * 20 + [2] * 5])
    targets = row.roll(-1, 1)
    targets[0, [14, 34, 39]] = IGNORE  # the next id of the last position of each is in another document
    packed = model(row, targets, doc)
    packed.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    alone = torch.cat([model(row[:, a:b], targets[:, a:b]) for a, b in ((0, 15), (15, 35), (35, 40))], 1)
    alone.sum().backward()
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-5)
    for grad, parameter in zip(grads, model.parameters()):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-3)


def test_one_document_changes_another_only_without_doc_mask(ids):
    torch.manual_seed(0)
    model = SmolLM(replace(GQA, doc_mask=True))
    doc = torch.tensor([[0] * 15 + [1] * 25]).expand(2, -1)
    changed = ids.clone()
    changed[:, 3] = 18
    assert torch.equal(model(ids, doc=doc)[:, 15:], model(changed, doc=doc)[:, 15:])
    open_model = SmolLM(GQA)
    assert not torch.allclose(open_model(ids, doc=doc)[:, 15:], open_model(changed, doc=doc)[:, 15:])


def test_the_norm_is_its_formula_in_float32_for_any_dtype():
    norm = ours.RMSNorm(GQA)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 5)[:, None]
    for given, rtol in ((x, 1e-5), (x.bfloat16(), 2**-7)):
        exact = given.double()
        exact = exact / (exact.square().mean(-1, keepdim=True) + GQA.norm_eps).sqrt() * norm.weight
        torch.testing.assert_close(norm(given), exact.to(given.dtype), rtol=rtol, atol=0)


def test_the_mlp_is_its_formula():
    torch.manual_seed(0)
    mlp, x = ours.MLP(GQA).double(), torch.randn(2, 5, 96, dtype=torch.float64)
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    torch.testing.assert_close(mlp(x), gate / (1 + (-gate).exp()) * up @ mlp.down_proj.weight.T)


def test_to_rotate_a_pair_is_to_multiply_a_complex_number():
    """x[i] + x[i + D/2] sqrt(-1), times the number of length 1 that has the position's angle."""
    x = torch.randn(2, 3, 9, 16, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(9)[:, None] * 10000.0 ** -(torch.arange(8) / 8)                # (T, D / 2)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones(9, 8), angles)
    rope = rope_tables(torch.arange(9), 16, 10000.0)
    torch.testing.assert_close(ours.rotate(x, rope), torch.cat((turned.real, turned.imag), dim=-1))
    assert ours.rotate(x.bfloat16(), rope).dtype == torch.bfloat16


def test_rope_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def score(m, n):
        at = [rope_tables(torch.tensor([position]), 16, 10000.0) for position in (m, n)]
        return (ours.rotate(q, at[0]) * ours.rotate(k, at[1])).sum().item()

    assert score(3, 1) == pytest.approx(score(103, 101), abs=1e-4) != pytest.approx(score(3, 2), abs=1e-4)


def test_rope_tables_stay_float32_in_a_bfloat16_model():
    """Position 2,001 in bfloat16 would be 2,000."""
    cos, _ = rope_tables(torch.arange(2048), 64, 10000.0)
    assert cos.dtype == torch.float32
    assert cos[2001, 0].item() == pytest.approx(math.cos(2001), abs=1e-4)
    half, seen = SmolLM(GQA).bfloat16(), []
    cache = KVCache(GQA, 1, 4, dtype=torch.bfloat16)
    for layer in half.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda _, args: seen.extend(args[1]))
    assert half(torch.tensor([[20, 21]])).dtype == torch.bfloat16
    assert half.next_logits(torch.tensor([[20, 21]]), cache).dtype == torch.bfloat16
    assert len(seen) == 12 and all(table.dtype == torch.float32 for table in seen)


def test_new_weights_have_the_published_spread():
    torch.manual_seed(0)
    cfg = replace(GQA, d_model=384, d_ff=512, n_head=6, init_std=0.0416)
    for name, weight in SmolLM(cfg).named_parameters():
        if "norm" in name:
            assert (weight == 1).all()
        else:
            scaled = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.0416 / (math.sqrt(6) if scaled else 1)
            assert weight.std().item() == pytest.approx(expected, rel=0.03), name


def test_parameters_are_as_many_as_published(model):
    assert sum(p.numel() for p in model.parameters()) == model.cfg.n_params
    with torch.device("meta"):
        assert sum(p.numel() for p in SmolLM(Config()).parameters()) == 134_515_008  # SmolLM-135M
