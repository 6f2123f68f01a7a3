"""evals/: answers to the built-in questions, bits per byte, the log of them, and the picture."""

import inspect
import json
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, small_config, write_texts
from test_benchmarks import ROWS, write
from test_sft import at_home, chat_cfg, chat_config, flags  # noqa: F401  fixtures

import sft
import train
from config import Config, UserError
from corpus.sources import split_of
from evals import __main__ as evaluation
from evals import answers, plot, score
from evals.benchmarks import Item
from evals.questions import Question
from model import SmolLM
from plumbing import checkpoint, disk
from plumbing.processes import Run
from sample import escape_controls, generate
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def chat_run(tok, tmp_path_factory):
    """The folder of a run whose chat model has learned for two steps."""
    folder = tmp_path_factory.mktemp("run")
    cfg = replace(chat_config(small_config(folder, tok), folder, tok), max_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        sft.main(["config/demo_sft.py", *flags(cfg)])
    return Path(cfg.out_dir)


@pytest.fixture
def chat_model(chat_run, tmp_path):
    """The stage folder of a tiny chat model, which a test may write to, and its model and tokenizer."""
    shutil.copytree(chat_run, tmp_path / "run")
    return tmp_path / "run" / "sft", *checkpoint.load(tmp_path / "run" / "sft")


def test_many_prompts_at_once_give_the_answers_that_they_give_one_by_one(chat_model):
    _, model, tok = chat_model
    prompts = [
        answers.prompt_of(tok, text) for text in ("the cat", "a", "1+1=", "the dog", "rain fell")
    ]
    for prompt, (text, ended) in zip(prompts, answers.answers(model, tok, prompts, limit=20)):
        ids = list(generate(model, prompt, 20, temperature=0, stop_ids=tok.stop_ids))
        assert text == tok.decode(ids).strip() and ended == (len(ids) < 20)


def test_an_answer_ends_before_the_id_that_ends_it(tok):
    """An id that the model writes, but not as the first, is made the end: what follows it is not read."""
    torch.manual_seed(0)
    model, chat = SmolLM(Config(**TINY, seq_len=128, init_std=0.3)).eval(), tok.for_chat()
    prompt = answers.prompt_of(chat, "the cat")
    ids = list(generate(model, prompt, 20, temperature=0))
    end = next(i for i in ids if i != ids[0])
    expected = tok.decode(ids[: ids.index(end)]).strip()
    assert answers.answers(model, Tokenizer(tok.rust, ends=(end,)), [prompt], limit=20) == [(expected, True)]


def test_an_answer_rambles_that_has_no_end_no_words_or_too_many_sentences():
    question = Question("group", "hello", "", sentences=2)
    good, long = "Hello! How can I help you?", "Hello! How can I help you? And then. And then."
    assert not answers.rambles(question, good, True)
    assert answers.rambles(question, good, False) and answers.rambles(question, "", True)
    assert answers.rambles(question, long, True)


def test_the_chosen_answer_wins_where_its_value_is_larger():
    assert score.share_of_chosen(torch.tensor([[2.0, 1.0], [0.0, 5.0], [3.0, 1.0], [4.0, 3.0]])) == 0.75


def bits(model, tok, texts):
    return score.bits_per_byte(score.text_losses(model, tok, texts))[0]


def test_every_next_id_costs_its_own_logarithm(tok):
    """A random model, against the formula in float64, in rows of 8 ids and a shorter last one."""
    torch.manual_seed(0)
    model = SmolLM(Config(**TINY, seq_len=8, init_std=0.3))
    text = "the cat sat on a mat and saw the dog run"
    ids, nats = [tok.eos_id, *tok.encode(text), tok.eos_id], 0.0
    for start in range(0, len(ids) - 1, 8):
        row = ids[start : start + 9]
        logits = model(torch.tensor([row[:-1]]))[0].double()
        nats -= sum(logits[t].log_softmax(0)[row[t + 1]].item() for t in range(len(row) - 1))
    expected = nats / math.log(2) / len(text)
    assert bits(model, tok, [text]) == pytest.approx(expected, rel=1e-5)


def test_a_chat_model_is_asked_in_its_template_and_a_base_model_as_in_transcripts(chat_model):
    _, model, tok = chat_model
    chat = [{"role": "user", "content": "hello"}]
    assert answers.prompt_of(tok, "hello") == tok.chat(chat, True)[0]
    assert answers.prompt_of(tok, "hello", False) == tok.chat(chat)[0]
    base = Tokenizer(tok.rust)
    assert tok.decode(answers.prompt_of(base, "hello")) == "User: hello\nAssistant:"


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary(tok):
    """All weights 0: every id is equally likely, and each costs log2(300) bits."""
    model = SmolLM(Config(vocab_size=300, n_layer=1, n_head=2, n_kv_head=1, d_model=16, d_ff=16, seq_len=16))
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    texts = ["the cat sat on a mat", "and saw the dog run over green hills while rain fell softly " * 3]
    n_ids = sum(len(tok.encode(text)) + 1 for text in texts)
    expected = n_ids * math.log2(300) / sum(len(text.encode()) for text in texts)
    assert bits(model, tok, texts) == pytest.approx(expected, rel=1e-5)


def test_the_table_is_printed_and_kept_in_the_stage_folder(chat_model, capsys, monkeypatch):
    """With fewer pairs, and of the unseen texts only the documentation."""
    stage, _, _ = chat_model
    monkeypatch.setattr(score, "PAIRS", 20)
    monkeypatch.setattr(answers, "ONLY_ENDS", 6)
    monkeypatch.setattr(evaluation, "UNSEEN", {"builtin-docs": evaluation.UNSEEN["builtin-docs"]})
    evaluation.main([str(stage), "--tasks=builtin"])
    out = capsys.readouterr().out
    (line,) = [json.loads(line) for line in (stage / "eval.jsonl").read_text().splitlines()]
    for name in (
        "hello and 1+1=",
        "two-digit sums, held out",
        "rambling or unfinished answers",
        "preferred answer is the likelier one",
        "bits per byte, documentation, unseen",
    ):
        assert name in out and name in line
    assert line["checkpoint"] == "step_0000002" and 0 <= line["two-digit sums, held out"] <= 1
    assert "reward accuracy" not in line  # there is no reference before dpo.py


def test_an_unknown_task_is_named_with_the_known_ones(chat_model):
    with pytest.raises(UserError, match="no task cooking: there are builtin, text, hellaswag"):
        evaluation.main([str(chat_model[0]), "--tasks=builtin,cooking"])


def test_accuracies_of_an_example_by_hand():
    """Four questions, always the second choice right. acc: 2 of 4; per character: 3 of 4.

    0  -4 / 2 < -1 / 2              right, right       2  -2 / 1 < -3 / 10        wrong, right
    1  -4 / 4 > -6 / 4              wrong, wrong       3  -9 / 3 < -1 / 1         right, right
    """
    choices = [(" ab", " cd"), (" abcd", " efgh"), (" a", " bcdefghijk"), (" abc", " d")]
    items = [Item(("the", "the"), pair, 1) for pair in choices]
    likelihoods = [[-4.0, -1.0], [-4.0, -6.0], [-2.0, -3.0], [-9.0, -1.0]]
    found = score.accuracies(items, likelihoods)
    assert found["acc"] == 0.5 and found["acc_norm"] == 0.75
    assert found["acc_stderr"] == pytest.approx(statistics.stdev([1, 0, 0, 1]) / 2)
    assert found["acc_norm_stderr"] == pytest.approx(statistics.stdev([1, 0, 1, 1]) / 2)
    assert score.accuracies(items[:1], likelihoods)["acc_stderr"] == 0.0


def test_a_space_before_a_choice_is_not_one_of_its_characters():
    """-2.4 / 2 is more than -1.3 / 1; with the space counted, -2.4 / 3 would be less than -1.3 / 2."""
    found = score.accuracies([Item(("", ""), (" ab", " c"), 0)], [[-2.4, -1.3]])
    assert found["acc_norm"] == 1.0
    assert score.accuracies([Item(("", ""), ("ab", "c"), 0)], [[-2.4, -1.3]])["acc_norm"] == 1.0


def test_an_unknown_device_ends_with_code_2(capsys):
    with pytest.raises(SystemExit) as ended:
        evaluation.parse_args(["out/demo/dpo", "--device=abacus"])
    assert ended.value.code == 2 and "abacus" in capsys.readouterr().err


def test_what_is_called_unseen_was_seen_by_no_stage(small, tmp_path, tok, capsys, monkeypatch):
    """Pretraining held out 0.0025 of the texts, DPO 0.05. According to DPO's checkpoint the smaller share is
    unseen. Texts are split after they were cleaned, as data.py does: half of a surrogate pair changes."""
    texts = [f"the \ud800 cat {i}" for i in range(4_000)]
    source = tmp_path / "many.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    folder = None
    for stage, fraction in (("pretrain", 0.0025), ("sft", 0.0025), ("dpo", 0.05)):
        cfg = replace(small, val_fraction=fraction, init_from=folder)
        run, facts = Run(stage, tmp_path / stage), checkpoint.facts_of(cfg)
        checkpoint.save_step(1, run, SmolLM(small), tok, [], facts, 1)
        folder = str(tmp_path / stage / "step_0000001")
    asked = []
    monkeypatch.setattr(evaluation, "UNSEEN", {str(source): "unseen"})
    monkeypatch.setattr(evaluation, "ask_all", lambda *_: {})
    monkeypatch.setattr(score, "PAIRS", 2)
    real = score.text_losses
    monkeypatch.setattr(score, "text_losses", lambda *args: asked.extend(args[-1]) or real(*args))
    evaluation.main([folder, "--device=cpu"])
    assert 2 <= len(asked) < 40 and f"{len(asked)} texts" in capsys.readouterr().out
    assert all(split_of(text, fraction) == "val" for text in asked for fraction in (0.0025, 0.05))
    assert all("\ufffd" in text for text in asked)
    seen = {text for text in score.Documents(str(source), small) if split_of(text, 0.0025) == "train"}
    assert len(seen) + len(asked) == 4_000 and not seen & set(asked)


def test_where_nothing_was_held_out_no_text_is_called_unseen(small, tmp_path, tok, capsys, monkeypatch):
    run = Run("pretrain", tmp_path / "pretrain")
    facts = checkpoint.facts_of(replace(small, val_fraction=0.0))
    checkpoint.save_step(1, run, SmolLM(small), tok, [], facts, 1)
    monkeypatch.setattr(evaluation, "UNSEEN", {small.sources[0]: "unseen"})
    monkeypatch.setattr(evaluation, "ask_all", lambda *_: {})
    monkeypatch.setattr(score, "PAIRS", 2)
    evaluation.main([str(tmp_path / "pretrain"), "--device=cpu"])
    assert f"no text of {small.sources[0]} is unseen" in capsys.readouterr().out


def test_the_demo_is_asked_at_least_30_unseen_texts_of_each_kind():
    for source in evaluation.UNSEEN:
        assert len(score.unseen_texts(source, 0.15)) >= 30


def test_the_error_of_bits_per_byte_is_that_of_a_ratio():
    """By hand. Losses 1, 2, 3 ln 2, of 1, 1, 2 bytes: r = 6 / 4 bits, the rests are -0.5, 0.5, 0."""
    losses = torch.tensor([[1, 1, 1], [2, 1, 1], [3, 1, 2]], dtype=torch.float64)
    losses[:, 0] *= math.log(2)
    value, error = score.bits_per_byte(losses)
    assert value == pytest.approx(1.5)
    assert error == pytest.approx(math.sqrt(3 / 2 * (0.25 + 0.25 + 0)) / 4)
    assert score.bits_per_byte(losses[:1]) == (pytest.approx(1.0), 0.0)


def test_the_error_is_how_much_other_texts_would_move_the_result():
    """2,000 samples of 40 texts from one distribution: their results spread by the standard error of one."""
    rng = torch.Generator().manual_seed(0)
    n_bytes = torch.rand(2000, 40, generator=rng, dtype=torch.float64) * 1000 + 10
    loss = n_bytes * (1 + 0.3 * torch.randn(2000, 40, generator=rng, dtype=torch.float64))
    found = [score.bits_per_byte(torch.stack((a, a, b), dim=1)) for a, b in zip(loss, n_bytes)]
    values, errors = zip(*found)
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(values), rel=0.05)


