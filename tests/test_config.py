"""Presets, the command line, and the error messages for those that cannot work."""

import dataclasses
import re
from pathlib import Path

import children
import pytest

import config
from config import Config, UserError

ROOT = Path(__file__).parents[1]
TINY = dict(n_layer=1, n_head=2, n_kv_head=1, d_model=8, d_ff=16, vocab_size=300, seq_len=8)
FIELDS = [field.name for field in dataclasses.fields(Config)]


def load(*words, preset="demo"):
    return config.load([str(ROOT / "config" / f"{preset}.py"), *words])


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
    (["--part=3/64"], "part", "3/64"),
    (["--seed=1", "--seed=2"], "seed", 2)])
def test_the_command_line_changes_a_field(words, field, value):
    cfg = load(*words)
    assert getattr(cfg, field) == value and type(getattr(cfg, field)) is type(value)
    assert dataclasses.replace(cfg, **{field: getattr(load(), field)}) == load()


def test_a_mixture_begins_at_the_step_after_the_at_sign():
    assert load("--data=a:1,b:0.5@500,a:0.5@500").mixtures == [(0, {"a": 1.0}), (500, {"b": 0.5, "a": 0.5})]


def test_one_error_lists_every_mistake_on_the_command_line():
    with pytest.raises(UserError) as error:
        load("--lrr=1", "--seed=1.5", "--compile=perhaps", "--n_kv_head=3", "--batch=10", "--part=4/3",
             "--data=a:0.5,b:0.4")
    for sentence in ("there is no config field 'lrr'. Did you mean --lr?",
                     "--seed=1.5 must be a whole number",
                     "--compile=perhaps must be True or False", "n_head=4 must be a multiple of n_kv_head=3",
                     "batch=10 must be a multiple of micro_batch=16", "part='4/3' must be like 3/64",
                     "the weights of the mixture from step 0 add up to 0.9, not 1"):
        assert sentence in str(error.value)


@pytest.mark.parametrize("words, sentence", [
    (["--max_step=5"], "no config field 'max_step'. Did you mean --max_steps?"),
    (["--qqq=5"], "no config field 'qqq'. --help lists them all."), (["--lr"], "--lr needs a value"),
    (["--data=a:1e"], "--data=a:1e must be like builtin or name:0.7,other:0.3"),
    (["config/demo.py"], "name one preset, not 2: begin with config/demo.py")])
