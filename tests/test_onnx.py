"""export/onnx_file.py: ONNX Runtime computes what model.py computes."""

import importlib.util
import json
import math
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS

import config
import sample
from config import Config, UserError
from export import __main__ as export
from export import onnx_file
from export.blocks import to_4_bits, to_8_bits
from model import SmolLM
from plumbing import checkpoint, disk

ROOT = Path(__file__).parent.parent
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("each_graph_is_recorded_once")

# The tokenizer has 300 ids: a model may have more. 144 is not a multiple of 32, the size of a block.
SHAPE = dict(vocab_size=1000, n_layer=2, n_head=6, n_kv_head=2, d_model=96, d_ff=144)
GQA = Config(**SHAPE, seq_len=64, init_std=0.05)
MHA = replace(GQA, n_layer=1, n_head=4, n_kv_head=4, tie_embeddings=False, rope_theta=500.0, init_std=0.1)
SHAPES = pytest.mark.parametrize("cfg", [GQA, MHA], ids=["GQA tied", "MHA untied"])
QUANTS = pytest.mark.parametrize("quant", onnx_file.FILES)


@pytest.fixture(scope="module")
def rows(tok):
    """Rows of T + 1 ids: texts in which the words of the fixture follow in a fixed order."""
    rng = random.Random(0)
    starts = [rng.randrange(len(WORDS)) for _ in range(400)]
    texts = [" ".join((WORDS * 4)[start:start + rng.randrange(20, 50)]) for start in starts]
    ids = torch.tensor([i for text in texts for i in [*tok.encode(text), 0]])
    return ids[:len(ids) // 65 * 65].view(-1, 65)


@pytest.fixture(scope="module")
def folders(tok, rows, tmp_path_factory):
    """{Config: folder}: GQA has learned the order of the words, MHA has random weights."""
    folders = {}
    for cfg in (GQA, MHA):
        torch.manual_seed(0)
        model, folders[cfg] = SmolLM(cfg), tmp_path_factory.mktemp("model")
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(60 if cfg == GQA else 0):
            batch = rows[step * 8 % (len(rows) - 40):][:8]
            optimizer.zero_grad()
            (-model(batch[:, :-1], batch[:, 1:]).mean()).backward()
            optimizer.step()
        checkpoint.save(folders[cfg], model, tok)
    return folders


@pytest.fixture
def copied(folders, tmp_path):
    """A function: copy a model's folder to tmp_path / "m", and load it."""
    def copy(cfg):
        shutil.copytree(folders[cfg], tmp_path / "m")
        return checkpoint.load(tmp_path / "m")[0].eval().requires_grad_(False)
    return copy


class Runtime:
    """A graph in ONNX Runtime. It keeps its cache from call to call, as a program that generates would."""

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


# ---------------------------------------------------------------------------------------------------------
# logits


@SHAPES
def test_logits_are_those_of_our_model_in_one_call_and_in_pieces(cfg, copied, tmp_path):
    model, ids = copied(cfg), some_ids(2, 40)
    path = onnx_file.write(tmp_path / "m", tmp_path / "out", "fp32")
    near(model(ids), Runtime(path)(ids))
    pieces = Runtime(path)
    near(model(ids), torch.cat([pieces(part) for part in ids.split([7, 1, 1, 20, 11], dim=1)], dim=1))


@SHAPES
def test_greedy_text_with_the_cache_is_ours(cfg, copied, tmp_path):
    model, prompt = copied(cfg), some_ids(1, 10)
    runtime = Runtime(onnx_file.write(tmp_path / "m", tmp_path / "out", "fp32"))
    new = runtime(prompt)[:, -1:].argmax(-1)
    found = []
    for _ in range(32):
        found.append(new.item())
        new = runtime(new)[:, -1:].argmax(-1)
    assert found == list(sample.generate(model, prompt[0].tolist(), 32, temperature=0))


@SHAPES
@QUANTS
def test_a_text_that_is_padded_on_the_left_is_computed_as_if_it_were_alone(cfg, quant, copied, tmp_path):
    """In the prompt and after it, next to a longer text. Also where activations are rounded, since each row
    has its own scales."""
    copied(cfg)
    path = onnx_file.write(tmp_path / "m", tmp_path / "out", quant)
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


@pytest.mark.parametrize(("quant", "within"), [("fp32", 1e-6), ("fp16", 1e-3), ("int8", 0.01), ("q4", 0.1)])
def test_perplexity_stays_near_to_ours(copied, rows, quant, within, tmp_path):
    model, rows = copied(GQA), rows[-16:]
    ours = math.exp(-model(rows[:, :-1], rows[:, 1:]).mean())
    logits = Runtime(onnx_file.write(tmp_path / "m", tmp_path / "out", quant))(rows[:, :-1])
    theirs = math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
    assert ours < 10 and abs(theirs / ours - 1) < within


# ---------------------------------------------------------------------------------------------------------
# blocks


def test_blocks_of_4_bits_are_nearer_to_the_weights_than_those_of_onnxruntime():
    quantize = pytest.importorskip("onnxruntime.capi._pybind_state").quantize_matmul_4bits
    weight = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    q, scale = np.zeros((7, 2, 16), np.uint8), np.zeros(14, np.float32)
    quantize(q, np.ascontiguousarray(weight.T.numpy()), scale, np.zeros((7, 1), np.uint8), 32, 7, 64, True)
    ours = onnx_file.Blocks(weight, 4)
    errors = []
    for pairs, scales in ((ours.q.numpy(), ours.scale.numpy()), (q, scale)):
        numbers = np.stack((pairs & 15, pairs >> 4), axis=-1).reshape(7, 2, 32).astype(np.float32) - 8
        errors.append(np.square(numbers * scales.reshape(7, 2, 1) - weight.numpy().reshape(7, 2, 32)).sum(2))
    assert (errors[0] <= errors[1] * 1.001).all() and errors[0].sum() < 0.97 * errors[1].sum()


def test_8_bits_are_the_nearest_of_255_steps():
    blocks = np.zeros((3, 32), np.float32)
    blocks[0, :3], blocks[2, :3] = (0.5, -1.0, 0.2), (3.0, 0.01, -3.0)
    scale, q = to_8_bits(blocks)
    assert q[:, :3].tolist() == [[64, -127, 25], [0, 0, 0], [127, 0, -127]]
    assert (np.abs(q * scale - blocks) <= scale / 2).all()


def test_4_bits_keep_what_16_steps_can_express_and_round_the_rest_to_the_nearest():
    """Steps of 0.5 from -8 to 7, in both directions; zeros; and one large weight that is cut short."""
    blocks = np.zeros((4, 32), np.float32)
    blocks[0, :3], blocks[1, :3] = (-4.0, 3.5, 0.5), (4.0, -3.5, 1.0)
    blocks[3] = np.linspace(-1, 1, 32)
    scale, q = to_4_bits(blocks)
    assert (scale * (q.astype(np.float32) - 8) == blocks)[:3].all()
    assert q[2].tolist() == [8] * 32 and scale[2] == 0
    found = scale[3] * (q[3].astype(np.float32) - 8)
    assert np.abs(found - blocks[3])[1:-1].max() <= np.abs(scale[3]) / 2 * 1.001


@pytest.mark.parametrize("bits", [8, 4])
def test_one_huge_activation_makes_at_most_its_block_coarse(bits, tmp_path):
    """As in layer 11 of SmolLM-135M, where one input of down_proj is 2,485 and the mean is 0.12. One scale
    for the 1,536 numbers of a row would turn all others into 0; blocks lose one of 48. With weights of 8 bits
    the activations are not rounded at all."""
    random = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 1536, generator=random), torch.randn(1, 1536, generator=random) * 0.12
    x[0, 700] = 2485
    blocks = onnx_file.Blocks(weight, bits).eval()
    torch.onnx.export(blocks, (x,), tmp_path / "b.onnx", dynamo=True, input_names=["x"], verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "b.onnx", providers=["CPUExecutionProvider"])
    found = torch.tensor(session.run(None, {"x": x.numpy()})[0])
    scale, q = {8: to_8_bits, 4: to_4_bits}[bits](weight.view(-1, 32).numpy())
    weight = torch.tensor(scale * (q.astype(np.float32) - (8 if bits == 4 else 0))).view(64, 1536)
    others = x.clone()
    others[0, 700] = 0
    lost = (found - x @ weight.T).norm() / (others @ weight.T).norm()
    assert lost < 1e-3 if bits == 8 else 0.1 < lost < 0.2  # sqrt(1 / 48) = 0.144


