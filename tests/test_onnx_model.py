"""onnx_model.py: ONNX Runtime computes what model.py computes."""

import importlib.util
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS

from plumbing import checkpoint
import config
from export import __main__ as export
from plumbing import hf_config
from export import onnx_model
import sample
from config import Config, UserError
from model import SmolLM

ROOT = Path(__file__).parent.parent
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

GQA = Config(vocab_size=300, n_layer=3, n_head=6, n_kv_head=2, d_model=96, d_ff=144, seq_len=64, init_std=0.1)
MHA = replace(GQA, n_head=4, n_kv_head=4, tie_embeddings=False, rope_theta=500.0)
SHAPES = pytest.mark.parametrize("cfg", [GQA, MHA], ids=["GQA tied", "MHA untied"])
QUANTS = pytest.mark.parametrize("quant", onnx_model.FILES)


def saved(cfg, tok, folder):
    torch.manual_seed(0)
    model = SmolLM(cfg).eval().requires_grad_(False)
    model.save(folder)
    tok.save(folder)
    return model


class Runtime:
    """A graph in ONNX Runtime; it keeps its cache from call to call, as a program that generates would."""

    def __init__(self, path):
        onnx.checker.check_model(str(path), full_check=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # these models are too small to share among cores
        self.session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.past = None

    def __call__(self, ids, mask=None):
        """ids (B, T) -> logits (B, T, V). mask (B, past + T): 0 where a text is padded."""
        ids = np.asarray(ids)
        if self.past is None:
            self.past = {name: np.zeros((len(ids), *(n if isinstance(n, int) else 0 for n in i.shape[1:])),
                                        np.float16 if "16" in i.type else np.float32)
                         for name, i in self.inputs.items() if name.startswith("past")}
        S = next(iter(self.past.values())).shape[2] + ids.shape[1]
        mask = np.ones((len(ids), S), np.int64) if mask is None else np.asarray(mask)
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, S - ids.shape[1]:]
        values = self.session.run(None, {"input_ids": ids, "attention_mask": mask,
                                         "position_ids": positions, **self.past})
        self.past = {name.replace("present", "past_key_values"): value
                     for name, value in zip(self.outputs, values) if name.startswith("present")}
        return torch.tensor(values[0])


def some_ids(B, T, seed=1):
    return torch.randint(17, 300, (B, T), generator=torch.Generator().manual_seed(seed))


def near(ours, theirs, atol=1e-4):
    torch.testing.assert_close(theirs, ours, rtol=0, atol=atol)


@SHAPES
def test_logits_are_those_of_our_model_at_every_position_at_once_and_in_pieces(cfg, tok, tmp_path):
    model, ids = saved(cfg, tok, tmp_path / "m"), some_ids(2, 40)
    path = onnx_model.write(tmp_path / "m", tmp_path / "out", "fp32")
    near(model(ids), Runtime(path)(ids))
    pieces = Runtime(path)
    near(model(ids), torch.cat([pieces(part) for part in ids.split([7, 1, 1, 20, 11], dim=1)], dim=1))


@SHAPES
def test_greedy_text_with_the_cache_is_ours(cfg, tok, tmp_path):
    model, prompt = saved(cfg, tok, tmp_path / "m"), some_ids(1, 10)
    runtime = Runtime(onnx_model.write(tmp_path / "m", tmp_path / "out", "fp32"))
    new = runtime(prompt)[:, -1:].argmax(-1)
    found = []
    for _ in range(32):
        found.append(new.item())
        new = runtime(new)[:, -1:].argmax(-1)
    assert found == list(sample.generate(model, prompt[0].tolist(), 32, temperature=0))


@SHAPES
@QUANTS
def test_a_text_that_is_padded_on_the_left_is_computed_as_if_it_were_alone(cfg, quant, tok, tmp_path):
    """Beside a longer text, behind any padding, in the prompt and after it: also where activations are
    rounded, since every row has its own scale."""
    saved(cfg, tok, tmp_path / "m")
    path = onnx_model.write(tmp_path / "m", tmp_path / "out", quant)
    long, short, after = some_ids(1, 12), some_ids(1, 5, seed=2), some_ids(2, 1, seed=3)
    mask = [[1] * 13, [0] * 7 + [1] * 6]
    both, alone = Runtime(path), (Runtime(path), Runtime(path))
    logits = both(torch.cat([long, torch.cat([torch.full((1, 7), 9), short], dim=1)]), np.array(mask)[:, :12])
    assert logits.isfinite().all()
    tolerance = {"fp32": 1e-5, "fp16": 1e-2, "int8": 1e-5, "q4": 1e-5}[quant]
    near(alone[0](long), logits[:1], atol=tolerance)
    near(alone[1](short), logits[1:, 7:], atol=tolerance)
    logits = both(after, mask)
    near(torch.cat([alone[0](after[:1]), alone[1](after[1:])]), logits, atol=tolerance)


