"""eval.py and plot.py: answers to the built-in questions, bits per byte, the log of it, and the picture."""

import importlib
import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, write_texts
from test_benchmarks import ROWS, write
from test_packing import at_home, chat_cfg, flags  # noqa: F401  fixtures

from plumbing import checkpoint
from evals import plot
import sft
from config import Config, UserError
from evals.benchmarks import Item
from evals.questions import Question
from model import SmolLM
from sample import generate, shown
from tokenizer import Tokenizer

evaluation = importlib.import_module("eval")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def chat_model(chat_cfg):  # noqa: F811
    """The stage folder of a tiny chat model, and its model and tokenizer."""
    sft.main(["config/demo_sft.py", *flags(replace(chat_cfg, max_steps=2))])
    folder = checkpoint.find(f"{chat_cfg.out_dir}/sft")
    return folder.parent, SmolLM.load(folder).eval(), Tokenizer.load(folder)


def test_many_prompts_at_once_give_the_answers_that_they_give_one_by_one(chat_model):
    _, model, tok = chat_model
    prompts = [
        evaluation.prompt_of(model, tok, text) for text in ("the cat", "a", "1+1=", "the dog", "rain fell")
    ]
    stops = (tok.eos_id, model.stop_id)
    for prompt, (text, ended) in zip(prompts, evaluation.answers(model, tok, prompts, limit=20)):
        ids = list(generate(model, prompt, 20, temperature=0, stop_ids=stops))
        assert text == tok.decode(ids).strip() and ended == (len(ids) < 20)


def test_an_answer_ends_before_the_id_that_ends_it(tok):
    """Some id that a model says, but not at once, is made the end: what comes behind it is not read."""
    torch.manual_seed(0)
    model = SmolLM(Config(**TINY, seq_len=128, init_std=0.3)).eval()
    model.stop_id = tok.im_end_id
    prompt = evaluation.prompt_of(model, tok, "the cat")
    ids = list(generate(model, prompt, 20, temperature=0))
    model.stop_id = next(i for i in ids if i != ids[0])
    expected = tok.decode(ids[: ids.index(model.stop_id)]).strip()
    assert evaluation.answers(model, tok, [prompt], limit=20) == [(expected, True)]


def test_an_answer_rambles_that_has_no_end_no_words_or_too_many_sentences():
    question = Question("group", "hello", "", sentences=2)
    good, long = "Hello! How can I help you?", "Hello! How can I help you? And then. And then."
    assert not evaluation.rambles(question, good, True)
    assert evaluation.rambles(question, good, False) and evaluation.rambles(question, "", True)
    assert evaluation.rambles(question, long, True)


def test_the_chosen_answer_wins_where_its_value_is_larger():
    assert evaluation.share_of_chosen(torch.tensor([[2.0, 1.0], [0.0, 5.0], [3.0, 1.0], [4.0, 3.0]])) == 0.75


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
    assert evaluation.bits_per_byte(model, tok, [text]) == pytest.approx(expected, rel=1e-5)


def test_a_chat_model_is_asked_in_its_template_and_a_base_model_as_in_transcripts(chat_model):
    _, model, tok = chat_model
    chat = [{"role": "user", "content": "hello"}]
    assert evaluation.prompt_of(model, tok, "hello") == tok.chat(chat, True)[0]
    assert evaluation.prompt_of(model, tok, "hello", False) == tok.chat(chat)[0]
    model.stop_id = 0
    assert tok.decode(evaluation.prompt_of(model, tok, "hello")) == "User: hello\nAssistant:"


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary(tok):
    """All weights 0: every id is equally likely, and each costs log2(300) bits."""
    model = SmolLM(Config(vocab_size=300, n_layer=1, n_head=2, n_kv_head=1, d_model=16, d_ff=16, seq_len=16))
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    texts = ["the cat sat on a mat", "and saw the dog run over green hills while rain fell softly " * 3]
    n_ids = sum(len(tok.encode(text)) + 1 for text in texts)
    expected = n_ids * math.log2(300) / sum(len(text.encode()) for text in texts)
    assert evaluation.bits_per_byte(model, tok, texts) == pytest.approx(expected, rel=1e-5)


def test_the_table_is_printed_and_kept_beside_the_stage(chat_model, capsys):
    stage, _, _ = chat_model
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
    found = evaluation.accuracies(items, likelihoods)
    assert found["acc"] == 0.5 and found["acc_norm"] == 0.75
    assert found["acc_stderr"] == pytest.approx(statistics.stdev([1, 0, 0, 1]) / 2)
    assert found["acc_norm_stderr"] == pytest.approx(statistics.stdev([1, 0, 1, 1]) / 2)
    assert evaluation.accuracies(items[:1], likelihoods)["acc_stderr"] == 0.0