def test_training_and_evaluation_compute_the_same_bits_per_byte(small, tok):
    """A model with doc_mask, three texts in rows of 8 ids: train.evaluate and text_losses agree, and each
    loss belongs to its text."""
    cfg = replace(small, seq_len=8, init_std=0.3, doc_mask=True, batch=1, micro_batch=1, eval_batches=100)
    torch.manual_seed(0)
    model = SmolLM(cfg)
    texts = ["the cat", "sat on a mat and saw the dog", "run over green hills while rain fell"]
    ids, owners, rows = [tok.eos_id], [], []
    for place, text in enumerate(texts):
        ids += [*tok.encode(text), tok.eos_id]
        owners += [place] * (len(ids) - 1 - len(owners))
    for start in range(0, len(owners), 8):
        row = torch.tensor([ids[start:start + 9]])
        doc = [sum(i == tok.eos_id for i in row[0, :t].tolist()) for t in range(row.shape[1] - 1)]
        rows.append((row[:, :-1], row[:, 1:], torch.tensor([doc])))
    wanted = [0.0] * 3
    for place, log_p in zip(owners, torch.cat([model(*row)[0] for row in rows]).tolist(), strict=True):
        wanted[place] -= log_p

    def get_batch(split, i):
        return rows[i] if i < len(rows) else None

    losses = score.text_losses(model, tok, texts)
    assert losses[:, 0].tolist() == pytest.approx(wanted, rel=1e-5)
    assert losses[:, 1].tolist() == [len(tok.encode(text)) + 1 for text in texts]
    assert losses[:, 2].tolist() == [len(text) for text in texts]
    bytes_per_token = sum(map(len, texts)) / len(owners)
    said = train.evaluate(cfg, Run("pretrain", Path()), model, get_batch, train.loss_fn, bytes_per_token)
    assert score.bits_per_byte(losses)[0] == pytest.approx(said["val_bits_per_byte"], rel=1e-5)


