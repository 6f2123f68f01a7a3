"""evals/benchmarks.py and score.py: rows, prompts, log-likelihoods, and lm-evaluation-harness."""

import gzip
import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import TINY, WORDS

from config import Config, UserError
from corpus.hub import Hub
from evals import benchmarks, score
from evals.benchmarks import Item
from model import SmolLM
from plumbing import checkpoint

FOUR = {"text": ["honey", "bread", "milk", "iron"], "label": ["A", "B", "C", "D"]}
ROWS = {  # a row of each benchmark in the layout of its authors; the right answer is always the second
    "hellaswag": {
        "activity_label": "Baking bread",
        "ctx_a": "[header] How to bake [title] Mix it [step] with  water.",
        "ctx_b": "then she ",
        "endings": ["[substeps] Sleep.", "kneads the dough", "sings", "runs"],
        "label": "1",
    },
    "arc_easy": {"question": "What do bakers bake?", "choices": FOUR, "answerKey": "B"},
    "arc_challenge": {
        "question": "What do bakers bake?",
        "choices": {"text": ["honey", "bread"], "label": ["1", "2"]},
        "answerKey": "2",
    },
    "piqa": {"goal": "Bake bread.", "sol1": "Use a fridge.", "sol2": "Use an oven.", "label": 1},
    "winogrande": {
        "sentence": "Ann asked Bea for bread because _ was hungry.",
        "option1": "Bea",
        "option2": "Ann",
        "answer": "2",
    },
    "openbookqa": {"question_stem": "Bakers bake", "choices": FOUR, "answerKey": "B"},
    "commonsense_qa": {"question": "What do bakers bake?", "choices": FOUR, "answerKey": "B"},
    "mmlu": {
        "subject": "high_school_biology",
        "question": "What do bakers bake?",
        "choices": FOUR["text"],
        "answer": 1,
    },
}
ANSWERS = (" honey", " bread", " milk", " iron")
LETTERS = (" A", " B", " C", " D")
LISTED = "What do bakers bake?\nA. honey\nB. bread\nC. milk\nD. iron\nAnswer:"
ASKED = "Question: What do bakers bake?\nAnswer:"
# the context (winogrande by lm-eval: one for each choice) and the choices of the rows above
READ = {
    ("hellaswag", "smollm"): (
        "Baking bread: How to bake. Mix it with water. Then she ",
        ("  Sleep.", " kneads the dough", " sings", " runs"),
    ),
    ("hellaswag", "lm_eval"): (
        "Baking bread: How to bake. Mix it with water. Then she",
        ("  Sleep.", " kneads the dough", " sings", " runs"),
    ),
    ("arc_easy", "smollm"): (ASKED, ANSWERS),
    ("arc_easy", "lm_eval"): (ASKED, ANSWERS),
    ("arc_challenge", "smollm"): (ASKED, ANSWERS[:2]),
    ("arc_challenge", "lm_eval"): (ASKED, ANSWERS[:2]),
    ("piqa", "smollm"): ("Question: Bake bread.\nAnswer:", (" Use a fridge.", " Use an oven.")),
    ("piqa", "lm_eval"): ("Question: Bake bread.\nAnswer:", (" Use a fridge.", " Use an oven.")),
    ("winogrande", "smollm"): (
        "Ann asked Bea for bread because ",
        ("Bea was hungry.", "Ann was hungry."),
    ),
    ("winogrande", "lm_eval"): (
        ("Ann asked Bea for bread because Bea", "Ann asked Bea for bread because Ann"),
        (" was hungry.", " was hungry."),
    ),
    ("openbookqa", "smollm"): ("Bakers bake", ANSWERS),
    ("openbookqa", "lm_eval"): ("Bakers bake", ANSWERS),
    ("commonsense_qa", "smollm"): ("What do bakers bake?", ANSWERS),
    ("commonsense_qa", "lm_eval"): (f"Question: {LISTED}", LETTERS),
    ("mmlu", "smollm"): (f"The following are questions about high school biology.\n{ASKED}", ANSWERS),
    ("mmlu", "lm_eval"): (
        f"The following are multiple choice questions (with answers) about high school biology.\n\n{LISTED}",
        LETTERS,
    ),
}


