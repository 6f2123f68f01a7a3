"""learn/look.py: what it shows is what the model computed and what the step saw."""

import base64
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from test_dpo import dpo_cfg  # noqa: F401  a fixture
from test_sft import at_home, chat_cfg  # noqa: F401  fixtures
from test_train import one_step, prepared  # noqa: F401  a fixture

import data
import dpo
import sample
import sft
from config import Config, UserError
from learn import look, page, rows
from model import IGNORE, SmolLM
from plumbing import checkpoint

HOSTILE = "</script><script>alert(1)</script><b>&amp; \x1b[2J\n\u2028 €"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SmolLM(Config(**TINY, seq_len=64, init_std=0.3)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tok):
    folder = tmp_path_factory.mktemp("chat") / "step_0000001"
    checkpoint.save(folder, model, tok.for_chat())
    return str(folder)


IDS = list(range(20, 33))

# ---------------------------------------------------------------------------------------------------------
# inside the model


def test_the_weights_times_the_values_are_what_the_attention_returns(model):
    inside, calls = look.look_inside(model, IDS), []
    hooks = [layer.self_attn.register_forward_hook(lambda module, args, y: calls.append((args[0], y)))
             for layer in model.model.layers]
    model(torch.tensor([IDS]))
    for hook in hooks:
        hook.remove()
    for layer, (x, y), weights in zip(model.model.layers, calls, inside.weights, strict=True):
        v = layer.self_attn.v_proj(x).view(len(IDS), 2, 8).transpose(0, 1)            # (K, T, D)
        heads = [weights[h] @ v[h // 2] for h in range(4)]                            # two heads share values
        mine = layer.self_attn.o_proj(torch.cat(heads, dim=1))
        torch.testing.assert_close(mine[None], y, rtol=1e-5, atol=1e-6)
    assert (inside.weights.triu(1) == 0).all()


def test_the_lens_shows_what_a_model_without_the_later_layers_predicts(model):
    inside, fewer = look.look_inside(model, IDS), SmolLM(replace(model.cfg, n_layer=1))
    fewer.load_state_dict(model.state_dict(), strict=False)
    for n_layers, stream in enumerate(inside.streams):
        fewer.model.layers = model.model.layers[:n_layers]
        expected = fewer(torch.tensor([IDS]))[0].softmax(dim=-1)
        torch.testing.assert_close(look.lens(model, stream), expected)
    torch.testing.assert_close(expected, inside.logits.softmax(dim=-1))


def test_surprise_is_the_cross_entropy_of_every_token_but_the_first_in_bits(model):
    inside = look.look_inside(model, IDS)
    loss = F.cross_entropy(model(torch.tensor([IDS]))[0, :-1], torch.tensor(IDS[1:]), reduction="none")
    assert look.surprises(inside) == pytest.approx((loss / math.log(2)).tolist(), rel=1e-5)
    assert look.surprises(look.look_inside(model, IDS[:1])) == []


def test_the_surprise_of_a_single_token_is_a_sentence_and_not_a_division_by_nothing(capsys):
    look.main(["surprise", "pretrained/demo", "a"])
    assert capsys.readouterr().out == "a is the only token, and nothing predicts the first one\n"


def test_in_the_shipped_model_a_head_looks_at_the_country_that_was_asked_for():
    model, tok = checkpoint.load("pretrained/demo")
    ids = sft.ask(tok, "What is the capital of France?") + tok.encode("You ask about")
    inside = look.look_inside(model, ids)
    assert inside.weights[:, :, -1, ids.index(*tok.encode(" France"))].max() > 0.9
    assert tok.decode([inside.logits[-1].argmax().item()]) == " France"


# ---------------------------------------------------------------------------------------------------------
# rows


def test_the_rows_of_a_step_are_those_that_train_step_saw(prepared, tok):  # noqa: F811
    batches, seen = data.Batches(prepared, tok), []

    def get_batch(split, i):
        seen.append(batches(split, i))
        return seen[-1]

    line = one_step(prepared, SmolLM(prepared), get_batch, step=6)
    _, found = rows.rows_of_step(prepared, line["step"])
    ids, targets = (torch.cat([batch[part] for batch in seen]).tolist() for part in (0, 1))
    shown = [[i for document in row for i, _ in document] for _, row in found]
    assert shown == [[*row, ends[-1]] for row, ends in zip(ids, targets, strict=True)]
    for _, row in found:  # a document ends where <|endoftext|> is, and only there
        inner = [[i for i, _ in document].index(tok.eos_id) == len(document) - 1 for document in row[:-1]]
        assert all(inner) and tok.eos_id not in [i for i, _ in row[-1][:-1]]
    assert found[0][0].startswith(f"draw {6 * prepared.batch}: {prepared.sources[0]}, row ")


def test_a_packed_row_shows_each_token_once_with_its_targets():
    ids, targets = [1, 2, 3, 7, 8, 0, 0], [IGNORE, 3, 4, IGNORE, 9, IGNORE, IGNORE]
    assert list(rows.documents_of(ids, targets, doc=[0, 0, 0, 1, 1, 2, 2])) == [
        [(1, False), (2, False), (3, True), (4, True)], [(7, False), (8, False), (9, True)]]


def test_the_rows_of_a_step_on_chats_are_those_that_it_saw(chat_cfg, tok):  # noqa: F811
    with pytest.raises(UserError, match="no run of this config has rows"):
        rows.rows_of_step(chat_cfg, 3)
    batches = sft.ChatBatches(sft.pack(chat_cfg, tok.for_chat()), chat_cfg)
    micro_steps = chat_cfg.micro_steps(1)
    targets = torch.cat([batches("train", 2 * micro_steps + m)[1] for m in range(micro_steps)])
    _, found = rows.rows_of_step(chat_cfg, 3)
    assert [[i for document in row for i, is_target in document if is_target] for _, row in found] == [
        row[row != IGNORE].tolist() for row in targets]


def test_the_rows_of_a_step_on_pairs_are_those_that_it_saw(dpo_cfg, tok):  # noqa: F811
    cfg = replace(dpo_cfg, max_steps=3, decay_steps=None, warmup_steps=0)
    pairs = dpo.Pairs(cfg, tok.for_chat())
    draws = range(cfg.batch, 2 * cfg.batch)
    n = len(pairs.pairs["train"])
    expected = [pairs.pairs["train"][data.draw_row(d, [n], cfg.data_seed, "train")] for d in draws]
    _, found = rows.rows_of_step(cfg, 2)
    assert [[[i for i, is_target in answer if is_target] for answer in row] for _, row in found] == [
        [[i for i in targets if i != IGNORE] for _, targets in pair] for pair in expected]


@pytest.mark.parametrize("step", [0, 41])
def test_a_step_that_the_run_does_not_have_is_an_error(prepared, step):  # noqa: F811
    with pytest.raises(UserError, match=f"--step={step} must be from 1 to 40"):
        rows.rows_of_step(prepared, step)


# ---------------------------------------------------------------------------------------------------------
# in the terminal


def shown(capsys, *argv):
    """What the command prints."""
    capsys.readouterr()
    look.main(list(map(str, argv)))
    return capsys.readouterr().out


def test_a_text_is_shown_as_its_tokens_bytes_that_are_no_text_in_hexadecimal(capsys, folder):
    out = shown(capsys, "tokens", "the cat €", f"--tokenizer={folder}")
    assert out.splitlines()[0] == r"the| |cat| |\xe2|\x82|\xac"
    assert re.search(r"^ +\d+  Ġ +20$", out, re.M)
    assert out.splitlines()[-1] == "7 tokens, 11 bytes: 1.57 bytes per token"


@pytest.mark.parametrize("what", ["tokens", "next", "surprise", "attention", "layers"])
def test_no_text_steers_the_terminal_and_colors_change_only_the_color(what, capsys, folder):
    where = [f"--tokenizer={folder}"] if what == "tokens" else [folder]
    plain, colored = (shown(capsys, what, *where, HOSTILE, f"--color={when}") for when in ("never", "always"))
    assert "\x1b" not in plain and "\x1b" not in re.sub(r"\x1b\[[\d;]*m", "", colored)
    assert plain == shown(capsys, what, *where, HOSTILE)  # the output of a test is no terminal
    assert ("\x1b[" in colored) == (what in ("tokens", "surprise"))


def test_next_shows_the_probabilities_that_sample_draws_from(capsys, folder, model, tok):
    logits = model(torch.tensor([tok.encode("the cat")]))[0, -1]
    settings = dict(temperature=0.7, top_k=5, top_p=0.9)
    drawn = sample.sample_token(logits.expand(20_000, -1), **settings,
                                generator=torch.Generator().manual_seed(0))
    mine = look.drawn_from(logits, settings)
    torch.testing.assert_close(torch.bincount(drawn, minlength=300) / 20_000, mine, rtol=0, atol=0.012)
    assert look.drawn_from(logits, dict(settings, temperature=0)).nonzero().item() == logits.argmax()
    out = shown(capsys, "next", folder, "the cat", "--temperature=0.7", "--top_k=5", "--top_p=0.9")
    lines = [re.findall(r"[\d.]+%", line) for line in out.splitlines()[1:]]
    best = logits.topk(10).indices
    assert lines[:10] == [[f"{p:.1%}", f"{q:.1%}"] for p, q in zip(logits.softmax(0)[best], mine[best])]
    assert len(lines) == 11 and "0.0%" in lines[9]


def test_a_map_has_a_row_for_each_token_and_nothing_after_it(capsys, folder):
    out = shown(capsys, "attention", folder, "the cat sat", "--layer=1", "--head=3").splitlines()
    assert [len(re.findall("[·░▒▓█]{2}", line[18:])) for line in out[1:-1]] == [1, 2, 3, 4, 5]
    heads = shown(capsys, "attention", folder, "the cat sat", "--layer=1").splitlines()
    assert [line[:14] for line in heads[1:]] == [f"layer 1 head {head}" for head in range(4)]


def test_a_question_is_put_into_the_chat_template_with_the_beginning_of_an_answer(capsys, folder, tok):
    out = shown(capsys, "surprise", folder, "the cat", "--chat", "--answer= sat")
    names = [line.split("  ")[-1].strip() for line in out.splitlines()[1:-1]]
    ids = [*sft.ask(tok, "the cat"), *tok.encode(" sat")]
    assert names == [look.visible(tok, i).strip() for i in ids[1:]]


def test_a_text_longer_than_the_context_is_cut_with_a_note(capsys, folder):
    look.main(["surprise", folder, "the cat sat " * 40 + "over"])
    out, err = capsys.readouterr()
    *_, last, mean = out.splitlines()
    assert last.endswith("ver") and mean.startswith("mean of 63 tokens") and "only the last 64 of" in err


@pytest.mark.parametrize(("argv", "message"), [
    (["next", "out/nowhere/at/all", "a"], "there is no checkpoint out/nowhere/at/all"),
    (["next", "CHECKPOINT", ""], "the text is empty"),
    (["next", "CHECKPOINT", "a", "--top_p=2"], "--top_p=2.0 must be above 0"),
    (["layers", "CHECKPOINT", "a", "--answer=b"], "--answer='b' needs --chat"),
    (["attention", "CHECKPOINT", "a", "--head=1"], "--head=1 needs --layer"),
    (["attention", "CHECKPOINT", "a", "--layer=0", "--head=4"], "--head=4 must be from 0 to 3"),
    (["attention", "CHECKPOINT", "a", "--position=1"], "--position=1 must be from 0 to 0"),
    (["rows", "config/nowhere.py", "--step=1"], "there is no preset 'config/nowhere.py'"),
    (["rows", "config/demo.py", "--step=1", "--out_dir=out/none"], "there is no tokenizer in out/none")])
def test_a_mistake_is_one_sentence(argv, message, folder, run_here):
    argv = [folder if word == "CHECKPOINT" else word for word in argv]
    code, out, err = run_here("learn/look.py", *argv)
    assert (code, out) == (2, "") and message in err and "Traceback" not in err


# ---------------------------------------------------------------------------------------------------------
# the page


class Page(HTMLParser):
    """The tags of a page, and the contents of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.title = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        if self.lasttag == "script" and text.strip():
            self.scripts.append(text)
        elif self.lasttag == "title":
            self.title += text.strip()


def write_page(folder, tmp_path):
    look.main(["surprise", folder, HOSTILE, f"--html={tmp_path / 'look.html'}"])
    return (tmp_path / "look.html").read_text(encoding="utf-8")


def test_the_page_holds_the_numbers_and_no_text_becomes_html(folder, model, tok, tmp_path):
    found = Page(write_page(folder, tmp_path))
    inside = look.look_inside(model, tok.encode(sample.clean(HOSTILE)))
    numbers = json.loads(found.scripts[0])
    assert numbers == json.loads(json.dumps(look.numbers_of(model, tok, inside, (0, 0))))
    assert len(found.scripts) == 2 and [tag for tag, _ in found.tags].count("b") == 0
    T, triangle = len(inside.ids), torch.ones(len(inside.ids), len(inside.ids)).tril().bool()
    packed = np.frombuffer(base64.b64decode(numbers["weights"]), np.uint8).reshape(2, 4, T * (T + 1) // 2)
    assert np.abs(packed / 255 - inside.weights[..., triangle].numpy()).max() <= 0.5 / 255 + 1e-6
    assert numbers["layers"][2] == [best[0] for best in numbers["next"]]  # the last layer is the model
    hostile = Page(page.fill("<b>&", {"tokens": ["</script><b>", "<!--"]}))  # as single tokens
    assert hostile.title == "A look inside <b>&" and "b" not in dict(hostile.tags)
    assert json.loads(hostile.scripts[0]) == {"tokens": ["</script><b>", "<!--"]}


def test_the_page_needs_nothing_from_outside(folder, tmp_path):
    text = write_page(folder, tmp_path)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|innerHTML", text)
    assert not [tag for tag, attributes in Page(text).tags if {"src", "href"} & attributes.keys()]
    assert page.TEMPLATE.stat().st_size < 10_000


def test_a_text_that_is_too_long_for_a_page_is_an_error():
    with pytest.raises(UserError, match="400 tokens are too many for a page with 270 heads"):
        page.packed(torch.zeros(1).expand(30, 9, 400, 400))


def test_a_browser_draws_the_page(folder, tok, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("there is no browser")
    write_page(folder, tmp_path)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    run = partial(subprocess.run, capture_output=True, text=True, encoding="utf-8", timeout=120)
    done = run([browser, *flags, "--dump-dom", (tmp_path / "look.html").as_uri()])
    n = len(tok.encode(sample.clean(HOSTILE)))
    strip = done.stdout.partition('id="text"')[2].partition("</div>")[0]
    assert strip.count("<span") == n and f"is token {n - 1} of the text" in done.stdout
    assert done.stdout.count("aria-pressed") >= 8 and "<tr>" in done.stdout
