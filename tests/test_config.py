"""Presets, the command line, and what is told when they cannot work."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import config
from config import Config, UserError

ROOT = Path(__file__).parents[1]
TINY = dict(n_layer=1, n_head=2, n_kv_head=1, d_model=8, d_ff=16, vocab_size=300, seq_len=8)
FIELDS = [field.name for field in dataclasses.fields(Config)]


def load(*words, preset="demo"):
    return config.load([str(ROOT / "config" / f"{preset}.py"), *words])


def run(*words):
    return subprocess.run([sys.executable, "tokenizer.py", *words], cwd=ROOT, capture_output=True, text=True,
                          encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------
# the published recipes


@pytest.mark.parametrize("preset, n_params", [
    ("smol_135m", 134_515_008), ("smol_360m", 361_821_120), ("smol_1p7b", 1_711_376_384)])
def test_the_presets_have_the_published_numbers_of_parameters(preset, n_params):
    assert load(preset=preset).n_params == n_params


@pytest.mark.parametrize("preset, max_steps, batch, lr, warmup", [
    ("smol_135m", 600_000, 512, 3e-3, 5000), ("smol_360m", 600_000, 512, 3e-3, 5000),
    ("smol_1p7b", 500_000, 1024, 5e-4, 2000)])
def test_the_presets_have_the_published_schedule(preset, max_steps, batch, lr, warmup):
    cfg = load(preset=preset)
    assert (cfg.max_steps, cfg.batch, cfg.lr, cfg.warmup_steps) == (max_steps, batch, lr, warmup)
    assert (cfg.schedule, cfg.decay_steps, cfg.optimizer) == ("wsd", 100_000, "adamw")
    assert (cfg.beta1, cfg.beta2, cfg.weight_decay, cfg.grad_clip) == (0.9, 0.95, 0.01, 1.0)
    assert (cfg.vocab_size, cfg.seq_len, cfg.rope_theta, cfg.norm_eps) == (49152, 2048, 10000.0, 1e-5)
    assert cfg.tokens_per_step == batch * 2048


@pytest.mark.parametrize("preset", ["smol_135m", "smol_360m"])
def test_the_small_presets_keep_one_mixture(preset):
    assert load(preset=preset).mixtures == [(0, {
        "fineweb-edu-dedup": 0.70, "cosmopedia-v2": 0.15, "python-edu": 0.08, "open-web-math": 0.06,
        "stackoverflow": 0.01})]


def test_the_large_preset_changes_its_mixture_at_step_300_000():
    cfg = load(preset="smol_1p7b")
    assert cfg.mixtures == [
        (0, {"fineweb-edu-dedup": 0.70, "cosmopedia-v2": 0.15, "open-web-math": 0.06,
             "starcoderdata-python": 0.08, "stackoverflow": 0.01}),
        (300_000, {"fineweb-edu-dedup": 0.70, "cosmopedia-v2": 0.15, "open-web-math": 0.055,
                   "python-edu": 0.08, "stackoverflow": 0.01, "deepmind_mathematics": 0.005})]
    assert cfg.sources == ("fineweb-edu-dedup", "cosmopedia-v2", "open-web-math", "starcoderdata-python",
                           "stackoverflow", "python-edu", "deepmind_mathematics")


def test_the_longer_context_is_smollm2s_and_a_step_has_as_many_tokens_as_before():
    cfg, before = load(preset="smol_135m_8k"), load(preset="smol_135m")
    assert (cfg.seq_len, cfg.rope_theta) == (8192, 100_000)
    assert cfg.tokens_per_step == before.tokens_per_step and cfg.init_from.startswith(before.out_dir)


def test_every_file_in_the_folder_is_a_preset_that_works():
    assert "config/demo.py" in config.known_presets()
    for preset in config.known_presets():
        assert isinstance(config.load_preset(ROOT / preset), Config)


# ---------------------------------------------------------------------------------------------------------
# the command line


@pytest.mark.parametrize("words, field, value", [
    (["--lr=1e-3"], "lr", 1e-3), (["--lr", "1e-3"], "lr", 1e-3), (["--lr=1"], "lr", 1.0),
    (["--tokenizer_bytes=1_000_000"], "tokenizer_bytes", 1_000_000),
    (["--decay_steps=None"], "decay_steps", None), (["--decay_steps=0"], "decay_steps", 0),
    (["--tokenizer=None"], "tokenizer", None), (["--tokenizer=a=b"], "tokenizer", "a=b"),
    (["--compile=True"], "compile", True), (["--doc_mask", "false"], "doc_mask", False),
    (["--data=builtin"], "data", (("builtin", 1.0),)),
    (["--data=a:0.7,b:0.3"], "data", (("a", 0.7), ("b", 0.3))),
    (["--data=a:much"], "data", (("a:much", 1.0),)),  # a source may have a colon in its name: C:\books
    (["--data=a:1,b:0.5@500,a:0.5@500"], "data", (("a", 1.0), ("b", 0.5, 500), ("a", 0.5, 500))),
    (["--filters=builtin-docs:c4+dedup"], "filters", (("builtin-docs", "c4", "dedup"),)),
    (["--filters="], "filters", ()),
    (["--classifier=a.safetensors"], "classifier", "a.safetensors"),
    (["--seed=1", "--seed=2"], "seed", 2)])
def test_the_command_line_changes_a_field(words, field, value):
    cfg = load(*words)
    assert getattr(cfg, field) == value and type(getattr(cfg, field)) is type(value)
    assert dataclasses.replace(cfg, **{field: getattr(load(), field)}) == load()


def test_a_mixture_begins_at_the_step_behind_the_at_sign():
    assert load("--data=a:1,b:0.5@500,a:0.5@500").mixtures == [(0, {"a": 1.0}), (500, {"b": 0.5, "a": 0.5})]


def test_every_mistake_on_the_command_line_is_told_at_once():
    with pytest.raises(UserError) as told:
        load("--lrr=1", "--seed=1.5", "--compile=perhaps", "--n_kv_head=3", "--batch=10", "--shard=4/3",
             "--data=a:0.5,b:0.4")
    for sentence in ("there is no config field 'lrr'. Did you mean --lr?",
                     "--seed=1.5 must be a whole number",
                     "--compile=perhaps must be True or False", "n_head=4 must be a multiple of n_kv_head=3",
                     "batch=10 must be a multiple of micro_batch=8", "shard='4/3' must be like 3/64",
                     "the weights of the mixture from step 0 add up to 0.9, not 1"):
        assert sentence in str(told.value)


@pytest.mark.parametrize("words, sentence", [
    (["--max_step=5"], "no config field 'max_step'. Did you mean --max_steps?"),
    (["--qqq=5"], "no config field 'qqq'. --help lists them all."), (["--lr"], "--lr needs a value"),
    (["--data=a:1e"], "--data=a:1e must be like builtin or name:0.7,other:0.3"),
    (["--filters=builtin"], "--filters=builtin must be like builtin:c4+dedup,name:dedup"),
    (["--filters=bultin:c4"], "filters name the source 'bultin', and data only builtin-world, "),
    (["config/demo.py"], "name one preset, not 2")])
def test_a_mistake_on_the_command_line_is_told(words, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        load(*words)


def test_a_misspelt_field_in_a_preset_is_told(tmp_path):
    preset = tmp_path / "mine.py"
    for source, sentence in {
            "from config import Config\nconfig = Config(lrr=1)": "no config field 'lrr'. Did you mean --lr?",
            "config = 3": "is not a preset", "config = Config(": "is not Python"}.items():
        preset.write_text(source, encoding="utf-8")
        with pytest.raises(UserError, match=re.escape(sentence)):
            config.load([str(preset)])


@pytest.mark.parametrize("words, sentence", [
    (["config/nope.py"], "there is no preset 'config/nope.py': there are config/demo.py"),
    (["config/demo.py", "--n_head=5"], "d_model=192 must be an even multiple of n_head=5")])
def test_a_mistake_ends_the_command_with_code_2_and_a_sentence(words, sentence):
    told = run(*words)
    assert told.returncode == 2
    assert told.stderr.startswith("error: ") and sentence in told.stderr and "Traceback" not in told.stderr


def test_help_lists_every_field_with_its_value_in_the_preset():
    told = run("config/demo.py", "--help")
    assert told.returncode == 0 and told.stdout.startswith("tokenizer.py: ")
    assert re.findall(r"^  --(\w+)=", told.stdout, re.M) == FIELDS
    assert "--d_model=192 " in told.stdout


# ---------------------------------------------------------------------------------------------------------
# Config


def test_every_impossible_value_is_told_in_one_error():
    with pytest.raises(UserError) as told:
        Config(lr=-1, batch=0, seed=-1, device="tpu", val_fraction=1.0, beta2=1.5, schedule="linear")
    assert [line[4:].split("=")[0] for line in str(told.value).splitlines()[1:]] == [
        "batch", "lr", "seed", "device", "schedule", "val_fraction", "beta2"]


@pytest.mark.parametrize("field, value", [
    ("n_layer", 2.0), ("n_layer", True), ("lr", "fast"), ("lr", float("nan")), ("compile", 1),
    ("data", ["a"]), ("data", ()), ("data", ("a",)), ("data", (("a", 0.5),)), ("data", (("a", 1.0, 5),)),
    ("data", (("a", 0.5), ("a", 0.5))), ("data", (("a", 0.99995), ("b", 0.00005))), ("out_dir", None),
    ("vocab_size", 65537), ("n_kv_head", 2), ("n_head", 7), ("batch", 12), ("warmup_steps", -1),
    ("decay_steps", -1), ("shard", "0/2"), ("on_bad", "ignore"), ("optimizer", "sgd"), ("dtype", "float16"),
    ("filters", (("builtin",),)), ("filters", ("builtin", "c4")), ("filters", (("builtin", 3),)),
    ("filters", (("builtin", "c4"), ("builtin", "dedup"))), ("filters", (("other", "c4"),)),
    ("norm_eps", 0.0), ("grad_clip", float("inf")), ("max_steps", 2**63), ("lr", 10**400)])
def test_an_impossible_value_is_refused(field, value):
    with pytest.raises(UserError, match=field if field != "data" else "data|weight"):
        Config(**{field: value})


def test_warm_up_and_decay_must_fit_into_the_run():
    assert Config(max_steps=10, warmup_steps=4, decay_steps=6).max_steps == 10
    with pytest.raises(UserError, match="warmup_steps=5 and decay_steps=6 are together longer"):
        Config(max_steps=10, warmup_steps=5, decay_steps=6)


def test_filters_may_stand_for_several_sources_and_a_file_may_have_a_colon_in_its_name():
    cfg = load("--data=C:\\a.jsonl:0.5,b:0.5", "--filters=C:\\a.jsonl:c4+dedup,b:educational")
    assert cfg.filters == (("C:\\a.jsonl", "c4", "dedup"), ("b", "educational"))
    assert Config(filters=(("other", "c4"),), fractions=True)  # not used for chats and pairs


def test_a_config_cannot_be_changed():
    cfg = Config(**TINY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.lr = 1.0
    assert dataclasses.replace(cfg, lr=1).lr == 1.0 and type(dataclasses.replace(cfg, lr=1).lr) is float


def test_the_parameters_are_counted_by_hand():
    """Embedding 300 x 8; q, o 8 x 8; k, v 8 x 4; three of 8 x 16; two norms in the block, one at the end."""
    block = 2 * 64 + 2 * 32 + 3 * 128 + 2 * 8
    assert Config(**TINY).n_params == 300 * 8 + block + 8
    assert Config(**TINY, tie_embeddings=False).n_params == 2 * 300 * 8 + block + 8


def test_the_rows_of_a_step_are_shared_by_all_devices():
    cfg = Config(**TINY, batch=32, micro_batch=4)
    assert [cfg.micro_steps(world) for world in (1, 2, 8)] == [8, 4, 1]
    for world in (3, 16):
        with pytest.raises(UserError, match=f"batch=32 must .* micro_batch=4 times {world} devices"):
            cfg.micro_steps(world)


def test_every_field_has_a_comment():
    source = (ROOT / "config" / "__init__.py").read_text(encoding="utf-8")
    assert re.findall(r"^    (\w+): [^=\n]+ = .*\S  # \S.{5,}$", source, re.M) == FIELDS


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_read_somewhere(field):
    files = [*ROOT.glob("*.py"), *ROOT.glob("corpus/*.py")]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    own = (ROOT / "config" / "__init__.py").read_text(encoding="utf-8")
    assert re.search(rf"\b(cfg|config)\.{field}\b", code) or re.search(rf"\bself\.{field}\b", own)


def test_sizes_that_no_model_has_are_refused():
    for name, value in (("n_layer", 1001), ("d_model", 2**21), ("seq_len", 2**25), ("vocab_size", 65537)):
        with pytest.raises(UserError, match=f"{name}={value} must be at most "):
            Config(**{name: value})


def test_what_the_disk_refuses_is_one_sentence_and_exit_code_2(tmp_path):
    (tmp_path / "file").write_text("")
    flags = [f"--out_dir={tmp_path / 'file'}", "--data=builtin-docs", "--device=cpu"]
    done = subprocess.run([sys.executable, "train.py", "config/demo.py", *flags], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: [Errno") and str(tmp_path / "file") in done.stderr