def write(folder, task, *rows):
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{task}.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture
def model():
    """A random model of 64 positions that prefers some tokens clearly, and reads all that came before."""
    torch.manual_seed(0)
    return SmolLM(Config(**TINY, seq_len=64, init_std=0.3)).eval()


def some_items(n, longest=12, seed=0):
    """Questions of random words; every third has a context for each choice, and one has none at all."""
    rng = random.Random(seed)

    def say(most):
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    found = [Item(("", ""), (say(3), say(3)), 0)]
    for i in range(n - 1):
        k, context = rng.randint(2, 5), say(longest) + " " * rng.randint(0, 2)
        contexts = tuple(f"{context} {say(2)}" for _ in range(k)) if i % 3 == 0 else (context,) * k
        found.append(Item(contexts, tuple(" " + say(4) for _ in range(k)), rng.randrange(k)))
    return found


def one_by_one(model, tok, item):
    """The definition: the sum of log softmax at the continuation's ids, each row alone, in float64."""
    values = []
    for context, choice in zip(item.contexts, item.choices):
        bare = context.rstrip()
        before = tok.encode(bare)
        after = tok.encode(context + choice)[len(before) :]
        ids = ([*before, *after] if before else [tok.eos_id, *after])[-model.cfg.seq_len - 1 :]
        logits = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(dim=-1)
        values.append(sum(logits[t - 1, ids[t]].item() for t in range(len(ids) - len(after), len(ids))))
    return values


# --- rows and prompts ---


@pytest.mark.parametrize("task, style", READ)
def test_a_row_becomes_what_a_model_reads(task, style, tmp_path):
    (item,) = benchmarks.items(task, style, write(tmp_path / "data", task, ROWS[task]))
    context, choices = READ[task, style]
    contexts = (context,) * len(choices) if isinstance(context, str) else context
    assert item == Item(contexts, choices, 1)


def test_files_may_be_jsonl_gzip_or_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for task in ("arc_easy", "hellaswag", "mmlu"):
        (expected,) = benchmarks.items(task, "smollm", write(tmp_path / "plain", task, ROWS[task]))
        (tmp_path / task).mkdir()
        with gzip.open(tmp_path / task / f"{task}.jsonl.gz", "wt") as file:
            file.write(json.dumps(ROWS[task]) + "\n")
        assert benchmarks.items(task, "smollm", tmp_path / task) == [expected]
        (tmp_path / task / f"{task}.jsonl.gz").unlink()
        parquet.write_table(pyarrow.Table.from_pylist([ROWS[task]]), tmp_path / task / f"{task}.parquet")
        assert benchmarks.items(task, "smollm", tmp_path / task) == [expected]


def test_a_limit_reads_no_further(tmp_path):
    folder = write(tmp_path / "data", "piqa", ROWS["piqa"], ROWS["piqa"], {"broken": 1})
    assert len(benchmarks.items("piqa", folder=folder, limit=2)) == 2
    with pytest.raises(UserError):
        benchmarks.items("piqa", folder=folder)