def test_rewards_are_compared_with_the_checkpoint_that_dpo_started_from(small, tok, tmp_path):
    """Not with a newer one of the same stage."""
    for step in (1, 2):
        torch.manual_seed(step)
        run = Run("sft", tmp_path / "sft")
        checkpoint.save_step(step, run, SmolLM(small), tok, [], checkpoint.facts_of(small), 0)
    folder = tmp_path / "dpo" / "step_0000003"
    config = {"init_from": str(tmp_path / "sft")}
    for facts, step in (({"started_from": str(tmp_path / "sft" / "step_0000001")}, 1), ({}, 2)):
        disk.write_json(folder / "train.json", {"step": 3, "config": config, **facts})
        expected = checkpoint.load(tmp_path / "sft" / f"step_000000{step}")[0].head
        assert torch.equal(evaluation.reference_of(folder).head, expected)
    assert evaluation.reference_of(tmp_path / "sft" / "step_0000001") is None


def test_in_the_panel_of_shares_higher_is_better_and_no_panel_is_empty():
    line = {"seconds": 0.5, "two-digit sums, held out": 0.25, plot.RAMBLING: 0.125, "checkpoint": "step_2",
            "bits per byte, documentation": 0.9, "bits per byte, documentation stderr": 0.02}
    after = {**line, "two-digit sums, held out": 0.5, "reward accuracy": 0.75}  # which not every stage has
    assert plot.panels_of({"sft": line, "dpo": after}) == {
        plot.SHARES: {"two-digit sums, held out": [25, 50], "answers that end in time": [87.5, 87.5]},
        plot.BITS: {"documentation": [0.9, 0.9]}}
    assert plot.panels_of({"sft": {"small sums": 0.25}}) == {plot.SHARES: {"small sums": [25]}}
    assert plot.panels_of({}) == {}
    assert plot.RAMBLING in inspect.getsource(answers.ask_all)  # the name under which it is stored


