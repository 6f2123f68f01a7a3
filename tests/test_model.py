"""model.py against transformers, against plain formulas in float64, and against itself."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import cross_entropy
import model as ours
from config import Config
from model import IGNORE, KVCache, SmolLM
from plumbing.processes import Run, compile_blocks
from sample import generate_many

GQA = Config(vocab_size=300, n_layer=3, n_head=6, n_kv_head=2, d_model=96, d_ff=160, seq_len=64, init_std=0.1)
MHA = replace(GQA, n_head=4, n_kv_head=4, tie_embeddings=False)


@pytest.fixture(params=[GQA, MHA], ids=["GQA tied", "MHA untied"])
def model(request):
    torch.manual_seed(0)
    return SmolLM(request.param)


def some_ids():
    return torch.randint(17, 300, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def ids():
    return some_ids()


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
    model.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = found = ids[:1, :10]
    for _ in range(32):
        found = torch.cat([found, model(found)[:, -1:].argmax(-1)], dim=1)
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False, eos_token_id=None
    )
    assert found.shape == (1, 42) and found.tolist() == expected.tolist()


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
    monkeypatch.setattr(cross_entropy, "LOGITS_AT_ONCE", 300 * 7)
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


def test_compiled_log_probabilities_are_the_same_and_one_block_is_compiled_for_all(ids, monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS_AT_ONCE", 300 * 40)  # two chunks
    torch.manual_seed(0)
    model = SmolLM(GQA)
    names, said = list(model.state_dict()), []
    plain = model(ids, ids)
    plain.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = Run("pretrain", model.cfg)
    run.say = said.append
    compile_blocks(model, run)
    if "does not work here" in said[0]:  # no C++ compiler, or no headers of Python
        pytest.skip(said[0])
    with torch.compiler.set_stance("force_eager"):  # as when train.py prints samples: nothing is compiled
        list(generate_many(model, ids.tolist(), 5))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = model(ids, ids)
    found.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
    assert list(model.state_dict()) == names
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    for grad, parameter in zip(grads, model.parameters()):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-4)


def test_the_feed_forward_layer_keeps_two_wide_tensors_of_four_and_no_product_is_made_twice(
    model, ids, monkeypatch
):
    def wide_and_operations():
        kept = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t)
        with FlopCounterMode(display=False) as counter:
            with hooks:
                loss = model(ids, ids).sum()
            loss.backward()
        return sum(shape in ((2, 40, 160), (80, 160)) for shape in kept), counter.get_total_flops()

    wide, operations = wide_and_operations()
    monkeypatch.setattr(ours, "recompute_in_backward", lambda layer, *inputs, **_: layer(*inputs))
    assert wide_and_operations() == (2 * wide, operations) and wide == 2 * 3


def one_of_two_processes(rank, folder):
    """Each process has one of the two rows; process 0 writes the gradient, which DDP has averaged."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", (folder / "meeting").as_uri(), rank=rank, world_size=2)
    cross_entropy.LOGITS_AT_ONCE = 300 * 7
    torch.manual_seed(rank)  # DDP gives all the weights of process 0
    net = DistributedDataParallel(SmolLM(GQA))
    row = some_ids()[rank:rank + 1]
    net(row[:, :-1], row[:, 1:]).sum().backward()
    if rank == 0:
        save_file({name: p.grad for name, p in net.module.named_parameters()}, folder / "grads.safetensors")
    del net
    Run("test", GQA, world=2).leave()


def test_two_processes_have_the_gradient_of_one(ids, tmp_path):
    torch.multiprocessing.spawn(one_of_two_processes, (tmp_path,), nprocs=2)
    torch.manual_seed(0)
    model = SmolLM(GQA)
    model(ids[:, :-1], ids[:, 1:]).sum().backward()
    averaged = load_file(tmp_path / "grads.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(2 * averaged[name], parameter.grad, rtol=1e-4, atol=1e-4)


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
    half, seen = SmolLM(GQA).bfloat16(), []
    for layer in half.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda _, args: seen.extend(args[1]))
    assert half(torch.tensor([[20, 21]])).dtype == torch.bfloat16
    assert len(seen) == 6 and all(table.dtype == torch.float32 for table in seen)


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


def test_parameters_are_as_many_as_published(model):
    assert sum(p.numel() for p in model.parameters()) == model.cfg.n_params
    with torch.device("meta"):
        assert sum(p.numel() for p in SmolLM(Config()).parameters()) == 134_515_008  # SmolLM-135M