@pytest.fixture(scope="module")
def trained(tok, tmp_path_factory):
    """(folder, model, rows): a model that has learnt that words of the fixture follow in a fixed order."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("trained")
    starts = [rng.randrange(len(WORDS)) for _ in range(400)]
    texts = [" ".join((WORDS * 4)[start:start + rng.randrange(20, 50)]) for start in starts]
    ids = torch.tensor([i for text in texts for i in [*tok.encode(text), 0]])
    rows = ids[:len(ids) // 65 * 65].view(-1, 65)
    model = saved(replace(GQA, init_std=0.05), tok, folder).requires_grad_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        batch = rows[step * 8 % (len(rows) - 40):][:8]
        optimizer.zero_grad()
        (-model(batch[:, :-1], batch[:, 1:]).mean()).backward()
        optimizer.step()
    model.requires_grad_(False).save(folder)
    return folder, model, rows[-16:]


@pytest.mark.parametrize(("quant", "within"), [("fp32", 1e-6), ("fp16", 1e-3), ("int8", 0.01), ("q4", 0.1)])
def test_perplexity_stays_near_to_ours(trained, quant, within, tmp_path):
    folder, model, rows = trained
    ours = math.exp(-model(rows[:, :-1], rows[:, 1:]).mean())
    logits = Runtime(onnx_model.write(folder, tmp_path, quant))(rows[:, :-1])
    theirs = math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
    assert ours < 10 and abs(theirs / ours - 1) < within


def test_blocks_of_4_bits_are_those_of_onnxruntime():
    quantise = pytest.importorskip("onnxruntime.capi._pybind_state").quantize_matmul_4bits
    weight = torch.randn(7, 80, generator=torch.Generator().manual_seed(0))
    weight[3, 32:64] = 0
    q, scale = np.zeros((7, 3, 16), np.uint8), np.zeros(21, np.float32)
    quantise(q, np.ascontiguousarray(weight.T.numpy()), scale, np.zeros((7, 2), np.uint8), 32, 7, 80, True)
    our_q, our_scale = onnx_model.int4_blocks(weight)
    np.testing.assert_allclose(our_scale.flatten()[scale != 0], scale[scale != 0], rtol=1e-6)
    assert our_scale[3, 1] == 1 and (our_q[3, 1] == 0x88).all()  # nothing but 0
    our_q = our_q.numpy()
    our_q[3, 1], q[3, 1] = 0, 0
    assert np.array_equal(our_q.reshape(7, -1)[:, :40], q.reshape(7, -1)[:, :40])  # 80 numbers; the rest pads


def test_8_bits_are_the_nearest_of_255_steps():
    weight = torch.tensor([[0.5, -1.0, 0.2], [0.0, 0.0, 0.0], [3.0, 0.01, -3.0]])
    q, scale = onnx_model.int8_rows(weight)
    assert q.tolist() == [[64, -127, 25], [0, 0, 0], [127, 0, -127]]
    assert ((q * scale[:, None] - weight).abs() <= scale[:, None] / 2).all()


@QUANTS
def test_the_graph_has_the_names_and_shapes_that_transformers_js_looks_for(tok, quant, tmp_path):
    saved(GQA, tok, tmp_path / "m")
    runtime = Runtime(onnx_model.write(tmp_path / "m", tmp_path / "out", quant))
    names = [f"{layer}.{kind}" for layer in range(3) for kind in ("key", "value")]
    assert list(runtime.inputs) == ["input_ids", "attention_mask", "position_ids",
                                    *(f"past_key_values.{name}" for name in names)]
    assert runtime.outputs == ["logits", *(f"present.{name}" for name in names)]
    past = runtime.inputs["past_key_values.0.key"]
    assert past.shape == ["batch_size", 2, "past_sequence_length", 16]
    assert past.type == ("tensor(float16)" if quant == "fp16" else "tensor(float)")
    assert runtime.session.get_outputs()[0].type == "tensor(float)"


def test_files_are_as_small_as_they_should_be(tok, tmp_path):
    """Bytes a parameter, with room for the graph; a tied embedding is there once."""
    cfg = replace(GQA, d_model=192, d_ff=512, vocab_size=6000)
    saved(cfg, tok, tmp_path / "m")
    for quant, size in {"fp32": 4, "fp16": 2, "int8": 1.03, "q4": 0.9}.items():
        path = onnx_model.write(tmp_path / "m", tmp_path / "out", quant)
        assert path.stat().st_size < cfg.n_params * size + 60_000


def test_one_folder_holds_all_graphs_and_opens_as_a_hugging_face_folder(tok, tmp_path):
    saved(GQA, tok, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text("transformers 5 keeps it here")
    for quant in onnx_model.FILES:
        onnx_model.write(tmp_path / "m", tmp_path / "out", quant)
    found = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert found == sorted([*(f"onnx/{name}" for name in onnx_model.FILES.values()), "config.json",
                            "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                            "chat_template.jinja", "generation_config.json"])
    for name in onnx_model.TOKENIZER:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()
    assert hf_config.read_config(tmp_path / "out") == hf_config.read_config(tmp_path / "m")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["transformers.js_config"]
    assert settings["use_external_data_format"] == dict.fromkeys(onnx_model.FILES.values(), False)


def test_the_command_says_what_it_wrote(tok, tmp_path, capsys):
    saved(GQA, tok, tmp_path / "m")
    export.main([str(tmp_path / "m"), "--format=onnx", "--quant=int8"])
    path = tmp_path / "m" / "onnx" / "onnx" / "model_int8.onnx"
    assert capsys.readouterr().out == f"{path}: {path.stat().st_size / 1e6:,.2f} MB\n"


@QUANTS
def test_weights_of_a_large_model_lie_beside_the_graph(tok, quant, tmp_path, monkeypatch):
    saved(GQA, tok, tmp_path / "m")
    ids = some_ids(1, 20)
    whole = Runtime(onnx_model.write(tmp_path / "m", tmp_path / "one", quant))(ids)
    monkeypatch.setattr(onnx_model, "ONE_FILE", 1000)
    path = onnx_model.write(tmp_path / "m", tmp_path / "two", quant)
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}_data"]
    assert path.stat().st_size < 100_000 and torch.equal(Runtime(path)(ids), whole)
    settings = json.loads((tmp_path / "two" / "config.json").read_text())["transformers.js_config"]
    assert settings["use_external_data_format"][path.name] is True


def test_published_models_below_2_gb_are_one_file():
    large = {}
    for preset in ("smol_135m", "smol_360m", "smol_1p7b"):
        cfg = config.load([f"{ROOT}/config/{preset}.py"])
        large[preset] = [quant for quant in onnx_model.FILES if onnx_model.is_large(cfg, quant)]
    assert large == {"smol_135m": [], "smol_360m": [], "smol_1p7b": ["fp32", "fp16"]}


@pytest.mark.parametrize("limit", [1000, 2_000_000_000])
def test_an_interrupted_export_leaves_no_graph(tok, limit, tmp_path, monkeypatch):
    saved(GQA, tok, tmp_path / "m")
    monkeypatch.setattr(onnx_model, "ONE_FILE", limit)
    onnx_model.write(tmp_path / "m", tmp_path / "out", "fp32")
    before = (tmp_path / "out/onnx/model.onnx").read_bytes()
    put = checkpoint.put
    monkeypatch.setattr(checkpoint, "put", lambda a, b: 1 / 0 if "model.onnx" in str(b) else put(a, b))
    with pytest.raises(ZeroDivisionError):
        onnx_model.write(tmp_path / "m", tmp_path / "out", "fp32")
    path = tmp_path / "out/onnx/model.onnx"
    assert not path.exists() if limit == 1000 else path.read_bytes() == before  # never old beside new


def test_mistakes_are_one_sentence(tok, tmp_path, monkeypatch):
    SmolLM(GQA).save(tmp_path / "m")
    with pytest.raises(UserError, match="--quant=q8_0 is not known for ONNX: there are fp32, fp16, int8, q4"):
        onnx_model.write(tmp_path / "m", tmp_path / "out", "q8_0")
    with pytest.raises(UserError, match="there is no checkpoint"):
        onnx_model.write(tmp_path / "gone", tmp_path / "out", "fp32")
    with pytest.raises(UserError, match="there is no tokenizer.json in"):
        onnx_model.write(tmp_path / "m", tmp_path / "out", "fp32")
    tok.save(tmp_path / "m")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install onnx"):
        onnx_model.write(tmp_path / "m", tmp_path / "out", "fp32")
    assert not (tmp_path / "out").exists()