@pytest.mark.parametrize(
    "task, change, says",
    [
        ("hellaswag", {"label": "4"}, r"right one is '4', but the choices are 0, 1, 2, 3"),
        ("hellaswag", {"label": ""}, r"right one is ''"),
        ("hellaswag", {"endings": ["a", "b", "c"]}, r"there are 3 of them"),
        ("hellaswag", {"ctx_b": None}, r"not the layout of hellaswag"),
        ("arc_easy", {"answerKey": "E"}, r"right one is 'E', but the choices are A, B, C, D"),
        ("arc_easy", {"choices": ["a", "b"]}, r"not the layout of arc_easy"),
        ("piqa", {"sol2": 7}, r"is not text"),
        ("piqa", {"goal": " "}, r"is empty"),
        ("piqa", {"label": -1}, r"right one is -1, but the choices are 0, 1"),
        ("winogrande", {"answer": ""}, r"right one is '', but the choices are 1, 2"),
        ("winogrande", {"sentence": "no gap"}, r"one gap, written _"),
        ("mmlu", {"answer": 4}, r"right one is 4"),
    ],
)
def test_a_bad_row_is_reported_with_its_file_and_line(task, change, says, tmp_path):
    folder = write(tmp_path / "data", task, ROWS[task], {**ROWS[task], **change})
    with pytest.raises(UserError, match=rf"{task}.jsonl line 2 is not a question of {task}: .*{says}"):
        benchmarks.items(task, folder=folder)


def test_a_missing_column_file_or_text_is_reported(tmp_path):
    folder = write(tmp_path / "data", "piqa", {"goal": "Bake."})
    with pytest.raises(UserError, match="1 is not a question of piqa: no field 'sol1', there are .'goal'"):
        benchmarks.items("piqa", folder=folder)
    with pytest.raises(UserError, match="no mmlu.jsonl or .* or mmlu.json or mmlu.parquet.* of cais/mmlu"):
        benchmarks.items("mmlu", folder=folder)
    (folder / "piqa.jsonl").write_bytes(b'{"goal": "\xff"}\n')
    with pytest.raises(UserError, match="line 1 is not a question of piqa: invalid UTF-8"):
        benchmarks.items("piqa", folder=folder)
    (folder / "piqa.jsonl").write_text("")
    with pytest.raises(UserError, match="contains no questions"):
        benchmarks.items("piqa", folder=folder)


def test_both_harnesses_read_the_published_splits():
    """openbookqa is the one that they read from different splits; arc and mmlu are tested on their tests."""
    for style, different in (("smollm", "validation"), ("lm_eval", "test")):
        splits = {task: benchmarks.locate(task, None, style).split for task in benchmarks.HUB}
        tests = {"arc_easy", "arc_challenge", "mmlu"} | ({"openbookqa"} if different == "test" else set())
        assert {task for task, split in splits.items() if split == "test"} == tests
    assert benchmarks.locate("arc_challenge", None) == Hub("allenai/ai2_arc", "ARC-Challenge", split="test")


@pytest.mark.parametrize("task", ROWS)
def test_the_text_to_look_for_in_training_is_the_question_with_its_answer(task, tmp_path):
    (text,) = benchmarks.texts(task, write(tmp_path / "data", task, ROWS[task]))
    expected = {
        "hellaswag": "How to bake. Mix it with water. Then she kneads the dough",
        "piqa": "Bake bread. Use an oven.",
        "winogrande": "Ann asked Bea for bread because Ann was hungry.",
        "openbookqa": "Bakers bake bread",
    }
    assert text.strip() == expected.get(task, "What do bakers bake? bread")


# --- log-likelihoods ---


def test_log_likelihoods_are_those_of_each_choice_alone(model, tok):
    items = some_items(30)
    found, n_cut = score.log_likelihoods(model, tok, items)
    assert n_cut == 0
    for values, item in zip(found, items, strict=True):
        assert values == pytest.approx(one_by_one(model, tok, item), abs=3e-5)


def test_what_the_choices_share_is_read_once(model, tok):
    """The context goes through the decoder once; only what is its own, padded, is read for each choice."""
    context, choices = "the cat sat on a mat" + " and saw" * 9, (" the dog", " a cat", " rain", " mat")
    n_read = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, args, __: n_read.append(args[0].numel()))
    score.log_likelihoods(model, tok, [Item((context,) * 4, choices, 0)] * 5)
    hook.remove()
    lengths = [score.encode_choice(tok, context, choice)[1] for choice in choices]
    assert sum(n_read) == 5 * (len(tok.encode(context)) - 1 + 4 * max(lengths))


