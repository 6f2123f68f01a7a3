"""sample.py: sampling ids, the cache, streaming, the command."""

import random
from dataclasses import replace
from pathlib import Path

import children
import pytest
import torch
from conftest import TINY

import sample
from config import Config, UserError
from model import SmolLM
from plumbing import checkpoint
from plumbing.processes import escape_controls
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SmolLM(Config(**TINY, seq_len=32, init_std=0.3)).eval()


def kept(logits, **changes):
    """The set of ids that can be sampled, found by sampling often."""
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **changes}
    rows = torch.tensor(logits).expand(4000, -1)
    return set(sample.sample_token(rows, **settings, generator=torch.Generator().manual_seed(0)).tolist())


def test_temperature_0_always_takes_the_best():
    assert kept([0.1, 3.0, 2.9], temperature=0) == {1}


def test_a_temperature_of_one_half_squares_the_ratio_of_two_probabilities():
    p = sample.probabilities(torch.tensor([[0.2, 0.8]]).log(), 0.5, top_k=0, top_p=1.0)
    torch.testing.assert_close(p, torch.tensor([[1 / 17, 16 / 17]]))


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
    drawn = sample.sample_token(logits.expand(50_000, -1), 0.7, 20, 0.8,
                                torch.Generator().manual_seed(0))
    ours = torch.bincount(drawn, minlength=50) / 50_000
    assert set(ours.nonzero().flatten().tolist()) == set(theirs.nonzero().flatten().tolist())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.012)


def test_greedy_text_with_the_cache_is_that_without(model):
    ids = [20, 30, 40]
    for new in sample.generate(model, ids, 25, temperature=0):
        assert new == model(torch.tensor([ids]))[0, -1].argmax().item()
        ids = [*ids, new]
    assert len(ids) == 28


def test_a_full_context_drops_its_older_half_and_reads_the_newer_half_again(model):
    ids = list(sample.generate(model, list(range(20, 40)), 40, temperature=0))
    full = list(range(20, 40)) + ids
    assert len(ids) == 40
    for n in (31, 32, 33, 40, 49, 50):  # how many ids there are; at 33 the last 16 are read again
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
    columns = list(zip(*sample.generate_batch(model, [[20, 21]] * 5, **settings), strict=True))
    ends = [column.index(tok.eos_id) if tok.eos_id in column else 200 for column in columns]
    texts = sample.continuations(model, tok, [20, 21], 5, settings)
    assert texts == [tok.decode(column[:end]) for column, end in zip(columns, ends, strict=True)]
    assert len(set(texts)) == 5 and len(set(ends)) > 1


def test_printed_samples_are_those_of_their_seed(model, tok):
    settings = dict(max_new_tokens=12, temperature=1.0, top_p=0.92)
    texts = {seed: sample.continuations(model, tok, [20, 21], 1, dict(settings, seed=seed))[0]
             for seed in range(4)}
    assert len(set(texts.values())) == 4
    for seed, text in texts.items():
        ids = sample.generate(model, [20, 21], **settings, seed=seed, stop_ids=tok.stop_ids)
        assert text == tok.decode(ids)


def test_continuations_end_at_what_the_tokenizer_says_ends_a_text(model, tok):
    settings = dict(max_new_tokens=60, temperature=0)
    column = list(sample.generate(model, [20, 21], **settings))
    ending = Tokenizer(tok.rust, ends=(column[5],))
    expected = tok.decode(column[:column.index(column[5])])
    assert sample.continuations(model, ending, [20, 21], 2, settings) == [expected] * 2


@pytest.mark.parametrize(("n_prompt", "new", "positions"),
                         [(3, 5, 8), (20, 40, 32), (32, 1, 32), (100, 3, 32)])
def test_the_cache_has_as_many_positions_as_the_text_and_at_most_the_context(
        model, monkeypatch, n_prompt, new, positions):
    made, real = [], sample.KVCache
    monkeypatch.setattr(sample, "KVCache", lambda *args: made.append(real(*args)) or made[-1])
    prompts = torch.randint(20, 270, (2, n_prompt), generator=torch.Generator().manual_seed(0)).tolist()
    assert len(list(sample.generate_batch(model, prompts, new))) == new
    (cache,) = made
    assert cache.keys.shape == cache.values.shape == (2, 2, 2, positions, 8)


