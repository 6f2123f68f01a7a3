"""python -m export: the memory table, and a file that llama.cpp runs (export/gguf_file.py)."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import config
from config import Config, UserError
from export import __main__ as export
from export import gguf_file
from model import KVCache, SmolLM, rotate
from plumbing import checkpoint, disk
from tokenizer import CHAT_TEMPLATE, SMOLLM2_TEMPLATE, Tokenizer
from train import make_optimizers

SHAPE = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=64, d_ff=96)  # rows are whole blocks of 32
CFG = Config(vocab_size=310, **SHAPE, seq_len=48, rope_theta=500.0, norm_eps=1e-6)  # tok has 300 ids


# ---------------------------------------------------------------------------------------------------------
# memory


@pytest.mark.parametrize(
    ("preset", "published", "computed"),
    [
        ("smol_135m", {"fp32": 538.06, "bf16": 269.03, "int8": 162.87, "int4": 109.78}, {}),
        ("smol_360m", {}, {"fp32": 1447.28, "bf16": 723.65, "int8": 409.07, "int4": 251.79}),
        ("smol_1p7b", {"bf16": 3422.76}, {"fp32": 6845.51, "int8": 1812.14, "int4": 1006.83}),
    ],
)
def test_the_weights_need_what_the_model_cards_say(preset, published, computed):
    """To the last digit where a card gives the number. The 360M's card says 723.56 (bf16), which no count of
    its parameters gives: probably 723.65 with two digits swapped."""
    cfg = config.load([f"config/{preset}.py"])
    sizes = {name: round(size / 1e6, 2) for name, size in export.weight_bytes(cfg).items()}
    assert {name: sizes[name] for name in published} == published
    assert {name: sizes[name] for name in computed} == pytest.approx(computed, abs=0.0101)


def test_the_linear_layers_are_those_of_the_model():
    model = SmolLM(replace(CFG, tie_embeddings=False))
    linear = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert export.n_linear(CFG) == sum(layer.weight.numel() for layer in linear)


def test_the_cache_needs_what_a_cache_allocates():
    cache = KVCache(CFG, 1, 7, dtype=torch.bfloat16)
    assert export.cache_bytes(CFG, 7) == cache.keys.nbytes + cache.values.nbytes
    published = [config.load([f"config/smol_{size}.py"]) for size in ("135m", "360m", "1p7b")]
    assert [export.cache_bytes(cfg, 1) for cfg in published] == [23_040, 40_960, 196_608]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_needs_what_a_real_step_allocates(optimizer):
    """Every tensor is counted except the optimizer's step counters."""
    cfg = replace(CFG, optimizer=optimizer)
    model = SmolLM(cfg)
    ids = torch.zeros(1, 4, dtype=torch.long)
    model(ids, ids).sum().backward()
    found = {"weights": 0, "gradients": 0, optimizer: 0}
    for weight in model.parameters():
        found["weights"] += weight.nbytes
        found["gradients"] += weight.grad.nbytes
    for one in make_optimizers(model, cfg):
        one.step()
        for state in one.state.values():
            found[optimizer] += sum(tensor.nbytes for tensor in state.values() if tensor.ndim)
    assert export.training_bytes(cfg) == found


def test_the_table_is_printed_for_any_preset_and_its_flags_and_names_llama_cpp_for_8_bits(capsys):
    export.main(["--memory", "config/smol_135m.py", "--seq_len=4096"])
    printed = capsys.readouterr().out
    lines = {tuple(line.rsplit(maxsplit=1)) for line in printed.splitlines() if line.startswith("    ")}
    assert {("    int8", "162.87"), ("    4,096 tokens", "94.37"), ("    total", "2,152.24")} <= lines
    assert "134,515,008 parameters" in printed and "23,040 bytes" in printed
    assert "8 bits on a CPU: python -m export CHECKPOINT --format=gguf --quant=q8_0" in printed
    for preset in config.known_presets():
        export.show_memory(config.load([preset]))


# ---------------------------------------------------------------------------------------------------------
# gguf, read by the package gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tok):
    """A chat model of random weights with norms that are not all 1."""
    torch.manual_seed(0)
    model = SmolLM(CFG)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, mean=1)
    path = tmp_path_factory.mktemp("chat")
    checkpoint.save(path, model, tok.for_chat())
    return path