def test_a_space_before_a_choice_is_not_one_of_its_characters():
    """-2.4 / 2 is more than -1.3 / 1; with the space counted, -2.4 / 3 would be less than -1.3 / 2."""
    found = evaluation.accuracies([Item(("", ""), (" ab", " c"), 0)], [[-2.4, -1.3]])
    assert found["acc_norm"] == 1.0
    assert evaluation.accuracies([Item(("", ""), ("ab", "c"), 0)], [[-2.4, -1.3]])["acc_norm"] == 1.0


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
    assert (mmlu["questions"], mmlu["cut"]) == (1, 1) and "so only the end was read: 1 questions" in out
    texts = [json.loads(line)["text"] for line in Path(source).read_text().splitlines()][:2]
    assert (text["texts"], text["bytes"]) == (2, sum(map(len, texts)))
    assert text["tokens"] == sum(len(tok.encode(text)) + 1 for text in texts)
    assert text["bits per byte"] == pytest.approx(evaluation.bits_per_byte(model, tok, texts))
    assert text["loss"] == pytest.approx(text["bits per byte"] * math.log(2) * text["bytes"] / text["tokens"])
    assert text["perplexity"] == pytest.approx(math.exp(text["loss"]))
    assert all(name in out for name in ("acc_norm", "perplexity", "of 2 questions", "prompts of lm_eval"))
    assert plot.newest({"sft": [easy, mmlu, text]}) == {}  # bars are for the built-in questions


def test_a_broken_question_is_told_before_any_task_begins(chat_model, tmp_path, capsys):
    folder = write(tmp_path / "questions", "piqa", ROWS["piqa"], {**ROWS["piqa"], "label": 2})
    with pytest.raises(UserError, match="piqa.jsonl line 2 is no question of piqa: the right one is 2"):
        evaluation.main([str(chat_model[0]), "--tasks=builtin,piqa", f"--benchmarks={folder}"])
    assert not (chat_model[0] / "eval.jsonl").exists() and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "words, says",
    [
        (["--tasks=text"], "--tasks=text and --text=SOURCE need each other"),
        (["--text=a.txt"], "--tasks=text and --text=SOURCE need each other"),
        (["--tasks=text", "--text=nowhere.txt"], "no source 'nowhere.txt'"),
        (["--tasks=piqa", "--limit=0"], "--limit=0 makes no sense"),
        (["--tasks=piqa", "--benchmarks=nowhere"], "'nowhere' has no piqa.jsonl"),
        (["--device=abacus"], "--device=abacus makes no sense"),
    ],
)
def test_flags_that_make_no_sense_are_told(words, says, tmp_path):
    torch.manual_seed(0)
    SmolLM(Config(**TINY, seq_len=16, init_std=0.3)).save(tmp_path)
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
    assert plot.read(tmp_path / "log.jsonl") == [{"step": 1}] and plot.read(tmp_path / "none") == []


def chat(stage, *words, said=None):
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", stage, "--device=cpu", *words],
        input=said,
        capture_output=True,
        encoding="utf-8",
        timeout=100,
    )
    return done.returncode, done.stdout, done.stderr


def test_one_question_on_the_command_line_gives_one_answer(chat_model):
    stage, model, tok = chat_model
    code, out, err = chat(stage, "--chat", "the cat", "--temperature=0", "--max_new_tokens=12")
    ids = list(
        generate(model, evaluation.prompt_of(model, tok, "the cat"), 12, temperature=0, stop_ids=(0, 2))
    )
    assert (code, out, err) == (0, tok.decode(ids) + "\n", "")


def test_a_conversation_has_commands_and_ends_with_quit_or_the_end_of_input(chat_model):
    lines = ["the cat", "/system You are a dog.", "a mat", "/reset", "/dance", "", "/quit", "never read"]
    code, out, err = chat(chat_model[0], "--chat", "--max_new_tokens=5", said="\n".join(lines))
    assert code == 0 and err == ""
    assert out.count("(a new conversation)") == 2 and "there is no command /dance" in out
    assert chat(chat_model[0], "--chat", "--max_new_tokens=5", said="the cat\n")[0] == 0


def test_a_system_message_begins_a_conversation_that_knows_nothing_of_the_last_one(tok, tmp_path):
    torch.manual_seed(0)
    model = SmolLM(Config(**TINY, seq_len=128, init_std=0.3)).eval()  # what it says depends on all it reads
    model.stop_id = tok.im_end_id
    model.save(tmp_path)
    tok.save(tmp_path, 128, model.stop_id)
    lines = "the cat\n/system the dog\na mat\n/quit\n"
    _, out, _ = chat(tmp_path, "--chat", "--max_new_tokens=9", "--temperature=0", said=lines)
    messages = [{"role": "system", "content": "the dog"}, {"role": "user", "content": "a mat"}]
    ids = tok.chat(messages, add_generation_prompt=True)[0]
    answer = shown(tok.decode(list(generate(model, ids, 9, temperature=0, stop_ids=(0, 2)))))
    assert answer and out.endswith(f"(a new conversation)\n> {answer}\n> ")


def test_a_base_model_is_not_talked_to(chat_cfg):  # noqa: F811
    code, out, err = chat(chat_cfg.init_from, "--chat", "hello")
    assert code == 2 and "base model" in err and "sft.py" in err and out == ""