def test_a_smoothed_curve_is_not_shifted_and_its_end_is_a_mean():
    assert plot.smooth([0, 3, 0, 3, 3]) == [0, 1, 2, 2, 3]
    line = [2.0 * step for step in range(200)]  # a centered mean leaves a straight line as it is
    assert plot.smooth(line)[:-5] == pytest.approx(line[:-5])
    assert plot.smooth([1.0] * 199 + [7.0])[-1] == 2  # of six steps
    assert plot.smooth([]) == []


def test_benchmarks_and_texts_are_printed_and_kept(chat_model, tmp_path, capsys):
    stage, model, tok = chat_model
    folder = write(tmp_path / "questions", "arc_easy", *[ROWS["arc_easy"]] * 3)
    write(folder, "mmlu", {**ROWS["mmlu"], "question": "the dog " * 400})
    source = write_texts(tmp_path / "some.jsonl", 9)
    evaluation.main(
        [str(stage), "--tasks=arc_easy,mmlu,text", f"--benchmarks={folder}", "--style=lm_eval"]
        + ["--limit=2", f"--text={source}"]
    )
    out = capsys.readouterr().out
    easy, mmlu, text = [json.loads(line) for line in (stage / "eval.jsonl").read_text().splitlines()]
    assert (easy["task"], easy["style"], easy["questions"], easy["cut"]) == ("arc_easy", "lm_eval", 2, 0)
    assert easy["acc"] in (0, 1) and easy["acc_stderr"] == 0 and "acc_norm_stderr" in easy
    assert (mmlu["questions"], mmlu["cut"]) == (1, 1)
    assert "only the end was read of 1 questions, longer than 128 tokens" in out
    texts = [json.loads(line)["text"] for line in Path(source).read_text().splitlines()][:2]
    assert (text["texts"], text["bytes"]) == (2, sum(map(len, texts)))
    assert text["tokens"] == sum(len(tok.encode(text)) + 1 for text in texts)
    assert text["bits per byte"] == pytest.approx(bits(model, tok, texts))
    assert text["loss"] == pytest.approx(text["bits per byte"] * math.log(2) * text["bytes"] / text["tokens"])
    assert text["perplexity"] == pytest.approx(math.exp(text["loss"]))
    expected = ("acc_norm", "perplexity", "of 2 questions", "prompts of lm_eval", " +- ")
    assert all(name in out for name in expected)
    assert plot.newest({"sft": [easy, mmlu, text]}) == {}  # bars are for the built-in questions