def test_a_mistake_on_the_command_line_is_named(words, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        load(*words)


@pytest.mark.parametrize("foreign, ours", [
    ("learning_rate", "lr"), ("batch_size", "batch"), ("max_iters", "max_steps"), ("block_size", "seq_len"),
    ("context_length", "seq_len"), ("n_embd", "d_model"), ("num_layers", "n_layer"), ("beta", "dpo_beta"),
    ("hidden_size", "d_model"), ("num_hidden_layers", "n_layer"), ("intermediate_size", "d_ff"),
    ("max_position_embeddings", "seq_len"), ("rms_norm_eps", "norm_eps"), ("max-steps", "max_steps")])
def test_the_names_of_other_projects_suggest_ours(foreign, ours):
    with pytest.raises(UserError, match=f"no config field '{foreign}'. Did you mean --{ours}[?]"):
        load(f"--{foreign}=1")


def test_every_suggested_name_is_a_field():
    assert set(config.FOREIGN_NAMES.values()) <= set(FIELDS) and not config.FOREIGN_NAMES.keys() & set(FIELDS)


@pytest.mark.parametrize("words, sentence", [
    (["demo"], "there is no preset 'demo': did you mean config/demo.py?"),
    (["config/demo_stf.py"], "there is no preset 'config/demo_stf.py': did you mean config/demo_sft.py?"),
    (["smol_135"], "there is no preset 'smol_135': did you mean config/smol_135m.py?"),
    (["nothing"], "there is no preset 'nothing': begin with config/demo.py; the others are "),
    ([], "name a preset: begin with config/demo.py; the others are config/demo_dpo.py, "),
    (["--lr=1"], "name a preset: begin with config/demo.py; the others are config/demo_dpo.py, ")])
def test_a_missing_preset_suggests_one(words, sentence, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=re.escape(sentence)):
        config.load(words)


@pytest.mark.parametrize("source, sentence", [
    ("from config import Config\nconfig = Config(lrr=1)",
     "mine.py, line 2: there is no config field 'lrr'. Did you mean --lr?"),
    ("from config import Config\n\nconfig = Config(lr=x)",
     "mine.py, line 3: NameError: name 'x' is not defined"),
    ("def half(n):\n    return m / 2\n\nconfig = half(1)",
     "mine.py, line 2: NameError: name 'm' is not defined"),
    ("from config import Config\nconfig = Config(n_head=5)",
     "mine.py, line 2: this config cannot work:\n  - d_model=576 must be an even multiple of n_head=5"),
    ("from config.demoo import config",
     "mine.py, line 1: ModuleNotFoundError: No module named 'config.demoo'"),
    ("a = 1\nconfig = Config(", "mine.py, line 2: SyntaxError: '(' was never closed"),
    ("config = '\0'", "source code string cannot contain null bytes"),
    ("config = 3", "mine.py is not a preset: it must contain a line like config = Config(...)")])
def test_a_broken_preset_shows_its_file_and_line(tmp_path, source, sentence):
    preset = tmp_path / "mine.py"
    preset.write_text(source, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        config.load([str(preset)])
    assert str(error.value).startswith(str(preset))


@pytest.mark.parametrize("words, sentence", [
    (["config/nope.py"], "there is no preset 'config/nope.py': begin with config/demo.py"),
    (["config/demo.py", "--n_head=5"], "d_model=192 must be an even multiple of n_head=5")])
def test_a_mistake_ends_the_command_with_code_2_and_a_sentence(words, sentence, run_here):
    code, _, err = run_here("tokenizer.py", *words)
    assert code == 2
    assert err.startswith("error: ") and sentence in err and "Traceback" not in err


def test_help_lists_every_field_with_its_value_in_the_preset():
    done = children.run("tokenizer.py", "config/demo.py", "--help")
    assert done.returncode == 0 and done.stdout.startswith("tokenizer.py: ")
    assert re.findall(r"^  --(\w+)=", done.stdout, re.M) == FIELDS
    assert "--d_model=192 " in done.stdout


# ---------------------------------------------------------------------------------------------------------
# Config


def test_one_error_lists_every_impossible_value():
    with pytest.raises(UserError) as error:
        Config(lr=-1, batch=0, seed=-1, device="tpu", val_fraction=1.0, beta2=1.5, schedule="fast")
    assert [line[4:].split("=")[0] for line in str(error.value).splitlines()[1:]] == [
        "batch", "lr", "seed", "device", "schedule", "val_fraction", "beta2"]


@pytest.mark.parametrize("field", [name for name in FIELDS if config.choices_of(name)])
def test_a_choice_is_checked_and_help_shows_all_of_them(field):
    """They are the field's type, Literal[...], and stand nowhere else."""
    choices = config.choices_of(field)
    for value in choices:
        assert getattr(load(f"--{field}={value}"), field) == value
    with pytest.raises(UserError, match=f"{field}='perhaps' must be one of {', '.join(choices)}"):
        load(f"--{field}=perhaps")
    assert re.search(rf"--{field}=\S+ +{re.escape(' | '.join(choices))}: \w", config.field_help(Config()))


@pytest.mark.parametrize("field", [name for name in FIELDS
                                   if {int, float} & {*config.types_of(Config, name)}])
def test_no_number_may_be_negative(field):
    """Also one that somebody adds: nothing lists those that may not."""
    with pytest.raises(UserError, match=f"{field}=-1.* must (not be negative|be above 0|be at least 0)"):
        Config(**{field: -1})


@pytest.mark.parametrize("field, value", [
    ("n_layer", 2.0), ("n_layer", True), ("lr", "fast"), ("lr", float("nan")), ("compile", 1),
    ("data", ["a"]), ("data", ()), ("data", ("a",)), ("data", (("a", 0.5),)), ("data", (("a", 1.0, 5),)),
    ("data", (("a", 0.5), ("a", 0.5))), ("data", (("a", 0.99995), ("b", 0.00005))), ("out_dir", None),
    ("vocab_size", 65537), ("n_kv_head", 2), ("n_head", 7), ("batch", 12), ("warmup_steps", -1),
    ("decay_steps", -1), ("part", "0/2"), ("on_bad", "ignore"), ("optimizer", "sgd"), ("dtype", "float16"),
    ("norm_eps", 0.0), ("grad_clip", float("inf")), ("max_steps", 2**63), ("lr", 10**400)])
def test_an_impossible_value_is_refused(field, value):
    with pytest.raises(UserError, match=field if field != "data" else "data|weight"):
        Config(**{field: value})


def test_warm_up_and_decay_must_fit_into_the_run():
    assert Config(max_steps=10, warmup_steps=4, decay_steps=6).max_steps == 10
    with pytest.raises(UserError, match="warmup_steps=5 and decay_steps=6 are together longer"):
        Config(max_steps=10, warmup_steps=5, decay_steps=6)


@pytest.mark.parametrize("fields, sentence", [
    (dict(max_steps=1000, warmup_steps=900),
     r"warmup_steps=900 and decay_steps=None \(two fifths of the run\) .* 900 \+ 400 steps .* "
     "max_steps=1000"),
    (dict(max_steps=1000, warmup_ratio=0.9, decay_steps=500),
     r"warmup_ratio=0.9 and decay_steps=500 .* 900 \+ 500 steps"),
    (dict(max_steps=1000, warmup_ratio=0.9),
     r"warmup_ratio=0.9 and decay_steps=None \(two fifths of the run\)"),
    (dict(max_steps=4, warmup_steps=5000, decay_steps=100_000), "warmup_steps=5000 must end before"),
    (dict(max_steps=10, warmup_steps=10, schedule="cosine"),
     "warmup_steps=10 must end before the run of max_steps=10 does")])
def test_a_warm_up_that_reaches_into_the_decay_is_refused(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        Config(**fields)
    cfg = Config(**fields | {"max_steps": 0})  # the length of the run is not known yet
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(cfg, max_steps=fields["max_steps"])


def test_warm_up_and_decay_are_counted_in_steps_of_the_final_run():
    cfg = Config(warmup_ratio=0.02)
    for max_steps, warmup, decay in ((1000, 20, 400), (1001, 21, 400), (5, 0, 2), (100, 2, 40), (1, 0, 0),
                                     (0, 0, 0)):
        run = dataclasses.replace(cfg, max_steps=max_steps)
        assert (run.warmup, run.decay) == (warmup, decay)
    cosine = Config(max_steps=10, warmup_ratio=0.99, schedule="cosine", decay_steps=100)
    assert (cosine.warmup, cosine.decay) == (9, 0)  # decay_steps are not used, and the last step has the peak
    absolute = Config(max_steps=10, warmup_steps=3, warmup_ratio=0.9, decay_steps=0)
    assert (absolute.warmup, absolute.decay) == (3, 0)


@pytest.mark.parametrize("max_steps", [1, 2, 3, 5])
@pytest.mark.parametrize("preset", ["demo", "demo_sft", "demo_dpo"])
def test_the_demo_may_be_as_short_as_one_step(preset, max_steps):
    assert load(f"--max_steps={max_steps}", preset=preset).max_steps == max_steps


def test_a_windows_path_may_have_a_colon_in_its_name():
    assert load("--data=C:\\a.jsonl:0.5,b:0.5").data == (("C:\\a.jsonl", 0.5), ("b", 0.5))


def test_fractions_need_not_add_up_to_one_and_weights_must():
    data = (("a", 0.7), ("b", 1.0))
    assert Config(data=data, fractions=True).data == data
    with pytest.raises(UserError, match="add up to 1.7, not 1"):
        Config(data=data)


def test_a_user_error_is_no_value_error():
    """So that no `except ValueError` around somebody's own code takes a user's mistake for its own."""
    assert not issubclass(UserError, ValueError)


def test_the_checks_leave_the_config_as_it_is():
    """A whole number becomes a float when a Config is made, and not in a function that looks for mistakes."""
    cfg = object.__new__(Config)
    for field in dataclasses.fields(Config):
        object.__setattr__(cfg, field.name, 1 if field.name == "lr" else field.default)
    assert config.wrong_types(cfg) == config.wrong_values(cfg) == []
    assert type(cfg.lr) is int and type(Config(lr=1).lr) is float


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
    files = [*ROOT.glob("*.py"), *ROOT.glob("corpus/*.py"), *ROOT.glob("plumbing/*.py")]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    own = (ROOT / "config" / "__init__.py").read_text(encoding="utf-8")
    assert re.search(rf"\b(cfg|config)\.{field}\b", code) or re.search(rf"\bself\.{field}\b", own)


def test_sizes_that_no_model_has_are_refused():
    for name, value in (("n_layer", 1001), ("d_model", 2**21), ("seq_len", 2**25), ("vocab_size", 65537)):
        with pytest.raises(UserError, match=f"{name}={value} must be at most "):
            Config(**{name: value})


def test_an_error_of_the_disk_is_one_sentence_and_exit_code_2(tmp_path, run_here):
    (tmp_path / "file").write_text("")
    flags = [f"--out_dir={tmp_path / 'file'}", "--data=builtin-docs", "--device=cpu"]
    code, _, err = run_here("train.py", "config/demo.py", *flags)
    assert code == 2 and "Traceback" not in err
    assert err.startswith(f"error: {tmp_path / 'file'}")
    assert "cannot be written: [Errno" in err


def test_the_operations_per_token_are_those_of_the_matrix_products():
    """By hand for the 135M: 6 per parameter, and of attention 6 x 30 layers x 576 x 2,048 positions."""
    assert load(preset="smol_135m").flops_per_token == 6 * 134_515_008 + 6 * 30 * 576 * 2048