@pytest.mark.parametrize("rows", [
    [([20, 30, 40], 1), ([20, 30, 50, 60], 2)],  # a common context
    [([20, 30, 40], 1), ([20, 30, 50], 1), ([20, 30, 60], 1)],  # letters: only the last token differs
    [([20, 70, 40, 50], 2), ([20, 80, 40, 50], 2)],  # contexts differ
    [([70, 40], 1), ([80, 40, 50], 1)],  # or have nothing in common
    [([20, 30, 40], 2), ([20, 30, 40], 2)],  # equal choices
    [([20, 30, 40, 50], 3), ([20, 30, 40], 1)],  # a choice begins within the shared part
    [([20, 30, 40], 1)],
], ids=str)  # fmt: skip
def test_a_score_is_the_sum_of_a_choices_log_probabilities(rows, model):
    wanted = []
    for ids, n in rows:
        logs = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(dim=1)
        wanted.append(sum(logs[t - 1, ids[t]].item() for t in range(len(ids) - n, len(ids))))
    with torch.inference_mode():
        assert score.score_choices(model, rows) == pytest.approx(wanted, abs=3e-5)


def test_a_long_context_loses_its_left_and_is_counted(model, tok):
    long = Item((" ".join(WORDS * 4),) * 3, (" the cat", " a", " green hills while rain"), 0)
    items = [*some_items(3), long, *some_items(2, seed=1)]
    found, n_cut = score.log_likelihoods(model, tok, items)
    assert n_cut == 1
    for values, item in zip(found, items):
        assert values == pytest.approx(one_by_one(model, tok, item), abs=1e-4)


def test_a_context_that_fits_exactly_is_not_cut():
    """64 positions read 64 ids and predict the 65th."""
    assert score.cut_contexts([(list(range(65)), 2)], 64) == ([(list(range(65)), 2)], False)
    assert score.cut_contexts([(list(range(66)), 2)], 64) == ([(list(range(1, 66)), 2)], True)
    with pytest.raises(UserError, match="a choice of 65 tokens does not fit into the 64 positions"):
        score.cut_contexts([(list(range(80)), 65)], 64)


def test_a_space_belongs_to_the_word_that_follows_it(tok):
    """At the end of the context or at the beginning of the choice, it leads to the same ids."""
    for context, choice in (("the cat ", "sat"), ("the cat", " sat"), ("", "sat"), ("  ", "sat")):
        ids, n = score.encode_choice(tok, context, choice)
        assert tok.decode(ids[-n:]) == context[len(context.rstrip()) :] + choice
        assert ids[:-n] == (tok.encode(context.rstrip()) or [tok.eos_id])


def test_a_choice_that_merges_into_the_context_has_a_token_left(tok):
    word = next(token for token in tok.tokens if token.isalpha() and len(token) == 3)  # one id
    assert score.encode_choice(tok, word[:2], word[2:])[1] >= 1
    assert len(tok.encode(word)) == 1


# --- lm-evaluation-harness, by hand: python -m pytest -m interop tests/test_benchmarks.py ---