def exported(folder, path, quant):
    """({key: value}, {name: (type, float32 array)}) of the file."""
    gguf = pytest.importorskip("gguf")
    gguf_file.write(folder, path / "m.gguf", quant)
    reader = gguf.GGUFReader(path / "m.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {
        tensor.name: (tensor.tensor_type.name, gguf.dequantize(tensor.data, tensor.tensor_type))
        for tensor in reader.tensors
    }
    return fields, tensors


@pytest.mark.parametrize("quant", gguf_file.QUANTS)
def test_weights_round_trip_under_llama_cpps_names(folder, tmp_path, quant):
    """Every number within the rounding error of its format, norms exactly, q and k in our order of rows."""
    gguf = pytest.importorskip("gguf")
    found = exported(folder, tmp_path, quant)[1]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CFG.n_layer)
    weights = load_file(folder / "model.safetensors")
    assert len(found) == len(weights)
    for name, weight in weights.items():
        kind, theirs = found[names.get_name(name, try_suffixes=(".weight",))]
        if "q_proj" in name or "k_proj" in name:
            heads = theirs.reshape(-1, CFG.head_dim, CFG.d_model)
            theirs = np.concatenate((heads[:, 0::2], heads[:, 1::2]), axis=1).reshape(theirs.shape)
        eight = any(part in name for part in ("embed_tokens", "v_proj", "down_proj"))
        wanted = "f32" if "norm" in name else "q8_0" if quant == "q4_0" and eight else quant
        assert kind == wanted.upper()
        blocks = np.abs(weight.numpy().reshape(-1, 32)).max(axis=1, keepdims=True).repeat(32, axis=1)
        size, largest = np.abs(weight.numpy()), blocks.reshape(weight.shape)
        rounding = {  # half a step, and the error of the scale; q4_0 may cut the largest weight short
            "f32": 0 * size,
            "f16": size / 2**11 + 1e-7,
            "bf16": size / 2**8,
            "q8_0": largest / 127 * 0.57,
            "q4_0": largest / 8 * 1.3,
        }
        assert (np.abs(theirs - weight.numpy()) <= rounding[wanted]).all(), name


@pytest.mark.parametrize("kind", ["q8_0", "bf16"])
def test_blocks_are_llama_cpps_to_the_bit(kind):
    """The package's functions say that they compute what llama.cpp's C code computes. One block is zeros."""
    gguf = pytest.importorskip("gguf")
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) ** 3
    weight[3, 32:64] = 0
    theirs = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(gguf_file.to_array(weight, kind), theirs)


def test_blocks_of_4_bits_are_nearer_to_the_weights_than_llama_cpps_and_a_second_time_the_same():
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q4_0
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) ** 3
    weight[3, 32:64] = 0
    blocks = gguf_file.to_array(weight, "q4_0")
    ours, theirs = (gguf.dequantize(data, kind) for data in (blocks, gguf.quantize(weight.numpy(), kind)))
    errors = [np.square(found - weight.numpy()).reshape(-1, 32).sum(axis=1) for found in (ours, theirs)]
    assert (errors[0] <= errors[1] * 1.001).all() and errors[0].sum() < 0.97 * errors[1].sum()
    assert np.array_equal(gguf.dequantize(gguf_file.to_array(torch.tensor(ours), "q4_0"), kind), ours)