def test_generation_ends_before_a_stop_id(model):
    ids = list(sample.generate(model, [20, 21], 20, temperature=0))
    stopped = list(sample.generate(model, [20, 21], 20, temperature=0, stop_ids=(ids[5],)))
    assert stopped == ids[:ids.index(ids[5])]


def test_characters_of_several_bytes_never_come_out_broken(tok):
    ids = tok.encode("né 😀 日本")
    pieces = list(sample.pieces(tok, ids))
    assert "".join(pieces) == "né 😀 日本" and not any("�" in piece for piece in pieces)
    assert list(sample.pieces(tok, tok.encode("😀")[:2])) == ["�"]  # only the end shows what is missing


@pytest.fixture
def folder(tmp_path, model, tok):
    checkpoint.save(tmp_path / "m", model, tok)
    return str(tmp_path / "m")


def test_the_prompt_comes_from_the_argument_a_file_or_standard_input(folder, tmp_path, run_here):
    """Once as a process of its own, the others in this one."""
    (tmp_path / "prompt.txt").write_text("the cat")
    done = children.run("sample.py", folder, "--max_new_tokens=5", said=b"the cat")
    assert "Traceback" not in done.stderr, done.stderr
    ways = ["--prompt", "the cat"], ["--file", tmp_path / "prompt.txt"], []
    outs = [run_here("sample.py", folder, "--max_new_tokens=5", *way, said="the cat")[1] for way in ways]
    assert outs[0].startswith("the cat") and outs[0] == outs[1] == outs[2] == done.stdout


def test_speed_is_printed_on_request(folder, run_here):
    words = (folder, "--prompt=the", "--max_new_tokens=4", "--num_samples=2", "--speed")
    _, out, err = run_here("sample.py", *words)
    assert "tokens/s" in err and out.count("--- ") == 2


def test_both_dtypes_write_and_float32_is_the_default(folder, run_here):
    words = (folder, "--prompt=the", "--temperature=0", "--max_new_tokens=8")
    texts = {dtype: run_here("sample.py", *words, *dtype)[1]
             for dtype in ((), ("--dtype=float32",), ("--dtype=bfloat16",))}
    assert all(text.startswith("the") and len(text) > 4 for text in texts.values())
    assert texts[()] == texts[("--dtype=float32",)]


@pytest.mark.parametrize(("argv", "says"), [
    (["{folder}", "--dtype=int8", "--prompt=a"], "invalid choice: 'int8'"),
    (["nowhere/at/all", "--prompt=a"], "there is no checkpoint nowhere/at/all"),
    (["config", "--prompt=a"], "there is no checkpoint in config"),
    (["{folder}", "--top_p=2", "--prompt=a"], "--top_p=2.0 must be above 0, up to 1 (off)"),
    (["{folder}", "--temperature=-1", "--prompt=a"], "--temperature=-1.0 must be 0 (greedy) or more"),
    (["{folder}", "--file=gone.txt"], "gone.txt"),
    (["{folder}", "--chat", "hello"], "is a base model, which only continues text: use --prompt"),
])
def test_mistakes_end_in_one_sentence_and_exit_code_2(folder, argv, says, run_here):
    code, out, err = run_here("sample.py", *[word.format(folder=folder) for word in argv])
    assert code == 2 and says in err and out == ""


def settings(folder, text, *flags):
    """What sample.py does with a generation_config.json of this text, and with flags."""
    (folder / "generation_config.json").write_text(text)
    found = sample.settings_of(sample.parse_args([str(folder), *flags]), folder)
    assert found.pop("seed") == 0
    return tuple(found[name] for name in ("max_new_tokens", "temperature", "top_k", "top_p"))