# ---------------------------------------------------------------------------------------------------------
# files


@QUANTS
def test_the_graph_has_the_names_and_shapes_that_transformers_js_looks_for(copied, quant, tmp_path):
    copied(GQA)
    runtime = Runtime(onnx_file.write(tmp_path / "m", tmp_path / "out", quant))
    names = [f"{layer}.{kind}" for layer in range(GQA.n_layer) for kind in ("key", "value")]
    assert list(runtime.inputs) == ["input_ids", "attention_mask", "position_ids",
                                    *(f"past_key_values.{name}" for name in names)]
    assert runtime.outputs == ["logits", *(f"present.{name}" for name in names)]
    past = runtime.inputs["past_key_values.0.key"]
    assert past.shape == ["batch_size", 2, "past_sequence_length", 16]
    assert past.type == ("tensor(float16)" if quant == "fp16" else "tensor(float)")
    assert runtime.session.get_outputs()[0].type == "tensor(float)"


def test_files_are_as_small_as_they_should_be_and_hold_no_path_of_this_machine(copied, tmp_path):
    """Bytes per parameter, with room for the graph. A tied embedding is stored once."""
    copied(GQA)
    for quant, size in {"fp32": 4, "fp16": 2, "int8": 1.13, "q4": 0.9}.items():
        path = onnx_file.write(tmp_path / "m", tmp_path / "out", quant)
        assert path.stat().st_size < GQA.n_params * size + 60_000
        assert b"model.py" not in path.read_bytes()