def random_row(task, rng, long=9, short=5):
    """A row with the words of the tiny tokenizer, brackets, spaces at ends, and the right answer anywhere.
    long, short: the most words of a question, of a choice."""

    def say(most, odd=0.2):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, most)))
        return rng.choice((f" {text}", f"{text} ", f"{text}.", f"{text}\n")) if rng.random() < odd else text

    def texts(n):
        found = []
        while len(found) < n:  # equal ones would be equally likely, and rounding would choose
            found = list(dict.fromkeys([*found, say(short)]))
        return found

    n_choices = {"commonsense_qa": 5, "arc_easy": rng.choice((3, 4, 5))}.get(task, 4)
    labels = list("ABCDE"[:n_choices] if rng.random() < 0.7 or n_choices == 5 else "1234"[:n_choices])
    listed = {"choices": {"text": texts(n_choices), "label": labels}, "answerKey": rng.choice(labels)}
    return {
        "hellaswag": lambda: {
            "activity_label": say(3),
            "ctx_a": rng.choice(("", "[header] ")) + say(long) + rng.choice(("", " [title] cat [step] dog")),
            "ctx_b": rng.choice(("", say(4))),
            "endings": [rng.choice(("", "[substeps] ")) + text for text in texts(4)],
            "label": str(rng.randrange(4)),
        },
        "piqa": lambda: {
            "goal": say(long),
            "sol1": say(short),
            "sol2": say(short),
            "label": rng.randrange(2),
        },
        "winogrande": lambda: {
            "sentence": f"{say(long, 0)} _ {say(short, 0)}.",
            "option1": say(1, 0),
            "option2": say(2, 0),
            "answer": rng.choice("12"),
        },
        "openbookqa": lambda: {"question_stem": say(long), **listed},
        "mmlu": lambda: {
            "subject": "high_school_us_history",
            "question": say(long),
            "choices": texts(4),
            "answer": rng.randrange(4),
        },
    }.get(task, lambda: {"question": say(long), **listed})()


def harness(task, path, model_folder, tmp_path, n):
    """What lm-evaluation-harness makes of a file with its own task: (log-likelihoods by row, its results)."""
    lm_eval = pytest.importorskip("lm_eval")
    name = {"mmlu": "mmlu_high_school_us_history"}.get(task, task)
    own = {
        "arc_easy": "arc/arc_easy",
        "arc_challenge": "arc/arc_challenge",
        "mmlu": f"mmlu/default/{name}",
        "winogrande": "winogrande/default",
        "commonsense_qa": "commonsense_qa/default",
    }.get(task, f"{task}/{task}")
    settings = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / f"{own}.yaml"),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(path) for split in ("train", "validation", "test", "dev")},
            "cache_dir": str(tmp_path / "cache"),
        },
    }
    (tmp_path / "task.yaml").write_text(json.dumps(settings))  # JSON is YAML
    done = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model_folder), "dtype": "float32"},
        tasks=[str(tmp_path / "task.yaml")],
        batch_size=8,
        device="cpu",
        bootstrap_iters=100,
    )
    samples = sorted(done["samples"][name], key=lambda sample: sample["doc_id"])
    assert len(samples) == n
    values = [[answer[0][0] for answer in sample["resps"]] for sample in samples]
    return values, done["results"][name], samples