def test_neighbors_rotated_as_in_the_paper_give_the_scores_of_our_halves():
    """RoPE of pairs (2i, 2i + 1), written with complex numbers, on permuted rows: the same scores."""
    n_head, D, T = 3, 8, 5
    random = torch.Generator().manual_seed(0)
    x, w_q, w_k = (
        torch.randn(shape, generator=random) for shape in ((T, 16), (n_head * D, 16), (n_head * D, 16))
    )
    angles = torch.outer(torch.arange(T), 500.0 ** -(torch.arange(0, D, 2) / D))
    rope = (angles.repeat(1, 2).cos(), angles.repeat(1, 2).sin())
    q, k = (rotate((x @ w.T).view(T, n_head, D).transpose(0, 1), rope) for w in (w_q, w_k))
    turn = torch.polar(torch.ones_like(angles), angles)
    pairs = [gguf_file.pairs_side_by_side(w, n_head) for w in (w_q, w_k)]
    theirs = [
        torch.view_as_real(torch.view_as_complex((x @ w.T).view(T, n_head, -1, 2)) * turn[:, None])
        for w in pairs
    ]
    their_q, their_k = (turned.flatten(2).transpose(0, 1) for turned in theirs)
    torch.testing.assert_close(q @ k.mT, their_q @ their_k.mT, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(pairs[0], w_q)


def test_the_file_contains_what_llama_cpp_must_know(folder, tmp_path, tok):
    fields = exported(folder, tmp_path, "q4_0")[0]
    tokens, kinds = fields.pop("tokenizer.ggml.tokens"), fields.pop("tokenizer.ggml.token_type")
    assert tokens == tok.tokens + [f"[PAD{i}]" for i in range(300, 310)]
    assert kinds == [3] * 17 + [1] * 283 + [5] * 10  # control, normal, unused
    merges = [pair.split(" ") for pair in fields.pop("tokenizer.ggml.merges")]
    assert merges == json.loads(tok.rust.to_str())["model"]["merges"] and len(merges) == 300 - 17 - 256
    assert {key: value for key, value in fields.items() if not key.startswith("GGUF.")} == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "llama.vocab_size": 310,
        "llama.context_length": 48,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 500.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def test_a_base_model_ends_with_a_document_and_has_no_padding(tmp_path, tok):
    checkpoint.save(tmp_path, SmolLM(CFG), tok)
    fields = exported(tmp_path, tmp_path, "f16")[0]
    assert fields["tokenizer.ggml.bos_token_id"] == fields["tokenizer.ggml.eos_token_id"] == 0
    assert "tokenizer.ggml.padding_token_id" not in fields and fields["general.file_type"] == 1


def test_an_untied_head_is_written_with_8_bits(tmp_path, tok):
    model = SmolLM(replace(CFG, tie_embeddings=False))
    checkpoint.save(tmp_path, model, tok)
    kind, head = exported(tmp_path, tmp_path, "q4_0")[1]["output.weight"]
    assert kind == "Q8_0" and np.abs(head - model.head.detach().numpy()).max() < 0.01


def as_ollama_does(text, messages):
    """The prompt that a Modelfile makes of messages: its template is one loop over them, and a text."""
    body, end = re.search(r'TEMPLATE """{{ range .Messages }}(.*){{ end }}(.*)"""', text, re.S).groups()
    system = re.search("^SYSTEM (.*)", text, re.M)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system[1]}, *messages]
    said = [body.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"]) for m in messages]
    return "".join(said) + end


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, SMOLLM2_TEMPLATE])
def test_ollama_asks_with_the_prompt_that_the_model_was_trained_on(tok, template):
    tok = Tokenizer(tok.rust, template).for_chat()
    text = gguf_file.modelfile("m.gguf", CFG, tok)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello!"}]
    chat += [{"role": "user", "content": "1+1="}]
    for messages in (chat, [{"role": "system", "content": "Be brief."}, *chat]):
        assert as_ollama_does(text, messages) == tok.decode(tok.chat(messages, add_generation_prompt=True)[0])
    assert [line for line in text.splitlines() if line.startswith(("FROM", "PARAMETER"))] == [
        "FROM ./m.gguf",
        'PARAMETER stop "<|endoftext|>"',
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 0.92",
        "PARAMETER repeat_penalty 1",
        "PARAMETER num_ctx 48",
    ]


def test_ollama_only_continues_text_with_a_base_model_and_keeps_a_template_that_is_not_ours(tok):
    text = gguf_file.modelfile("m.gguf", CFG, tok)
    assert text.startswith('FROM ./m.gguf\nTEMPLATE {{ .Prompt }}\nPARAMETER stop "<|endoftext|>"\n')
    assert "im_end" not in text
    assert "TEMPLATE" not in gguf_file.modelfile("m.gguf", CFG, Tokenizer(tok.rust, "other").for_chat())


def test_the_template_is_that_of_the_folder(tmp_path):
    """In tokenizer_config.json, or in a file of its own. There may be none."""
    assert disk.read_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "old"}')
    assert disk.read_template(tmp_path) == "old"
    (tmp_path / "chat_template.jinja").write_text("new")
    assert disk.read_template(tmp_path) == "new"


# ---------------------------------------------------------------------------------------------------------
# the command