def test_a_broken_question_is_reported_before_any_task_begins(chat_model, tmp_path, capsys):
    folder = write(tmp_path / "questions", "piqa", ROWS["piqa"], {**ROWS["piqa"], "label": 2})
    with pytest.raises(UserError, match="piqa.jsonl line 2 is not a question of piqa: the right one is 2"):
        evaluation.main([str(chat_model[0]), "--tasks=builtin,piqa", f"--benchmarks={folder}"])
    assert not (chat_model[0] / "eval.jsonl").exists() and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "words, says",
    [
        (["--tasks=text"], "--tasks=text needs --text=SOURCE"),
        (["--text=a.txt"], "--text=a.txt needs --tasks=text"),
        (["--tasks=text", "--text=nowhere.txt"], "no file or folder 'nowhere.txt'"),
        (["--tasks=piqa", "--limit=0"], "--limit=0 must be 1 or more"),
        (["--tasks=piqa", "--benchmarks=nowhere"], "'nowhere' has no piqa.jsonl"),
    ],
)
def test_flags_that_cannot_work_are_reported(words, says, tmp_path, tok):
    torch.manual_seed(0)
    checkpoint.save(tmp_path, SmolLM(Config(**TINY, seq_len=16, init_std=0.3)), tok)
    with pytest.raises(UserError, match=says):
        evaluation.main([str(tmp_path), *words])