def test_flags_take_precedence_over_the_checkpoints_settings_and_these_over_the_defaults(tmp_path, capfd):
    assert sample.settings_of(sample.parse_args(["x"]), tmp_path)["top_p"] == 0.92  # without the file
    assert settings(tmp_path, "{}") == (100, 0.6, 0, 0.92)
    theirs = '{"do_sample": true, "temperature": 0.2, "top_p": 0.9, "top_k": 40, "max_new_tokens": 50}'
    assert settings(tmp_path, theirs) == (50, 0.2, 40, 0.9)
    flags = ("--temperature=0", "--top_p=1", "--top_k=0", "--max_new_tokens=7")
    assert settings(tmp_path, theirs, *flags) == (7, 0, 0, 1)
    assert settings(tmp_path, '{"do_sample": false, "temperature": 0.7, "top_k": null}') == (100, 0, 0, 0.92)
    assert settings(tmp_path, '{"temperature": 1}') == (100, 1, 0, 0.92)
    assert capfd.readouterr().err == ""
    settings(tmp_path, '{"repetition_penalty": 1.1, "num_beams": 1, "min_p": null}')
    warning = capfd.readouterr().err
    assert "repetition_penalty=1.1" in warning and warning.count("not implemented") == 1


@pytest.mark.parametrize(("name", "value"), [
    ("temperature", "-1"), ("top_p", "0"), ("top_k", "1.5"), ("max_new_tokens", '"9"'), ("top_p", "true")])
def test_a_setting_of_the_checkpoint_that_is_out_of_range_is_named_with_its_file(tmp_path, name, value):
    with pytest.raises(UserError, match=rf"generation_config.json: {name}=.* must be "):
        settings(tmp_path, f'{{"{name}": {value}}}')


def test_a_text_ends_at_each_of_the_checkpoints_stop_ids(folder, model, tok, run_here):
    greedy = list(sample.generate(model, tok.encode("the cat"), 20, temperature=0))
    first = next(i for i in greedy[3:] if i not in greedy[:3])
    path = Path(folder) / "generation_config.json"
    path.write_text(f'{{"eos_token_id": [0, 2, {first}], "do_sample": false, "max_new_tokens": 20}}')
    expected = "the cat" + escape_controls(tok.decode(greedy[:greedy.index(first)])) + "\n"
    assert run_here("sample.py", folder, "--prompt=the cat")[1] == expected


def test_a_model_in_bfloat16_writes_too(model):
    """The cache has the dtype of the weights."""
    half = SmolLM(replace(model.cfg)).bfloat16()
    assert len(list(sample.generate(half, [20], 3, temperature=0))) == 3


def test_the_oldest_turns_of_a_conversation_that_is_too_long_are_dropped(tok):
    """The system message stays, and so does the question to be answered."""
    system = [{"role": "system", "content": "the dog"}]
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"{i} the cat"} for i in range(7)]
    whole = tok.chat(system + turns, add_generation_prompt=True)[0]
    assert sample.fit_context(tok, system + turns, len(whole)) == (whole, 0)
    shorter = tok.chat(system + turns[2:], add_generation_prompt=True)[0]
    assert sample.fit_context(tok, system + turns, len(whole) - 1) == (shorter, 2)
    last = tok.chat(system + turns[6:], add_generation_prompt=True)[0]
    assert sample.fit_context(tok, system + turns, 5) == (last, 6)
    assert sample.fit_context(tok, turns, len(whole) - 30)[1] >= 2


def test_an_answer_is_printed_as_it_is_returned(model, tok, capsys):
    settings = dict(max_new_tokens=8, temperature=0)
    text = sample.reply(model, tok.for_chat(), [{"role": "user", "content": "the cat"}], settings)
    out = capsys.readouterr().out
    assert out.strip() == escape_controls(text).strip() != ""


def test_control_characters_of_a_model_reach_the_terminal_as_pictures():
    assert escape_controls("a\x1b[2J\x07\r\n\tb") == "a␛[2J␇␍\n\tb"
    assert escape_controls("\x7f\x85\u202eabc\u2066") == "��" + "�abc�"


def test_a_model_with_a_context_of_one_position_writes_as_long_as_it_is_asked_to(small):
    model = SmolLM(replace(small, seq_len=1))
    assert len(list(sample.generate(model, [20, 21], 5, temperature=0))) == 5