def test_one_folder_holds_all_graphs_and_opens_as_a_hugging_face_folder(copied, tmp_path):
    copied(GQA)
    (tmp_path / "m" / "chat_template.jinja").write_text("transformers 5 keeps it here")
    for quant in onnx_file.FILES:
        onnx_file.write(tmp_path / "m", tmp_path / "out", quant)
    found = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert found == sorted([*(f"onnx/{name}" for name in onnx_file.FILES.values()), "config.json",
                            "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                            "chat_template.jinja", "generation_config.json"])
    for name in onnx_file.TOKENIZER:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()
    assert checkpoint.read_config(tmp_path / "out") == checkpoint.read_config(tmp_path / "m")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["transformers.js_config"]
    assert settings["use_external_data_format"] == dict.fromkeys(onnx_file.FILES.values(), False)


def test_the_command_says_what_it_wrote(copied, tmp_path, capsys):
    copied(GQA)
    export.main([str(tmp_path / "m"), "--format=onnx", "--quant=int8"])
    path = tmp_path / "m" / "onnx" / "onnx" / "model_int8.onnx"
    assert capsys.readouterr().out == f"{path}: {path.stat().st_size / 1e6:,.2f} MB\n"


@QUANTS
def test_weights_of_a_large_model_are_in_a_file_next_to_the_graph(copied, quant, tmp_path, monkeypatch):
    copied(GQA)
    ids = some_ids(1, 20)
    one_file = Runtime(onnx_file.write(tmp_path / "m", tmp_path / "one", quant))(ids)
    monkeypatch.setattr(onnx_file, "ONE_FILE", 1000)
    path = onnx_file.write(tmp_path / "m", tmp_path / "two", quant)
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}_data"]
    assert path.stat().st_size < 100_000 and torch.equal(Runtime(path)(ids), one_file)
    settings = json.loads((tmp_path / "two" / "config.json").read_text())["transformers.js_config"]
    assert settings["use_external_data_format"][path.name] is True


def test_published_models_below_2_gb_are_one_file():
    large = {}
    for preset in ("smol_135m", "smol_360m", "smol_1p7b"):
        cfg = config.load([f"{ROOT}/config/{preset}.py"])
        large[preset] = [quant for quant in onnx_file.FILES if onnx_file.is_large(cfg, quant)]
    assert large == {"smol_135m": [], "smol_360m": [], "smol_1p7b": ["fp32", "fp16"]}


@pytest.mark.parametrize("limit", [1000, 2_000_000_000])
def test_an_interrupted_export_leaves_no_graph(copied, limit, tmp_path, monkeypatch):
    copied(GQA)
    monkeypatch.setattr(onnx_file, "ONE_FILE", limit)
    onnx_file.write(tmp_path / "m", tmp_path / "out", "fp32")
    before = (tmp_path / "out/onnx/model.onnx").read_bytes()
    replace_file = disk.replace
    monkeypatch.setattr(disk, "replace", lambda a, b: 1 / 0 if "model.onnx" in str(b) else replace_file(a, b))
    with pytest.raises(ZeroDivisionError):
        onnx_file.write(tmp_path / "m", tmp_path / "out", "fp32")
    path = tmp_path / "out/onnx/model.onnx"
    assert not path.exists() if limit == 1000 else path.read_bytes() == before  # never old next to new


def test_mistakes_are_one_sentence(copied, tmp_path, monkeypatch):
    copied(GQA)
    with pytest.raises(UserError, match="--quant=q8_0 is unknown for onnx: choose fp32, fp16, int8 or q4"):
        export.main([str(tmp_path / "m"), "--format=onnx", "--quant=q8_0"])
    with pytest.raises(UserError, match="there is no checkpoint"):
        onnx_file.write(tmp_path / "gone", tmp_path / "out", "fp32")
    (tmp_path / "m" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="there is no tokenizer at .*tokenizer.json"):
        onnx_file.write(tmp_path / "m", tmp_path / "out", "fp32")
    (tmp_path / "tokenizer.json").rename(tmp_path / "m" / "tokenizer.json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install onnxscript"):
        onnx_file.write(tmp_path / "m", tmp_path / "out", "fp32")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------
# transformers.js

PROGRAM = """
import { AutoModelForCausalLM, AutoTokenizer, env } from "PACKAGE";
env.localModelPath = "FOLDER/"; env.allowRemoteModels = false;
const model = await AutoModelForCausalLM.from_pretrained("out", { dtype: "QUANT" });
const tokenizer = await AutoTokenizer.from_pretrained("out");
tokenizer.padding_side = "left";
const inputs = tokenizer(TEXTS, { padding: true, add_special_tokens: false });
const out = await model.generate({ ...inputs, max_new_tokens: 16, do_sample: false, eos_token_id: null });
console.log(JSON.stringify(out.tolist().map(row => row.slice(-16).map(Number))));
"""


@pytest.mark.interop
@QUANTS
def test_transformers_js_under_node_writes_our_greedy_text(copied, tok, quant, tmp_path):
    """npm install --global --ignore-scripts @huggingface/transformers. Two texts, one padded on the left."""
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    home = subprocess.run(["npm", "root", "--global"], capture_output=True, text=True, check=True).stdout
    package = Path(home.strip()) / "@huggingface/transformers/dist/transformers.node.mjs"
    if not package.is_file():
        pytest.skip(f"there is no {package}")
    model = copied(GQA)
    onnx_file.write(tmp_path / "m", tmp_path / "out", quant)
    texts = ["the cat sat on a mat and saw", "rain fell"]
    program = tmp_path / "run.mjs"
    text = PROGRAM.replace("PACKAGE", str(package)).replace("FOLDER", str(tmp_path)).replace("QUANT", quant)
    program.write_text(text.replace("TEXTS", json.dumps(texts)))
    done = subprocess.run(["node", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ours = [list(sample.generate(model, tok.encode(text), 16, temperature=0)) for text in texts]
    assert json.loads(done.stdout.splitlines()[-1]) == ours