@pytest.mark.interop
@pytest.mark.parametrize("task", ROWS)
def test_lm_evaluation_harness_agrees(task, tok, tmp_path, monkeypatch):
    """On 200 questions, some too long for the model: the same prompts, log-likelihoods and scores."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    torch.manual_seed(0)
    seq_len = {"mmlu": 170, "commonsense_qa": 85}.get(task, 35)
    model = SmolLM(Config(**TINY, seq_len=seq_len, init_std=0.3)).eval()
    checkpoint.save(tmp_path / "model", model, tok)
    rng = random.Random(len(task))
    rows = [random_row(task, rng) for _ in range(200)]
    folder = write(tmp_path / "data", task, *rows)
    theirs, results, samples = harness(
        task, folder / f"{task}.jsonl", tmp_path / "model", tmp_path, len(rows)
    )
    items = benchmarks.items(task, "lm_eval", folder)
    for item, sample in zip(items, samples):
        read = [tuple(arguments) for arguments in sample["arguments"]]
        assert read == list(zip(item.contexts, item.choices))
    ours, n_cut = score.log_likelihoods(model, tok, items)
    found = score.accuracies(items, ours)
    for item, values, wanted in zip(items, ours, theirs, strict=True):
        assert values == pytest.approx(wanted, abs=1e-3)
        lengths = [len(choice) - 1 for choice in item.choices]  # without the space
        for divisors in ([1] * len(lengths), lengths):  # acc, acc_norm
            mine, other = ([x / n for x, n in zip(row, divisors)] for row in (values, wanted))
            assert mine.index(max(mine)) == other.index(max(other))
    for name in ("acc", "acc_norm"):
        if f"{name},none" in results:
            assert found[name] == pytest.approx(results[f"{name},none"])
            assert found[f"{name}_stderr"] == pytest.approx(results[f"{name}_stderr,none"])
    worst = max(abs(a - b) for x, y in zip(ours, theirs) for a, b in zip(x, y))
    print(f"{task}: {len(rows)} choices equal, log-likelihoods within {worst:.1e}, {n_cut} contexts cut")


@pytest.mark.interop
def test_every_subject_of_mmlu_is_introduced_as_in_lm_evaluation_harness():
    yaml, lm_eval = pytest.importorskip("yaml"), pytest.importorskip("lm_eval")
    files = [*Path(lm_eval.__file__).parent.glob("tasks/mmlu/default/mmlu_*.yaml")]
    assert len(files) == 57
    for file in files:
        task = yaml.safe_load(file.read_text())
        row = {**ROWS["mmlu"], "subject": task["dataset_name"]}
        context, _ = benchmarks.LM_EVAL["mmlu"](benchmarks.entry_of("mmlu", row))
        assert context.startswith(task["description"] + "What do")


LENGTHS = {  # about as many tokens as the questions and the choices of the real ones have on average
    "hellaswag": (55, 28), "arc_easy": (30, 6), "arc_challenge": (34, 8), "piqa": (12, 28),
    "winogrande": (20, 12), "openbookqa": (16, 5), "commonsense_qa": (18, 2), "mmlu": (50, 12),
}  # random_row draws half as many words on average, and a word is two tokens of the tiny tokenizer


@pytest.mark.interop
def test_questions_are_not_read_slower_than_by_lm_evaluation_harness(tok, tmp_path):
    """8 questions per benchmark, SmolLM-135M's shape, random weights, float32, one thread; lm-eval's `hf`
    model with its best batch size. CPU time of tokenizing and reading: others may use the machine, too."""
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    from lm_eval.models.huggingface import HFLM

    shape = dict(vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, d_model=576, d_ff=1536)
    torch.manual_seed(0)
    model = SmolLM(Config(**shape, seq_len=2048, init_std=0.0416)).eval()
    checkpoint.save(tmp_path / "model", model, tok)
    lm = HFLM(pretrained=str(tmp_path / "model"), dtype="float32", batch_size=1, device="cpu")

    def ours(items, _):
        return score.log_likelihoods(model, tok, items)[0]

    def theirs(items, batch):
        lm.batch_size_per_gpu = batch
        pairs = [pair for item in items for pair in zip(item.contexts, item.choices)]
        asked = [instance("loglikelihood", {}, pair, i, ("", i, 1)) for i, pair in enumerate(pairs)]
        values = iter(lm.loglikelihood(asked, disable_tqdm=True))
        return [[next(values)[0] for _ in item.choices] for item in items]

    def timed(read, items, batch=None):
        began = time.process_time()
        return read(items, batch), time.process_time() - began

    seconds, rng = Counter(), random.Random(0)
    for task, (long, short) in LENGTHS.items():
        folder = write(tmp_path / "data", task, *(random_row(task, rng, long, short) for _ in range(8)))
        items = benchmarks.items(task, "lm_eval", folder)
        found, spent = timed(ours, items)
        others = {batch: timed(theirs, items, batch) for batch in (1, 8, 32)}
        for values, wanted in zip(sum(found, []), sum(others[8][0], []), strict=True):
            assert values == pytest.approx(wanted, abs=1e-2)
        best = min(needed for _, needed in others.values())
        seconds.update(ours=spent, best=best)
        print(f"{task}: {len(items) / spent:.2f} questions per second, {best / spent:.1f} times lm-eval's")
    print(f"all: {seconds['best'] / seconds['ours']:.2f} times")
    assert seconds["best"] > seconds["ours"]