def test_the_picture_shows_the_stages_that_there_are(chat_model, capsys):
    pytest.importorskip("matplotlib")
    out = chat_model[0].parent
    plot.main([str(out)])
    assert (out / "stages.png").read_bytes()[:4] == b"\x89PNG" and "stages.png" in capsys.readouterr().out
    with pytest.raises(UserError, match="no log.jsonl"):
        plot.main([str(out / "data")])


def test_the_picture_shows_the_newest_evaluation_with_the_generation_prompt():
    lines = [{"n": n, "generation_prompt": n != 3} for n in (1, 2, 3)]
    assert plot.newest({"sft": lines, "dpo": []}) == {"sft": lines[1]}


def test_a_line_of_the_log_that_is_being_written_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"st')
    assert disk.read_lines(tmp_path / "log.jsonl") == [{"step": 1}]
    assert disk.read_lines(tmp_path / "none") == []


def test_one_question_on_the_command_line_gives_one_answer(chat_model, run_here):
    stage, model, tok = chat_model
    words = ("--device=cpu", "--chat", "the cat", "--temperature=0", "--max_new_tokens=12")
    code, out, err = run_here("sample.py", stage, *words)
    ids = list(
        generate(model, answers.prompt_of(tok, "the cat"), 12, temperature=0, stop_ids=tok.stop_ids)
    )
    cut = "(the answer is cut: it reached --max_new_tokens=12)\n" if len(ids) == 12 else ""
    assert (code, out, err) == (0, tok.decode(ids) + "\n", cut)


def test_several_questions_on_the_command_line_are_answered_as_if_each_were_alone(chat_model, run_here):
    words = ("sample.py", chat_model[0], "--device=cpu", "--temperature=0", "--max_new_tokens=5", "--chat")
    asked = ("the cat", "a mat", "the cat")
    single = {text: run_here(*words, text)[1] for text in asked}
    assert run_here(*words, *asked)[1] == "".join(f"> {text}\n{single[text]}" for text in asked)


def test_a_conversation_has_commands_and_ends_with_quit_or_the_end_of_input(chat_model, run_here):
    lines = ["the cat", "/system You are a dog.", "a mat", "/reset", "/dance", "", "/quit", "never read"]
    words = ("sample.py", chat_model[0], "--device=cpu", "--chat", "--max_new_tokens=5")
    code, out, err = run_here(*words, said="\n".join(lines))
    assert code == 0 and "(the answer is cut: it reached --max_new_tokens=5)" in err
    assert out.count("(a new conversation)") == 2 and "there is no command /dance" in out
    assert run_here(*words, said="the cat\n")[0] == 0


def test_a_system_message_begins_a_conversation_that_knows_nothing_of_the_last_one(tok, tmp_path, run_here):
    torch.manual_seed(0)
    model = SmolLM(Config(**TINY, seq_len=128, init_std=0.3)).eval()  # what it says depends on all it reads
    checkpoint.save(tmp_path, model, tok.for_chat())
    lines = "the cat\n/system the dog\na mat\n/quit\n"
    words = ("--device=cpu", "--chat", "--max_new_tokens=9", "--temperature=0")
    _, out, _ = run_here("sample.py", tmp_path, *words, said=lines)
    messages = [{"role": "system", "content": "the dog"}, {"role": "user", "content": "a mat"}]
    ids = tok.chat(messages, add_generation_prompt=True)[0]
    answer = escape_controls(tok.decode(list(generate(model, ids, 9, temperature=0, stop_ids=(0, 2)))))
    assert answer and out.endswith(f"(a new conversation)\n> {answer}\n> ")


def test_a_base_model_is_not_talked_to(chat_cfg, run_here):  # noqa: F811
    code, out, err = run_here("sample.py", chat_cfg.init_from, "--device=cpu", "--chat", "hello")
    assert code == 2 and "base model" in err and "sft.py" in err and out == ""
