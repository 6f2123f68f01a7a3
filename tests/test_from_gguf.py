"""python -m export.from_gguf: a GGUF file becomes the checkpoint that it was made of."""

import children
import pytest
import torch
from test_export import CFG, folder  # noqa: F401  a fixture

from config import UserError
from export import from_gguf, gguf_file
from plumbing import checkpoint, disk

gguf = pytest.importorskip("gguf")
ROUNDING = {"f16": 0.002, "bf16": 0.02, "q8_0": 0.02, "q4_0": 0.25}  # of the logits, relative


@pytest.fixture(scope="module")
def contents(folder, tmp_path_factory):  # noqa: F811
    """({key: value}, {name: tensor}) of a file in bf16."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    gguf_file.write(folder, path, "bf16")
    return from_gguf.contents(path)


@pytest.mark.parametrize("quant", gguf_file.QUANTS)
def test_there_and_back_changes_only_what_the_format_rounds(folder, tmp_path, quant):  # noqa: F811
    """A second export of what came back has the same numbers, and says the same of them."""
    gguf_file.write(folder, tmp_path / "m.gguf", quant)
    from_gguf.main([str(tmp_path / "m.gguf"), str(tmp_path / "back")])
    model, original = (checkpoint.load(path)[0] for path in (tmp_path / "back", folder))
    assert model.cfg == original.cfg
    ids = torch.randint(17, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    ours, theirs = original(ids), model(ids)
    assert 0 < (ours - theirs).norm() / ours.norm() < ROUNDING[quant]
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                 "generation_config.json", "config.json"):
        assert disk.read_json(tmp_path / "back" / name) == disk.read_json(folder / name)
    gguf_file.write(tmp_path / "back", tmp_path / "again.gguf", quant)
    (facts, tensors), (same, again) = (from_gguf.contents(tmp_path / f"{x}.gguf") for x in ("m", "again"))
    assert facts == same and tensors.keys() == again.keys()
    for one, other in zip(tensors.values(), again.values(), strict=True):
        assert torch.equal(*(torch.tensor(gguf.dequantize(x.data, x.tensor_type)) for x in (one, other)))


def test_transformers_reads_the_same_weights(folder, tmp_path):  # noqa: F811
    """It has a reader of GGUF files of its own, which dequantizes and reorders, too."""
    transformers = pytest.importorskip("transformers")
    gguf_file.write(folder, tmp_path / "m.gguf", "q8_0")
    from_gguf.convert(tmp_path / "m.gguf", tmp_path / "back")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").state_dict()
    for name, weight in checkpoint.load(tmp_path / "back")[0].state_dict().items():
        assert torch.equal(weight, theirs[name]), name


@pytest.mark.parametrize("kind", from_gguf.KINDS)
def test_each_kind_of_block_is_read(contents, kind):
    facts, tensors = contents
    kind = gguf.GGMLQuantizationType[kind]
    weight = torch.randn(CFG.d_model, CFG.d_ff, generator=torch.Generator().manual_seed(0)).numpy()
    data = gguf.quantize(weight, kind)
    tensors = tensors | {"blk.1.ffn_down.weight": tensors["blk.1.ffn_down.weight"]._replace(
        tensor_type=kind, data=data)}
    found = from_gguf.read_model(from_gguf.read_shape(facts, tensors), tensors)
    expected = torch.tensor(gguf.dequantize(data, kind))
    assert torch.equal(found.model.layers[1].mlp.down_proj.weight, expected)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture='qwen2' is not 'llama'"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn' is not implemented here"),
        ({"llama.attention.key_length": 32}, "llama.attention.key_length=32 is not"),
        ({"llama.block_count": None}, "it lacks llama.block_count"),
        ({"llama.block_count": 3}, "blk.2.attn_k.weight is missing"),
        ({"llama.block_count": 1}, "blk.1.attn_k.weight is no weight of this model"),
        ({"llama.feed_forward_length": 64}, "has shape (96, 64), and the model needs (64, 64)"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "'pre': 'llama-bpe'"),
        ({"tokenizer.ggml.model": "llama"}, "'model': 'llama'"),
        ({"tokenizer.ggml.add_bos_token": True}, "'add_bos_token': True"),
        ({"tokenizer.ggml.token_type": [1] * 310}, "its split or special tokens differ"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_become_another_model_is_refused_by_name(contents, changes, says):
    facts, tensors = contents
    with pytest.raises(UserError) as error:
        from_gguf.read(facts | changes, tensors)
    assert says in str(error.value)


def test_weights_that_are_unknown_or_rounded_in_another_way_are_refused_by_name(contents):
    facts, tensors = contents
    with pytest.raises(UserError, match="rope_freqs.weight is no weight of this model"):
        from_gguf.read(facts, tensors | {"rope_freqs.weight": tensors["output_norm.weight"]})
    other = tensors["token_embd.weight"]._replace(tensor_type=gguf.GGMLQuantizationType.Q6_K)
    with pytest.raises(UserError, match="token_embd.weight is Q6_K, and only F32, F16, BF16, Q8_0, .* are"):
        from_gguf.read(facts, tensors | {"token_embd.weight": other})


def test_mistakes_are_one_sentence_and_nothing_is_written(folder, tmp_path):  # noqa: F811
    whole, out = tmp_path / "m.gguf", tmp_path / "out"
    gguf_file.write(folder, whole, "f16")
    (tmp_path / "half.gguf").write_bytes(whole.read_bytes()[:20_000])
    for name in ("half.gguf", "nowhere.gguf"):
        with pytest.raises(UserError, match=f"{name} cannot be read as a GGUF file: "):
            from_gguf.convert(tmp_path / name, out)
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    done = children.run("-m", "export.from_gguf", whole, out)
    assert done.returncode == 2 and "out cannot be written" in done.stderr
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
