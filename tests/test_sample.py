"""sample.py: choosing ids, caching, streaming, the command."""

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sample
from config import Config, UserError
from model import SmolLM

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SmolLM(
        Config(
            vocab_size=300, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, seq_len=32, init_std=0.3
        )
    ).eval()


def kept(logits, **changes):
    """The set of ids that sampling can choose, found by drawing often."""
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **changes}
    drawn = sample.pick(
        torch.tensor(logits).expand(4000, -1), **settings, generator=torch.Generator().manual_seed(0)
    )
    return set(drawn.tolist())


def test_temperature_0_takes_the_best():
    assert kept([0.1, 3.0, 2.9], temperature=0) == {1}


def test_top_k_keeps_the_k_best():
    assert kept([0.0, 1.0, 0.5, 0.9], top_k=2) == {1, 3}
    assert kept([0.0, 1.0, 0.5, 0.9], top_k=99) == {0, 1, 2, 3}


def test_top_p_keeps_the_fewest_ids_that_together_reach_p():
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().tolist()
    assert kept(logits, top_p=0.45) == {1}
    assert kept(logits, top_p=0.6) == {1, 3}
    assert kept(logits, top_p=0.81) == {1, 3, 0}
    assert kept(logits, top_p=1e-9) == {1}


def test_filters_and_frequencies_are_those_of_transformers():
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(3)) * 2
    theirs = warpers.TemperatureLogitsWarper(0.7)(None, logits)
    theirs = warpers.TopPLogitsWarper(0.8)(None, warpers.TopKLogitsWarper(20)(None, theirs)).softmax(-1)[0]
    drawn = sample.pick(logits.expand(50_000, -1), 0.7, 20, 0.8, torch.Generator().manual_seed(0))
    ours = torch.bincount(drawn, minlength=50) / 50_000
    assert set(ours.nonzero().flatten().tolist()) == set(theirs.nonzero().flatten().tolist())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.012)


def test_greedy_text_with_the_cache_is_that_without(model):
    ids = [20, 30, 40]
    for new in sample.generate(model, ids, 25, temperature=0):
        assert new == model(torch.tensor([ids]))[0, -1].argmax().item()
        ids = [*ids, new]
    assert len(ids) == 28


def test_a_full_context_forgets_its_older_half_and_reads_the_newer_half_again(model):
    ids = list(sample.generate(model, list(range(20, 40)), 40, temperature=0))
    full = list(range(20, 40)) + ids
    assert len(ids) == 40
    for n in (31, 32, 33, 40, 49, 50):  # n ids stand and the next one is chosen: at 33 the last 16 are read
        start = 0 if n <= 32 else 17 if n <= 49 else 34
        seen = torch.tensor([full[start:n]])
        assert full[n] == model(seen)[0, -1].argmax().item(), n


def test_a_prompt_longer_than_the_context_is_cut_on_the_left(model):
    long = random.Random(0).choices(range(20, 270), k=100)
    end, beginning = model(torch.tensor([long[-32:], long[:32]]))[:, -1].argmax(-1).tolist()
    assert next(sample.generate(model, long, 1, temperature=0)) == end != beginning


def test_one_seed_gives_one_text_and_another_seed_another(model):
    def text(seed):
        return list(sample.generate(model, [20, 21], 20, temperature=1.0, seed=seed))

    assert text(1) == text(1) != text(2)


def test_several_samples_differ_and_each_ends_at_its_own_stop(model, tok):
    settings = dict(max_new_tokens=200, temperature=3.0)
    columns = list(zip(*sample.generate_many(model, [[20, 21]] * 5, **settings), strict=True))
    ends = [column.index(tok.eos_id) if tok.eos_id in column else 200 for column in columns]
    texts = sample.samples(model, tok, [20, 21], 5, settings)
    assert texts == [tok.decode(column[:end]) for column, end in zip(columns, ends, strict=True)]
    assert len(set(texts)) == 5 and len(set(ends)) > 1


def test_generation_ends_before_a_stop_id(model):
    ids = list(sample.generate(model, [20, 21], 20, temperature=0))
    assert (
        list(sample.generate(model, [20, 21], 20, temperature=0, stop_ids=(ids[5],)))
        == ids[: ids.index(ids[5])]
    )


def test_characters_of_several_bytes_never_come_out_broken(tok):
    ids = tok.encode("né 😀 日本")
    pieces = list(sample.pieces(tok, ids))
    assert "".join(pieces) == "né 😀 日本" and not any("�" in piece for piece in pieces)
    assert list(sample.pieces(tok, tok.encode("😀")[:2])) == [
        "�"
    ]  # only the end of the text shows what is missing


@pytest.fixture
def folder(tmp_path, model, tok):
    model.save(tmp_path / "m")
    tok.save(tmp_path / "m")
    return str(tmp_path / "m")