def test_the_command_writes_into_the_folder_of_the_checkpoint(folder, capsys):
    pytest.importorskip("gguf")
    export.main([str(folder), "--format=gguf", "--quant=q8_0"])
    file = folder / "model-q8_0.gguf"
    assert capsys.readouterr().out == (
        f"for Ollama: ollama create NAME -f {folder / 'Modelfile'}\n"
        f"{file}: {file.stat().st_size / 1e6:,.2f} MB\n"
    )
    assert (folder / "Modelfile").read_text().startswith("FROM ./model-q8_0.gguf\n")
    assert not list(folder.glob("*.tmp"))
    file.unlink()
    (folder / "Modelfile").unlink()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["{folder}", "--format=gguf", "--quant=q4"],
            "--quant=q4 is unknown for gguf: choose f16, bf16, q8_0 or q4_0",
        ),
        (["{folder}", "--format=gguf", "--out={folder}"], "is a folder: name a file, like"),
        (["{folder}", "--format=gguf", "--out={folder}/config.json/m.gguf"], "m.gguf cannot be written"),
        (["nowhere/at/all", "--format=gguf"], "there is no checkpoint nowhere/at/all"),
        (["--memory", "config/smol_9b.py"], "there is no preset 'config/smol_9b.py'"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_written(folder, argv, says):
    pytest.importorskip("gguf")
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=re.escape(says)):
        export.main([word.format(folder=folder) for word in argv])
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["out", "--format=pickle"], "invalid choice: 'pickle'"),
        (["--memory", "config/smol_9b.py"], "error: there is no preset 'config/smol_9b.py'"),
    ],
)
def test_a_mistake_ends_with_exit_code_2(argv, says, run_here):
    code, _, err = run_here("export/__main__.py", *argv)
    assert code == 2 and says in err and "Traceback" not in err


def test_rows_that_do_not_divide_into_blocks_are_refused_before_anything_is_written(tmp_path, tok):
    pytest.importorskip("gguf")
    checkpoint.save(tmp_path / "m", SmolLM(replace(CFG, d_ff=48)), tok)
    with pytest.raises(UserError, match="d_ff=48 to be multiples of 32: use --quant=f16"):
        gguf_file.write(tmp_path / "m", tmp_path / "out" / "m.gguf", "q8_0")
    assert not (tmp_path / "out").exists()
    gguf_file.write(tmp_path / "m", tmp_path / "out" / "m.gguf", "f16")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path, tok):
    pytest.importorskip("gguf")
    checkpoint.save(tmp_path, SmolLM(replace(CFG, vocab_size=299)), tok)
    with pytest.raises(UserError, match="has 300 ids, but the model has 299"):
        gguf_file.write(tmp_path, tmp_path / "m.gguf", "f16")


def test_an_interrupted_export_leaves_the_old_file(folder, tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_text("old")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        gguf_file.write(folder, tmp_path / "m.gguf", "f16")
    assert [path.name for path in tmp_path.glob("*.gguf")] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_text() == "old"


def test_without_the_package_the_error_says_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        gguf_file.write(folder, tmp_path / "m.gguf", "f16")


# ---------------------------------------------------------------------------------------------------------
# a folder to share


@pytest.mark.parametrize(("flags", "dtype"), [([], torch.bfloat16), (["--quant=f32"], torch.float32)])
def test_a_folder_to_share_has_the_weights_rounded_once_and_what_others_need(folder, tmp_path, flags, dtype):
    transformers = pytest.importorskip("transformers")
    (folder / "README.md").write_text("a card", encoding="utf-8")
    out = tmp_path / "shared"
    export.main([str(folder), "--format=hf", f"--out={out}", *flags])
    weights, before = load_file(out / "model.safetensors"), load_file(folder / "model.safetensors")
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[name], before[name].to(dtype)) for name in before)
    assert not (out / "optimizer.safetensors").exists() and (out / "README.md").read_text() == "a card"
    sums = dict(reversed(line.split("  ")) for line in (out / "B2SUMS").read_text().splitlines())
    assert sums == {path.name: checkpoint.digest(path) for path in out.iterdir()
                    if path.name not in ("B2SUMS", "README.md")}  # a card may be edited
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert theirs.dtype == dtype
    ours, tok = checkpoint.load(out)
    assert torch.equal(ours.head, weights["model.embed_tokens.weight"].float())
    assert tok.digest() == Tokenizer.load(folder).digest()
    with pytest.raises(UserError, match="shared exists already: name a new folder"):
        export.main([str(folder), "--format=hf", f"--out={out}"])