def run(*argv, **kwargs):
    done = subprocess.run(
        [sys.executable, "sample.py", *argv],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=100,
        **kwargs,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_the_prompt_comes_from_the_argument_a_file_or_standard_input(folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("the cat")
    outs = [
        run(folder, "--max_new_tokens=5", "--prompt", "the cat").stdout,
        run(folder, "--max_new_tokens=5", "--file", str(tmp_path / "prompt.txt")).stdout,
        run(folder, "--max_new_tokens=5", input="the cat").stdout,
    ]
    assert outs[0].startswith("the cat") and outs[0] == outs[1] == outs[2]


def test_speed_is_told_on_request(folder):
    assert (
        "tokens/s" in run(folder, "--prompt=the", "--max_new_tokens=4", "--num_samples=2", "--speed").stderr
    )


def test_every_dtype_writes_and_float32_is_the_default(folder):
    texts = {
        dtype: run(folder, "--prompt=the", "--temperature=0", "--max_new_tokens=8", *dtype).stdout
        for dtype in ((), ("--dtype=float32",), ("--dtype=bfloat16",), ("--dtype=int8",))
    }
    assert all(text.startswith("the") and len(text) > 4 for text in texts.values())
    assert texts[()] == texts[("--dtype=float32",)]


def test_int8_on_a_gpu_is_refused_before_any_work(folder, monkeypatch):
    monkeypatch.setattr(sample, "pick_device", lambda name: torch.device("cuda"))
    with pytest.raises(UserError, match="--dtype=int8 is for processors: use bfloat16 on cuda"):
        sample.main([folder, "--prompt=the", "--dtype=int8"])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["{folder}", "--dtype=int4", "--prompt=a"], "invalid choice: 'int4'"),
        (["nowhere/at/all", "--prompt=a"], "there is no checkpoint nowhere/at/all"),
        (["config", "--prompt=a"], "there is no checkpoint in config"),
        (["{folder}", "--top_p=2", "--prompt=a"], "--top_p=2.0 makes no sense"),
        (["{folder}", "--file=gone.txt"], "gone.txt"),
    ],
)
def test_mistakes_end_in_one_sentence_and_exit_code_2(folder, argv, says):
    done = run(*[word.format(folder=folder) for word in argv])
    assert done.returncode == 2 and says in done.stderr and done.stdout == ""


def settings(folder, text, *flags):
    """What sample.py does with a generation_config.json of this text, and with flags."""
    (folder / "generation_config.json").write_text(text)
    found = sample.settings_of(sample.parse([str(folder), *flags]), folder)
    assert found.pop("seed") == 0
    return tuple(found[name] for name in ("max_new_tokens", "temperature", "top_k", "top_p"))


def test_flags_come_before_the_checkpoints_settings_and_these_before_the_defaults(tmp_path, capfd):
    assert sample.settings_of(sample.parse(["x"]), tmp_path)["top_p"] == 0.92  # without the file
    assert settings(tmp_path, "{}") == (100, 0.6, 0, 0.92)
    theirs = '{"do_sample": true, "temperature": 0.2, "top_p": 0.9, "top_k": 40, "max_new_tokens": 50}'
    assert settings(tmp_path, theirs) == (50, 0.2, 40, 0.9)
    flags = ("--temperature=0", "--top_p=1", "--top_k=0", "--max_new_tokens=7")
    assert settings(tmp_path, theirs, *flags) == (7, 0, 0, 1)
    assert settings(tmp_path, '{"do_sample": false, "temperature": 0.7, "top_k": null}') == (100, 0, 0, 0.92)
    assert settings(tmp_path, '{"temperature": 1}') == (100, 1, 0, 0.92)
    assert capfd.readouterr().err == ""
    settings(tmp_path, '{"repetition_penalty": 1.1, "num_beams": 1, "min_p": null}')
    told = capfd.readouterr().err
    assert "repetition_penalty=1.1" in told and told.count("not implemented") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "-1"), ("top_p", "0"), ("top_k", "1.5"), ("max_new_tokens", '"9"'), ("top_p", "true")],
)
def test_a_setting_of_the_checkpoint_that_cannot_be_is_named_with_its_file(tmp_path, name, value):
    with pytest.raises(UserError, match=rf"generation_config.json: {name}=.* makes no sense"):
        settings(tmp_path, f'{{"{name}": {value}}}')


def test_a_text_ends_at_each_of_the_checkpoints_stop_ids(folder, model, tok):
    greedy = list(sample.generate(model, tok.encode("the cat"), 20, temperature=0))
    first = next(i for i in greedy[3:] if i not in greedy[:3])
    path = Path(folder) / "generation_config.json"
    path.write_text(f'{{"eos_token_id": [0, 2, {first}], "do_sample": false, "max_new_tokens": 20}}')
    expected = "the cat" + sample.shown(tok.decode(greedy[:greedy.index(first)])) + "\n"
    assert run(folder, "--prompt=the cat").stdout == expected


def test_a_model_in_bfloat16_writes_too(model):
    """The cache has the type of the weights."""
    half = SmolLM(replace(model.cfg)).bfloat16()
    assert len(list(sample.generate(half, [20], 3, temperature=0))) == 3


def test_the_oldest_turns_leave_a_conversation_that_is_too_long(tok):
    """The system message stays, and so does the question that is to be answered."""
    system = [{"role": "system", "content": "the dog"}]
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"{i} the cat"} for i in range(7)]
    whole = tok.chat(system + turns, add_generation_prompt=True)[0]
    assert sample.fitted(tok, system + turns, len(whole)) == (whole, 0)
    shorter = tok.chat(system + turns[2:], add_generation_prompt=True)[0]
    assert sample.fitted(tok, system + turns, len(whole) - 1) == (shorter, 2)
    last = tok.chat(system + turns[6:], add_generation_prompt=True)[0]
    assert sample.fitted(tok, system + turns, 5) == (last, 6)
    assert sample.fitted(tok, turns, len(whole) - 30)[1] >= 2


def test_control_characters_of_a_model_reach_the_terminal_as_pictures():
    assert sample.shown("a\x1b[2J\x07\r\n\tb") == "a␛[2J␇␍\n\tb"
    assert sample.shown("\x7f\x85\u202eabc\u2066") == "��" + "�abc�"
