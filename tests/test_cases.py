"""
Files as people have them, and commands as people type them.

Each test is a case that went wrong here or that users of other projects have reported: the same text saved by
another editor, a column nobody expected, a data set edited between two runs, a question that ends in a space.
Five rules decide what is right:

    the same text gives the same result, whichever file or flag it comes through
    nothing of a user's data is dropped, merged or misread in silence
    a run that cannot learn says so before it begins
    work made from other data is never used in silence
    messages are true, quote what is there, and give advice that works
"""

import gzip
import io
import json
import os
import random
import re
import shutil
import sys
import unicodedata
from collections import Counter
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from conftest import write_preset
from pyarrow import parquet
from test_dpo import dpo_cfg  # noqa: F401  fixtures
from test_sft import chat_cfg  # noqa: F401

import config
import data
import dpo
import sample
import sft
import tokenizer
import train
from config import Config, UserError
from corpus.conversations import ANSWERS, LISTS, QUESTIONS, SYSTEM, exchange, messages_of, pair_of
from corpus.files import Bad, LeftOut
from curate import __main__ as curate
from curate import classifier
from evals import __main__ as evals
from model import IGNORE, SmolLM
from plumbing import checkpoint
from plumbing.processes import Run
from sft import ChatBatches
from tokenizer import Tokenizer

SENTENCE = "the cat sat on a mat and saw the dog run over green hills. "
STORY = """The river was high that spring, and the people of the valley slept badly for a week.

They had to carry the sacks of grain up to the loft, and the children helped with the small ones.

One morning the water was gone, and it had left mud on the floors and fish in the gardens.

Nobody laughed about the fish until the evening, when they were eaten with bread and butter.

The oldest woman said that it had been worse when she was a girl, and that was the end of it.

Then the work began, which took them until the first days of summer to finish."""
ROWS = [{"text": f"{SENTENCE}{i}"} for i in range(60)]


# ---------------------------------------------------------------------------------------------------------
# tools of these tests


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def argv(cfg, source, *more, **changes):
    """The command line of a tiny run on one source."""
    cfg = replace(cfg, data=((str(source), 1.0),), **changes)
    home = Path(cfg.out_dir).parent
    return [write_preset(home / f"mine{len(list(home.glob('*.py')))}.py", cfg), *more]


@pytest.fixture
def tiny(small):
    """A run of four steps."""
    return replace(small, max_steps=4, warmup_steps=0, decay_steps=0, eval_every=0, save_every=0)


@pytest.fixture
def sft_cfg(chat_cfg):  # noqa: F811
    """A run of sft.py that holds nothing out, and an untrained base model to begin with."""
    return replace(chat_cfg, val_fraction=0.0)


@pytest.fixture
def pair_cfg(dpo_cfg):  # noqa: F811
    """The same of dpo.py."""
    return replace(dpo_cfg, val_fraction=0.0)


@pytest.fixture
def said(capfd):
    """said(main, [...]): everything that a command prints, on both streams."""
    def said(main, words):
        capfd.readouterr()
        main(words)
        return "".join(capfd.readouterr())
    return said


def documents(cfg, tok, split="train"):
    """The documents in the shards of a run, decoded from their ids."""
    files = sorted(Path(cfg.out_dir).glob(f"data/*/{split}_*.bin"))
    ids = np.concatenate([np.fromfile(file, np.uint16) for file in files])
    assert not len(ids) or ids[-1] == tok.eos_id  # every document is closed
    return [tok.decode(part[:-1]) for part in np.split(ids, np.flatnonzero(ids == tok.eos_id) + 1)[:-1]]


def chats_in(cfg, tok):
    """{what is read: what is learned of it} of every packed chat that sft.py trains on, as text."""
    (counts,), chats = Path(cfg.out_dir).glob("data/chats-*/counts.json"), {}
    for ids, targets, doc in zip(*ChatBatches(counts.parent, cfg).rows["train"], strict=True):
        for n in range(doc.max() + 1):
            learned = [i for i in targets[doc == n].tolist() if i != IGNORE]
            if learned:  # and no padding
                chats[tok.decode(ids[doc == n].tolist())] = tok.decode(learned)
    return chats


def turn(question, system=""):
    """What a model reads before it answers a question."""
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{head}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def pairs_in(cfg, tok, split="train"):
    """[(prompt, chosen, rejected)] of every pair that dpo.py trains on, as text."""
    (file,), pairs = Path(cfg.out_dir).glob("data/pairs-*.json"), []
    for sides in json.loads(file.read_text())[split]:
        (prompt, chosen), (same, rejected) = [
            (ids[:sum(t == IGNORE for t in targets) + 1], [t for t in targets if t != IGNORE])
            for ids, targets in sides]
        assert prompt == same
        pairs.append((tok.decode(prompt), tok.decode(chosen), tok.decode(rejected)))
    return pairs


@pytest.fixture
def base(small, tok, tmp_path):
    """The folder of an untrained base model."""
    return saved(tmp_path / "base", small, tok)


@pytest.fixture
def chat_model(small, tok, tmp_path):
    """The folder of an untrained chat model."""
    return saved(tmp_path / "chat", replace(small, seq_len=128), tok.for_chat())


def saved(folder, cfg, tok, step=1):
    checkpoint.save_step(step, Run(folder.name, folder), SmolLM(cfg), tok, [], {"config": {}}, keep=1)
    return str(folder)


def figures(folder, source, *more):
    """What python -m evals says about the texts of a source."""
    evals.main([folder, "--tasks=text", f"--text={source}", *more])
    line = json.loads((Path(folder) / "eval.jsonl").read_text().splitlines()[-1])
    return {name: line[name] for name in ("texts", "bytes", "tokens", "loss", "bits per byte")}


# ---------------------------------------------------------------------------------------------------------
# the same text through every door


LINE_ENDS = {"Windows": "\r\n", "old Mac": "\r", "NEL": "\x85", "line separator": "\u2028",
             "paragraph separator": "\u2029"}


def doors(folder, text):
    """The same text as every kind of file: [path, ...]."""
    folder.mkdir()
    (folder / "plain.txt").write_bytes(text.encode())
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (folder / "utf16.txt").write_bytes(text.encode("utf-16"))  # what Notepad calls Unicode
    jsonl(folder / "row.jsonl", [{"text": text}])
    (folder / "raw.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    jsonl(folder / "LOUD.JSONL", [{"text": text}])
    with gzip.open(folder / "packed.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"text": text}))
    (folder / "array.json").write_text(json.dumps([{"text": text}], indent=2))
    (folder / "record.json").write_text(json.dumps({"text": text}))
    parquet.write_table(pyarrow.table({"text": [text]}), folder / "row.parquet")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("end", LINE_ENDS.values(), ids=list(LINE_ENDS))
def test_line_ends_and_the_kind_of_file_change_neither_the_tokens_nor_the_verdicts(small, tok, tmp_path, end):
    """Windows' line ends once made "repeated lines" of the empty ones, and a token of their own in each."""
    kept = []
    for number, source in enumerate(doors(tmp_path / "doors", STORY.replace("\n", end))):
        cfg = replace(small, out_dir=str(tmp_path / f"out{number}"), val_fraction=0.0)
        data.main(argv(cfg, source))
        assert documents(cfg, tok) == [STORY], source.name
        curate.main([str(source), str(tmp_path / f"{number}.jsonl"),
                     "--steps=gopher_repetition,gopher_quality,c4,fineweb"])
        kept.append((tmp_path / f"{number}.jsonl").read_text())
    assert kept[0].count("\n") == 1 and set(kept) == {kept[0]}


def test_line_ends_do_not_change_how_well_a_text_is_predicted(base, tmp_path):
    """It was 2.1 bits per byte with the line ends of Unix and 2.8 with those of Windows."""
    told = [figures(base, source) for name, end in {"Unix": "\n", **LINE_ENDS}.items()
            for source in doors(tmp_path / name, STORY.replace("\n", end))]
    assert len(told) == 6 * 10 and all(one == told[0] for one in told)


def test_a_prompt_is_the_same_on_the_command_line_in_a_file_and_from_a_pipe(
        base, tmp_path, said, monkeypatch):
    ask = [base, "--max_new_tokens=8", "--temperature=0"]
    expected = said(sample.main, [*ask, "--prompt=the cat\nsat"])
    for end in LINE_ENDS.values():
        text = f"the cat{end}sat"
        assert said(sample.main, [*ask, f"--prompt={text}"]) == expected
        for marked in (text.encode(), b"\xef\xbb\xbf" + text.encode()):
            (tmp_path / "prompt.txt").write_bytes(marked)
            assert said(sample.main, [*ask, f"--file={tmp_path / 'prompt.txt'}"]) == expected
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(marked), "utf-8"))
            assert said(sample.main, ask) == expected


def test_byte_order_marks_inside_a_file_that_was_joined_from_others_are_no_text(small, tok, tmp_path):
    """cat a.jsonl b.jsonl, both saved with a mark."""
    rows = [json.dumps(row) + "\n" for row in ROWS[:2]]
    (tmp_path / "all.jsonl").write_text("\ufeff" + "\ufeff".join(rows), encoding="utf-8")
    text = "\ufeffone\n\ufefftwo\n\ufeff<|endoftext|>\n\ufeffthree"
    (tmp_path / "all.txt").write_text(text, encoding="utf-8")
    for name, expected in (("jsonl", [row["text"] for row in ROWS[:2]]), ("txt", ["one\ntwo", "three"])):
        cfg = replace(small, out_dir=str(tmp_path / name), val_fraction=0.0)
        data.main(argv(cfg, tmp_path / f"all.{name}"))
        assert documents(cfg, tok) == expected


def test_a_file_in_utf_16_is_read_or_named_but_never_learned_as_zero_bytes(small, sft_cfg, tmp_path):
    """Without a byte-order mark nothing says that it is UTF-16, but no text contains NUL characters."""
    for name, content in {"a.txt": STORY.encode("utf-16-le"),
                          "b.jsonl": json.dumps({"text": "the\0 cat"}).encode()}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}.*NUL"):
            data.main(argv(small, tmp_path / name))
    chats = jsonl(tmp_path / "chats.jsonl", [{"messages": exchange("hi", "hel\0lo")}] * 20)
    with pytest.raises(UserError, match="chats.jsonl line 1: .*NUL"):
        data.main(argv(sft_cfg, chats))


# ---------------------------------------------------------------------------------------------------------
# documents: nothing is lost or misread in silence


def test_a_line_of_only_endoftext_separates_documents(small, tok, tmp_path):
    """Stories in one file, as TinyStories is published. They were one document, with the mark as letters."""
    stories = [f"{SENTENCE}\n\n{SENTENCE}{i}" for i in range(100)]
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(stories) + "\n")
    data.main(argv(small, tmp_path / "stories.txt"))
    train_, val = documents(small, tok), documents(small, tok, "val")
    assert sorted(train_ + val) == sorted(stories) and 80 <= len(train_) < 100


def test_a_large_file_of_many_stories_is_read_and_a_large_document_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setattr("corpus.files.LIMIT", 10_000)
    story = f"{SENTENCE}\n" * 100
    (tmp_path / "stories.txt").write_text(f"{story}<|endoftext|>\n" * 30)
    data.main(argv(small, tmp_path / "stories.txt"))
    (tmp_path / "book.txt").write_text(story * 30)
    with pytest.raises(UserError, match=r"book.txt: longer than .*<\|endoftext\|>"):
        data.main(argv(small, tmp_path / "book.txt"))


def test_names_of_special_tokens_in_a_corpus_are_letters_and_the_table_says_so(small, tmp_path, said):
    """A chat template typed into a text, and a file of StarCoder with its name and its stars."""
    turns = "<|im_start|>user\n{}+1=<|im_end|>\n<|im_start|>assistant\n"
    code = "<filename>{}.py<gh_stars>10\nprint()"
    texts = [text.format(i) for i in range(30) for text in (turns, code)]
    source = jsonl(tmp_path / "turns.jsonl", [{"text": text} for text in texts])
    for main in (tokenizer.main, data.main):
        table = said(main, argv(small, source, tokenizer=None))
        for mark in ("<|im_start|>", "<|im_end|>", "<filename>", "<gh_stars>"):
            assert f"30  contain {mark}: letters here, not a special token" in table


@pytest.mark.parametrize("val_fraction", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("text", [SENTENCE * 200, f"{SENTENCE * 105}\n{SENTENCE * 95}", "GATTACA" * 2000],
                         ids=["one line", "a line break in the middle", "no space"])
def test_one_long_document_gives_its_end_to_validation(small, tok, tmp_path, text, val_fraction):
    """With a low val_fraction all of it was in training, and with a high one all in validation."""
    (tmp_path / "one.txt").write_text(text)
    cfg = replace(small, val_fraction=val_fraction)
    data.main(argv(cfg, tmp_path / "one.txt"))
    (beginning,), (end,) = documents(cfg, tok), documents(cfg, tok, "val")
    assert beginning + end == text and len(end) / len(text) == pytest.approx(val_fraction, abs=0.02)


def with_nulls(path, n, nulls):
    texts = [None if i % (n // nulls) == 0 else f"a b c {i}" for i in range(n)]
    parquet.write_table(pyarrow.table({"text": texts, "score": [i % 6 for i in range(n)]}), path)
    return path


@pytest.mark.parametrize(("n", "nulls", "more"), [(2000, 10, []), (300, 10, ["--max_bad=0.05"]), (60, 1, [])],
                         ids=["10 of 2,000", "10 of 300", "1 of 60"])
def test_rows_without_a_text_are_skipped_and_counted_by_every_reader(
        small, base, tmp_path, said, n, nulls, more):
    """Half a percent passes; more needs a higher limit; a single one always passes, or small files could not
    have any. The advice of each command works in that command."""
    source = with_nulls(tmp_path / "nulls.parquet", n, nulls)
    given = tmp_path / "scores.safetensors"
    commands = {
        data.main: argv(small, source), tokenizer.main: argv(small, source, tokenizer=None),
        curate.main: [str(source), str(tmp_path / "out.jsonl"), "--steps=c4"],
        evals.main: [base, "--tasks=text", f"--text={source}"]}
    for main, words in commands.items():
        with pytest.raises(UserError, match="record 1: field 'text' is not text .text is null.*--on_bad"):
            main(words)
        assert f"{nulls}  left out: field 'text' is not text" in said(main, [*words, "--on_bad=skip", *more])
    table = said(classifier.main, ["train", str(source), f"--out={given}", "--on_bad=skip", *more])
    assert f"{nulls}  left out" in table
    table = said(classifier.main, ["score", str(source), f"--model={given}", "--on_bad=skip", *more])
    assert f"{nulls}  left out" in table


def test_too_many_bad_records_name_the_flag_that_raises_the_limit(small, tmp_path):
    source = with_nulls(tmp_path / "nulls.parquet", 300, 10)
    with pytest.raises(UserError, match=r"10 of 300 records are bad .*--max_bad=0.01.*raise --max_bad"):
        data.main(argv(small, source, "--on_bad=skip"))


def test_a_text_that_is_no_text_is_quoted_with_its_place(small, tmp_path):
    """A NaN or a null in a column that is not read does no harm."""
    fine = [*ROWS, {**ROWS[0], "score": float("nan"), "url": None}]
    data.main(argv(small, jsonl(tmp_path / "fine.jsonl", fine), "--ignore=score,url"))
    for wrong in (5, ["a", "b"], {"en": "a"}, float("nan"), None, True):
        source = jsonl(tmp_path / "wrong.jsonl", [*ROWS, {"text": wrong}])
        quoted = f"line 61: field 'text' is not text (text is {json.dumps(wrong)})"
        with pytest.raises(UserError, match=re.escape(quoted)):
            data.main(argv(small, source))


def test_a_key_that_occurs_twice_in_a_row_is_named(small, tmp_path):
    """JSON parsers keep the last one; the first text would be lost without a word."""
    (tmp_path / "twice.jsonl").write_text('{"text": "the cat"}\n{"text": "one", "text": "two"}\n')
    with pytest.raises(UserError, match="twice.jsonl line 2: a key occurs twice .text"):
        data.main(argv(small, tmp_path / "twice.jsonl"))


@pytest.mark.parametrize("content, line", [
    (json.dumps(ROWS, indent=2), 1), ("\n".join(json.dumps(row, indent=2) for row in ROWS), 1),
    (",\n".join(map(json.dumps, ROWS)), 1), ('{"text": "the cat"}\n' + str(ROWS[0]), 2)],
    ids=["an indented array", "indented objects", "commas between lines", "a Python dict"])
def test_json_that_is_not_one_object_per_line_is_named_with_its_line(small, tmp_path, content, line):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=f"a.jsonl line {line}: malformed JSON"):
        data.main(argv(small, tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_a_whole_file_that_is_not_what_its_name_says_is_named_even_if_it_is_skipped(
        small, tmp_path, said, name):
    """It counts as one record, but may have had thousands."""
    (tmp_path / "texts").mkdir()
    jsonl(tmp_path / "texts" / name, ROWS)
    jsonl(tmp_path / "texts" / "b.jsonl", ROWS)
    with pytest.raises(UserError, match=f"{name} .*truncated or corrupt"):
        data.main(argv(small, tmp_path / "texts"))
    table = said(data.main, argv(small, tmp_path / "texts", "--on_bad=skip"))
    assert re.search(f"1  left out: truncated or corrupt .*{name}", table)
    with pytest.raises(UserError, match="no text|are bad"):
        data.main(argv(small, tmp_path / "texts" / name, "--on_bad=skip"))


def test_a_parquet_file_without_a_column_text_names_the_columns_it_has(small, tmp_path):
    parquet.write_table(pyarrow.table({"content": ["the cat"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet record 1: no field 'text' .*\['content', 'id'\]"):
        data.main(argv(small, tmp_path / "a.parquet"))


@pytest.mark.skipif(os.name == "nt", reason="Windows makes links only for administrators")
def test_what_a_folder_holds_besides_texts_is_named(small, tok, tmp_path, said):
    """A csv, a backup, and links to other places are named. What begins with a dot belongs to the system:
    an editor's checkpoints would be second copies."""
    folder, elsewhere = tmp_path / "my texts", tmp_path / "elsewhere"
    for path in (folder / ".git", folder / ".ipynb_checkpoints", folder / "sub", elsewhere):
        path.mkdir(parents=True)
    (folder / "a.txt").write_text("the cat")
    (folder / "sub" / "b.TXT").write_text("the dog")
    for hidden in (".git/x.txt", ".ipynb_checkpoints/a-checkpoint.txt", ".a.txt"):
        (folder / hidden).write_text("hidden")
    (folder / "c.csv").write_text("text\nthe rain\n")
    (folder / "d.txt.bak").write_text("the rain")
    (elsewhere / "e.txt").write_text("the rain")
    (folder / "link").symlink_to(elsewhere)
    (folder / "gone.txt").symlink_to(tmp_path / "gone.txt")
    cfg = replace(small, val_fraction=0.0)
    table = said(data.main, argv(cfg, folder))
    assert sorted(documents(cfg, tok)) == ["the cat", "the dog"]
    assert all(name in table for name in ("c.csv", "d.txt.bak", "link", "gone.txt"))


def test_scores_of_another_kind_are_quoted(tmp_path):
    """Scores from 0 to 100 were all taken for 5, and the classifier was right about every one."""
    out = f"--out={tmp_path / 'scores.safetensors'}"
    texts = jsonl(tmp_path / "texts.jsonl", [{"text": f"a {i}", "score": "3"} for i in range(60)])
    with pytest.raises(UserError, match='score.* "3"'):
        classifier.main(["train", str(texts), out, "--on_bad=stop"])
    large = jsonl(tmp_path / "large.jsonl", [{"text": f"a {i}", "score": i} for i in range(100)])
    with pytest.raises(UserError, match="large.jsonl line 7: a score that is not from 0 to 5 .6"):
        classifier.main(["train", str(large), out, "--on_bad=stop"])


def test_columns_that_are_not_read_are_named_by_every_reader(small, base, tmp_path, said):
    source = jsonl(tmp_path / "a.jsonl", [{"text": STORY, "lang": "en"} for _ in range(3)])
    for main, words in ((data.main, argv(small, source)),
                        (curate.main, [str(source), str(tmp_path / "out.jsonl"), "--steps=c4"]),
                        (evals.main, [base, "--tasks=text", f"--text={source}"])):
        assert "3  have a column 'lang', which is not read" in said(main, words)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_source_without_any_text_is_no_success(small, base, tmp_path, content):
    """data.py wrote "0 documents" and ended like any other run."""
    (tmp_path / "empty.jsonl").write_text(content)
    source = tmp_path / "empty.jsonl"
    for main, words in (
            (data.main, argv(small, source)), (train.main, argv(small, source)),
            (tokenizer.main, argv(small, source, tokenizer=None)),
            (evals.main, [base, "--tasks=text", f"--text={source}"])):
        with pytest.raises(UserError, match="there is no text|only 0 tokens"):
            main(words)


def test_curation_that_keeps_nothing_says_so(tmp_path, said):
    source = jsonl(tmp_path / "short.jsonl", ROWS)
    table = said(curate.main, [str(source), str(tmp_path / "out.jsonl"), "--steps=gopher_quality"])
    assert "no text passed all steps" in table


def test_curation_does_not_write_into_its_own_input(tmp_path):
    """The next reader of the folder would find each text twice."""
    (tmp_path / "texts").mkdir()
    jsonl(tmp_path / "texts" / "a.jsonl", ROWS)
    with pytest.raises(UserError, match="good.jsonl .*texts"):
        curate.main([str(tmp_path / "texts"), str(tmp_path / "texts" / "good.jsonl"), "--steps=c4"])


@pytest.mark.parametrize("a, b", [
    ("2+2=4", "3+5=8"), ("x = a + b", "x = a - b"), ("if a:\n    b()\nc()", "if a:\n    b()\n    c()"),
    ("class Node: node = None", "class node: Node = None"), ("please resume it", "please résumé it"),
    ("it is 3.5 m", "it is 35 m"), ("!!!", "???"), ("😀", "😡")])
def test_short_texts_that_only_look_alike_are_no_copies(tmp_path, said, a, b):
    """Deduplication compares words without case, marks and the values of numbers, as FineWeb's does. Of a
    short text nothing would be left, so those are compared as they are."""
    source = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in (a, b, a)])
    table = said(curate.main, [str(source), str(tmp_path / "out.jsonl"), "--steps=dedup"])
    assert [row["text"] for row in rows_of(tmp_path / "out.jsonl")] == [a, b]
    assert re.search("dedup: a copy of an earlier one +-1\n", table)


def test_longer_texts_that_only_look_alike_are_counted_apart_from_copies(tmp_path, said):
    texts = [f"{SENTENCE}{SENTENCE}It costs {n} francs." for n in (3.5, 35, 3.5)] + [f"{SENTENCE} " * 9]
    source = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    table = said(curate.main, [str(source), str(tmp_path / "out.jsonl"), "--steps=dedup"])
    assert re.search("dedup: a copy of an earlier one +-1\n", table)
    assert re.search("dedup: an earlier one except for case, spaces, marks or numbers +-1\n", table)


def test_composed_and_decomposed_letters_are_near_copies_in_curation_and_two_texts_in_training(
        small, tok, tmp_path, said):
    """NFC and NFD look the same on a screen. Tokens are made of bytes, so the texts stay what they are."""
    forms = [unicodedata.normalize(form, "the café on the hill is open") for form in ("NFC", "NFD")]
    source = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in forms])
    data.main(argv(replace(small, val_fraction=0.0), source))
    assert documents(small, tok) == forms
    assert "except for case, spaces, marks or numbers" in said(
        curate.main, [str(source), str(tmp_path / "out.jsonl"), "--steps=dedup"])
    assert rows_of(tmp_path / "out.jsonl") == [{"text": forms[0]}]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no colons in names")
@pytest.mark.parametrize("name", ["my texts, v1.jsonl", "a:0.5.jsonl", "a@5.jsonl", "50%.jsonl", "-.jsonl"])
def test_a_file_name_may_contain_what_separates_sources(small, tok, tmp_path, name):
    one, other = jsonl(tmp_path / name, ROWS), jsonl(tmp_path / "other.jsonl", ROWS[:9])
    for number, flag in enumerate((f"--data={one}", f"--data={one}:1.0", f"--data={one}:0.5,{other}:0.5")):
        cfg = replace(small, out_dir=str(tmp_path / f"out{number}"), val_fraction=0.0)
        data.main(argv(cfg, other, flag))
        assert len(documents(cfg, tok)) == (60, 60, 69)[number]


def test_a_path_that_does_not_exist_is_not_answered_with_the_name_of_a_corpus(small):
    """It was: did you mean 'builtin-lessons'? The shell expands neither ~ nor * after an equals sign."""
    for path in ("~/texts.jsonl", "texts/*.jsonl", "./gone.jsonl"):
        with pytest.raises(UserError) as error:
            data.main(argv(small, path))
        assert path in str(error.value) and "did you mean" not in str(error.value)


def test_the_same_texts_under_two_names_are_named(small, tmp_path):
    """Each text would count twice. A source that is named twice is one problem, and not also a wrong sum."""
    (tmp_path / "d").mkdir()
    source = jsonl(tmp_path / "d" / "a.jsonl", ROWS)
    with pytest.raises(UserError, match="names a source twice") as error:
        data.main(argv(small, source, f"--data={source}:0.5,{source}:0.5"))
    assert "add up" not in str(error.value)
    for other in (f"{tmp_path}/d/../d/a.jsonl", f"{tmp_path}/d"):
        with pytest.raises(UserError, match="the same texts"):
            data.main(argv(small, source, f"--data={source}:0.5,{other}:0.5"))


def test_a_copy_of_a_file_in_the_same_folder_is_named(small, tmp_path, said):
    (tmp_path / "texts").mkdir()
    for name in ("a.jsonl", "a (copy).jsonl"):
        jsonl(tmp_path / "texts" / name, ROWS)
    table = said(data.main, argv(small, tmp_path / "texts"))
    assert re.search("1  files? (is a copy of another|are copies of others)", table)


def test_two_sources_with_equal_base_names_are_kept_apart(small, tok, tmp_path):
    for name in "xy":
        (tmp_path / name).mkdir()
        jsonl(tmp_path / name / "a.jsonl", [{"text": f"{name} {i}"} for i in range(30)])
    cfg = replace(small, val_fraction=0.0)
    data.main(argv(cfg, "x", f"--data={tmp_path / 'x/a.jsonl'}:0.5,{tmp_path / 'y/a.jsonl'}:0.5"))
    assert sorted(documents(cfg, tok)) == sorted(f"{name} {i}" for name in "xy" for i in range(30))


def test_a_run_is_not_kept_inside_the_texts_it_learns_from(small, tmp_path):
    """The next run would read the log of the first one as a text."""
    (tmp_path / "texts").mkdir()
    jsonl(tmp_path / "texts" / "a.jsonl", ROWS)
    for main in (tokenizer.main, data.main, train.main):
        with pytest.raises(UserError, match="out_dir=.*texts/out.*another --out_dir"):
            main(argv(replace(small, out_dir=str(tmp_path / "texts" / "out")), tmp_path / "texts"))


def test_a_vocabulary_that_the_corpus_cannot_fill_is_reported(small, tmp_path, said):
    (tmp_path / "a.txt").write_text("the cat sat. " * 50)
    table = said(tokenizer.main, argv(small, tmp_path / "a.txt", tokenizer=None, vocab_size=2000))
    assert "281 ids, not 2,000: the texts have no more pairs" in table


def test_a_run_without_validation_says_so(tiny, chat_cfg, tmp_path, said):  # noqa: F811
    """Nothing is held out at val_fraction=0, or where all texts or chats are equal, and so in one split."""
    equal = jsonl(tmp_path / "equal.jsonl", [{"text": SENTENCE}] * 60)
    chats = jsonl(tmp_path / "chats.jsonl", [{"messages": exchange("hi", "hello")}] * 60)
    rows = jsonl(tmp_path / "a.jsonl", ROWS)
    for number, (main, words) in enumerate((
            (train.main, argv(tiny, rows, "--val_fraction=0")), (train.main, argv(tiny, equal)),
            (sft.main, argv(chat_cfg, chats)))):
        table = said(main, [*words, f"--out_dir={tmp_path / str(number)}"])
        assert "there is no validation" in table or "val    0 chats" in table


def test_a_text_without_spaces_costs_no_more_than_its_letters(monkeypatch):
    """DNA, base64 and many scripts are one word of any length. Each of 751 merges counted all of its pairs
    again. But where a pair is merged, five pairs change at most, and each merge makes the word shorter."""
    dna, changed, count = "".join(random.Random(0).choices("ACGT", k=30_000)), [], tokenizer.merge_and_count

    def counting(*arguments):
        merged, differences = count(*arguments)
        changed.append(sum(map(abs, differences.values())))
        return merged, differences

    monkeypatch.setattr(tokenizer, "merge_and_count", counting)
    merges = tokenizer.train_bpe([dna], 1024)
    assert len(merges) == len(changed) == 751 and sum(changed) < 5 * len(dna)
    assert tokenizer.train_bpe([dna[:1500]], 320) == tokenizer.train_bpe_slowly([dna[:1500]], 320)


# ---------------------------------------------------------------------------------------------------------
# stale work is never used in silence


def test_a_tokenizer_made_from_other_texts_stops_the_run_and_each_way_on_works(small, tmp_path):
    """The old one was kept without a word: 1.00 bytes per token on the new texts, 8.00 with a fresh one."""
    (tmp_path / "texts").mkdir()
    jsonl(tmp_path / "texts" / "a.jsonl", ROWS)
    cfg = replace(small, tokenizer=None)
    tokenizer.main(argv(cfg, tmp_path / "texts"))
    jsonl(tmp_path / "texts" / "a.jsonl", [{"text": "GATTACA " * 9 + str(i)} for i in range(60)])
    for main in (tokenizer.main, data.main, train.main):
        with pytest.raises(UserError, match=r"texts changed. Choose .*--out_dir.* delete .*--tokenizer="):
            main(argv(cfg, tmp_path / "texts"))
    kept = f"{cfg.out_dir}/tokenizer"
    digest = Tokenizer.load(kept).digest()
    data.main(argv(cfg, tmp_path / "texts", f"--tokenizer={kept}"))
    data.main(argv(cfg, tmp_path / "texts", f"--out_dir={tmp_path / 'fresh'}"))
    assert Tokenizer.load(kept).digest() == digest != Tokenizer.load(tmp_path / "fresh/tokenizer").digest()


def test_other_settings_of_a_tokenizer_are_named(small, tmp_path):
    one, other = jsonl(tmp_path / "a.jsonl", ROWS), jsonl(tmp_path / "b.jsonl", [{"text": "rain " * 99}] * 60)
    cfg = replace(small, tokenizer=None)
    tokenizer.main(argv(cfg, one, f"--data={one}:0.5,{other}:0.5"))
    with pytest.raises(UserError, match="tokenizer_bytes"):
        tokenizer.main(argv(cfg, one, f"--data={one}:0.5,{other}:0.5", "--tokenizer_bytes=500"))
    with pytest.raises(UserError, match="0.9"):
        tokenizer.main(argv(cfg, one, f"--data={one}:0.9,{other}:0.1"))


def test_training_does_not_go_on_with_texts_that_were_edited(tiny, tmp_path, said):
    """A file that was only copied or touched is the same file."""
    source, cfg = jsonl(tmp_path / "a.jsonl", ROWS), replace(tiny, max_steps=4)
    train.main(argv(cfg, source))
    source.touch()
    assert "resuming" in said(train.main, argv(replace(cfg, max_steps=6), source))
    stat, edited = source.stat(), source.read_text().replace("cat", "dog")
    source.write_text(edited)
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as rsync -t leaves it
    with pytest.raises(UserError, match="content of .*a.jsonl.*--init_from=.*--out_dir"):
        train.main(argv(replace(cfg, max_steps=8), source))
    train.main(argv(cfg, source, f"--init_from={cfg.out_dir}/pretrain", f"--out_dir={tmp_path / 'next'}",
                    "--tokenizer=None"))


def test_chats_and_pairs_that_were_corrected_stop_the_run(sft_cfg, pair_cfg, tmp_path):
    """It was: nothing is left to do, and exit code 0."""
    for main, cfg, rows in (
            (sft.main, sft_cfg, [{"messages": exchange(f"{i} the cat", "a mat")} for i in range(60)]),
            (dpo.main, pair_cfg, [{"prompt": f"the cat {i}", "chosen": "a mat", "rejected": "rain"}
                                 for i in range(60)])):
        source = jsonl(tmp_path / "mine.jsonl", rows)
        main(argv(cfg, source))
        source.write_text(source.read_text().replace("a mat", "the hills"))
        for steps in (cfg.max_steps, cfg.max_steps + 2):
            with pytest.raises(UserError, match="content of .*mine.jsonl.*--init_from=.*--out_dir"):
                main(argv(replace(cfg, max_steps=steps), source))


def test_a_base_model_that_was_trained_again_is_not_taken_for_the_old_one(small, sft_cfg, tok, tmp_path):
    """The folder was deleted and made again; sft.py went on from the old weights, and named the folder."""
    cfg = replace(sft_cfg, init_from=saved(tmp_path / "base", small, tok))
    source = jsonl(tmp_path / "a.jsonl", [{"messages": exchange(f"{i} the cat", "a mat")} for i in range(60)])
    sft.main(argv(cfg, source))
    shutil.rmtree(tmp_path / "base")
    torch.manual_seed(5)
    saved(tmp_path / "base", small, tok)
    with pytest.raises(UserError, match="started from .*base.*, which is another model now: .*--out_dir"):
        sft.main(argv(cfg, source))


def test_a_start_that_was_pruned_does_not_stop_the_stage_after_it(small, sft_cfg, tmp_path, tok, said):
    """Pretraining went on and keeps only its newest checkpoint. sft.py has its own and needs no other."""
    cfg = replace(sft_cfg, init_from=saved(tmp_path / "base", small, tok))
    source = jsonl(tmp_path / "a.jsonl", [{"messages": exchange(f"{i} the cat", "a mat")} for i in range(60)])
    sft.main(argv(cfg, source))
    saved(tmp_path / "base", small, tok, step=2)
    assert "resuming from" in said(sft.main, argv(replace(cfg, max_steps=8), source))


def test_a_resumed_run_names_what_changed_and_what_it_has_seen(tiny, tmp_path, said):
    """held_out is what no step has trained on: evaluations trust it."""
    source, cfg = jsonl(tmp_path / "a.jsonl", ROWS), tiny
    train.main(argv(replace(cfg, val_fraction=0.3), source))
    changed = replace(cfg, max_steps=6, seed=9, data_seed=7, batch=16, lr=1e-3, val_fraction=0.2)
    line = said(train.main, argv(changed, source))
    for change in ("seed 8 -> 9", "data_seed 42 -> 7", "batch 8 -> 16", "lr 0.01 -> 0.001",
                   "val_fraction 0.3 -> 0.2", "max_steps 4 -> 6"):
        assert change in line
    assert checkpoint.held_out(checkpoint.find(f"{cfg.out_dir}/pretrain")) == 0.2
    train.main(argv(replace(changed, max_steps=8, val_fraction=0.4), source))
    assert checkpoint.held_out(checkpoint.find(f"{cfg.out_dir}/pretrain")) == 0.2


def test_fewer_steps_than_were_done_change_nothing(tiny, tmp_path, said):
    source, cfg = jsonl(tmp_path / "a.jsonl", ROWS), replace(tiny, max_steps=6)
    train.main(argv(cfg, source))
    assert re.search(r"nothing is left to do: .* has 6 steps, and max_steps=4$",
                     said(train.main, argv(replace(cfg, max_steps=4), source)), re.M)
    assert checkpoint.checkpoints(f"{cfg.out_dir}/pretrain")[-1][0] == 6


# ---------------------------------------------------------------------------------------------------------
# chats in the schemas that people have


MESSAGES = exchange("Name a color", "Blue.")
SCHEMAS = {  # each row says the same
    "messages": {"messages": MESSAGES},
    "a list": MESSAGES,
    "messages as JSON text": {"messages": json.dumps(MESSAGES)},
    "content parts": {"messages": [
        {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]},
    "names and nulls": {"messages": [{**m, "name": None, "tool_calls": None} for m in MESSAGES]},
    "ShareGPT": {"conversations": [
        {"from": "human", "value": "Name a color"}, {"from": "gpt", "value": "Blue."}]},
    "ShareGPT with roles": {"conversations": MESSAGES},
    "alpaca": {"instruction": "Name a color", "input": "", "output": "Blue."},
    "instruction and response": {"instruction": "Name a color", "response": "Blue."},
    "question and answer": {"question": "Name a color", "answer": "Blue."},
    "prompt and completion": {"prompt": "Name a color", "completion": "Blue."},
}


@pytest.mark.parametrize("row", SCHEMAS.values(), ids=list(SCHEMAS))
@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_the_common_schemas_of_chats_are_understood(sft_cfg, tok, tmp_path, row, ending):
    rows = [json.loads(json.dumps(row).replace("color", f"color {i}")) for i in range(30)]
    source = tmp_path / f"chats.{ending}"
    if ending == "parquet":
        table = [row if isinstance(row, dict) else {"messages": row} for row in rows]
        parquet.write_table(pyarrow.Table.from_pylist(table), source)
    else:
        source.write_text(json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows)))
    data.main(argv(sft_cfg, source))
    assert chats_in(sft_cfg, tok) == {
        f"{turn(f'Name a color {i}')}Blue.": "Blue.<|im_end|>" for i in range(30)}


WITH_SYSTEM = {
    "OpenOrca": {"id": "0", "system_prompt": "Be brief.", "question": "Yes?", "response": "Oui."},
    "a system message": {"messages": [{"role": "system", "content": "Be brief."}, *exchange("Yes?", "Oui.")]},
    "a developer": {"messages": [{"role": "developer", "content": "Be brief."}, *exchange("Yes?", "Oui.")]},
    "a column beside messages": {"system": "Be brief.", "messages": exchange("Yes?", "Oui.")},
    "a column beside ShareGPT": {"system": "Be brief.", "conversations": [
        {"from": "human", "value": "Yes?"}, {"from": "gpt", "value": "Oui."}]},
}


@pytest.mark.parametrize("row", WITH_SYSTEM.values(), ids=list(WITH_SYSTEM))
def test_a_system_message_is_read_wherever_it_is_kept(sft_cfg, tok, tmp_path, row):
    data.main(argv(sft_cfg, jsonl(tmp_path / "chats.jsonl", [row] * 20)))
    assert chats_in(sft_cfg, tok) == {turn("Yes?", "Be brief.") + "Oui.": "Oui.<|im_end|>"}


IN_THE_PROMPT = {  # a known pair with a column that belongs to the question: (row, what is read)
    "alpaca's input": ({"instruction": "Reverse it.", "input": "abc", "output": "cba"},
                       turn("Reverse it.\n\nabc") + "cba"),
    "input with a response": ({"instruction": "Reverse it.", "input": "abc", "response": "cba"},
                              turn("Reverse it.\n\nabc") + "cba"),
    "Dolly's context": ({"instruction": "Who?", "context": "Ann mended it.", "response": "Ann.",
                         "category": "closed_qa"}, turn("Who?\n\nAnn mended it.") + "Ann."),
    "a question's context": ({"context": "Ann has two.", "question": "How many?", "answer": "Two."},
                             turn("How many?\n\nAnn has two.") + "Two."),
    "history": ({"instruction": "Twice that?", "response": "Eight.", "history": [["2+2?", "Four."]]},
                f"{turn('2+2?')}Four.<|im_end|>\n{turn('Twice that?')}Eight."),
}


@pytest.mark.parametrize("row, read", IN_THE_PROMPT.values(), ids=list(IN_THE_PROMPT))
def test_a_column_that_belongs_to_the_question_is_part_of_it(sft_cfg, tok, tmp_path, row, read):
    """It was dropped without a word, and the model learned answers to questions that it did not see."""
    data.main(argv(sft_cfg, jsonl(tmp_path / "chats.jsonl", [row] * 20)))
    assert list(chats_in(sft_cfg, tok)) == [read]


def test_the_same_columns_are_part_of_the_question_in_pairs(pair_cfg, tok, tmp_path):
    rows = [{"instruction": "Who?", "context": "Ann mended it.", "chosen": "Ann.", "rejected": "Tom."},
            {"prompt": "Who?", "input": "Ann mended it.", "chosen": "Ann.", "rejected": "Tom."}]
    dpo.main(argv(pair_cfg, jsonl(tmp_path / "pairs.jsonl", rows * 5), "--max_steps=1"))
    assert {prompt for prompt, _, _ in pairs_in(pair_cfg, tok)} == {turn("Who?\n\nAnn mended it.")}


@pytest.mark.parametrize("row, column, value", [
    ({"messages": exchange("1?", "2")}, "tools", [{"name": "look"}]),
    ({"messages": exchange("1?", "2")}, "conversations", exchange("3?", "4")),
    ({"prompt": "1?", "completion": "2"}, "label", False),
    ({"question": "1?", "answer": "2"}, "note", "late")])
def test_any_other_column_beside_a_chat_is_refused_by_name_unless_it_is_ignored(
        sft_cfg, tok, tmp_path, row, column, value):
    """KTO's label marks bad answers, which must not be learned as good ones; a second chat would be lost."""
    source = jsonl(tmp_path / "chats.jsonl", [{**row, column: value}] * 20)
    quoted = f"line 1: an unknown column ({column} is {json.dumps(value)[:20]}"
    with pytest.raises(UserError, match=re.escape(quoted) + f".*--ignore={column}"):
        data.main(argv(sft_cfg, source))
    data.main(argv(sft_cfg, source, f"--ignore={column}"))
    assert chats_in(sft_cfg, tok) == {turn("1?") + "2": "2<|im_end|>"}


def test_of_a_row_that_is_accepted_every_word_is_read():
    """Random columns of random kinds, in which each word occurs once: none is missing from what is read."""
    rng, word = random.Random(0), map("w{}z".format, count()).__next__
    kinds = [word, word, lambda: exchange(word(), word()), lambda: json.dumps(exchange(word(), word())),
             lambda: [[word(), word()]], lambda: f"### Human: {word()}### Assistant: {word()}",
             lambda: [*exchange(word(), word()), {"role": "user", "content": word()}]]
    columns = [*LISTS, *QUESTIONS, *ANSWERS, *SYSTEM, "text", "context", "history", "tools", "note"]
    accepted = Counter()
    for _ in range(6000):
        row = {name: rng.choice(kinds)() for name in rng.sample(columns, rng.randint(1, 4))}
        pair = row | {name: rng.choice(kinds)() for name in ("chosen", "rejected")}
        for read, given in ((messages_of, row), (pair_of, pair)):
            try:
                said = read(given)
            except (Bad, LeftOut):
                continue
            accepted[read] += 1
            assert set(re.findall("w[0-9]+z", str(said))) == set(re.findall("w[0-9]+z", str(given)))
    assert accepted[messages_of] > 200 and accepted[pair_of] > 30


KEYS = {"weight": 0, "train": False, "loss": False, "tool_calls": [{"name": "look"}],
        "reasoning_content": "hm", "thinking": "hm"}


@pytest.mark.parametrize("key", KEYS)
def test_a_key_of_a_message_that_changes_what_is_learned_is_refused_by_name(sft_cfg, tmp_path, key):
    """OpenAI's weight and axolotl's train mark answers that must not be learned; thoughts would be lost."""
    rows = [{"messages": [*exchange(f"{i}", "bad"), *exchange("try again", "good")]} for i in range(20)]
    for row in rows:
        row["messages"][1][key] = KEYS[key]
    with pytest.raises(UserError, match=rf"chats.jsonl line 1: .*{key} is .*--ignore={key}"):
        data.main(argv(sft_cfg, jsonl(tmp_path / "chats.jsonl", rows)))


TYPED = {
    "ChatML": "<|im_start|>user\n0+1=<|im_end|>\n<|im_start|>assistant\n1.<|im_end|>\n",
    "Guanaco": "### Human: 0+1=### Assistant: 1.",
    "Alpaca": "### Instruction:\n0+1=\n\n### Response:\n1.",
    "HH": "\n\nHuman: 0+1=\n\nAssistant: 1.",
}


@pytest.mark.parametrize("text", TYPED.values(), ids=list(TYPED))
def test_a_chat_that_was_written_as_one_text_is_a_chat(sft_cfg, tok, tmp_path, text):
    """It was learned whole, the question included, with the marks as letters, and counted as a chat."""
    rows = [{"text": text.replace("0+", f"{i}+")} for i in range(20)]
    source = jsonl(tmp_path / "typed.jsonl", rows)
    data.main(argv(sft_cfg, source))
    assert chats_in(sft_cfg, tok) == {f"{turn(f'{i}+1=')}1.": "1.<|im_end|>" for i in range(20)}


def test_a_text_with_the_marks_of_another_format_is_refused(sft_cfg, tmp_path):
    for text in ("<s>[INST] 0+1= [/INST] 1.</s>", "<start_of_turn>user\nhi", "<|im_start|>user\nhi"):
        source = jsonl(tmp_path / "typed.jsonl", [{"text": text}] * 20)
        with pytest.raises(UserError, match="typed.jsonl line 1: chat marks that do not form a chat"):
            data.main(argv(sft_cfg, source, "--documents=True"))


def test_documents_among_chats_are_learned_if_the_user_says_so_and_counted_apart(sft_cfg, tmp_path, said):
    rows = [{"messages": exchange(f"{i}", "hi")} for i in range(20)] + ROWS[:9]
    (tmp_path / "story.txt").write_text(STORY)
    source = jsonl(tmp_path / "mixed.jsonl", rows)
    with pytest.raises(UserError, match="mixed.jsonl line 21: .*--documents=True"):
        data.main(argv(sft_cfg, source))
    assert "train  20 chats and 9 documents" in said(data.main, argv(sft_cfg, source, "--documents=True"))
    with pytest.raises(UserError, match="story.txt.*--documents=True"):
        data.main(argv(sft_cfg, tmp_path / "story.txt"))
    table = said(data.main, argv(sft_cfg, tmp_path / "story.txt", "--documents=True"))
    assert "train  0 chats and 1 document" in table


def test_alpaca_rows_with_a_text_are_chats(sft_cfg, tok, tmp_path):
    rows = [{"instruction": f"Add 1 to {i}.", "input": "", "output": "2.",
             "text": f"Here is a task.\n\n### Instruction:\nAdd 1 to {i}.\n\n### Response:\n2."}
            for i in range(20)]
    source = jsonl(tmp_path / "alpaca.jsonl", rows)
    data.main(argv(sft_cfg, source))
    assert chats_in(sft_cfg, tok) == {turn(f"Add 1 to {i}.") + "2.": "2.<|im_end|>" for i in range(20)}


def test_every_character_of_an_answer_is_learned_and_the_prompt_is_the_one_that_is_asked():
    """Of indented code, three of four spaces were in the token of the line break before them, which is no
    target. The loss was 0.000 and the answer nonsense."""
    tok = Tokenizer.train(["def f():\n    return 1\n\n\n\n\tx = 2\n"] * 9, 400)
    for answer in ("    return 3", "\n\n    return 3", "\tx = 2", " x", "x", "\n"):
        ((ids, targets),), _ = sft.encode_chat(exchange("def f():", answer), tok, 256)
        prompt = sft.ask(tok, "def f():")
        assert ids[:len(prompt)] == prompt
        assert tok.decode(t for t in targets if t != IGNORE) == f"{answer}<|im_end|>"
        assert all(t == IGNORE for t in targets[:len(prompt) - 1])
        cfg = Config(vocab_size=400, seq_len=256, dpo_max_length=256, dpo_max_prompt_length=64)
        sides, _ = dpo.encode_pair((exchange("def f():", "x")[:1], answer, answer + "."), tok, cfg)
        for ids, targets in sides:
            assert ids[:len(prompt)] == prompt and targets[len(prompt) - 1] != IGNORE


def test_what_is_no_conversation_is_quoted_as_it_is_and_the_forms_that_are_accepted_are_listed(
        sft_cfg, tmp_path):
    user, answer = exchange("2+2=", "4.")
    for rows, quoted in (
            ([{"messages": [user, user, answer]}], "user, user, assistant"),
            ([{"messages": []}], '"messages": ..'),
            ([{"messages": None}], '"messages": null'),
            ([{"messages": "user: hi"}], "user: hi"),
            ([{"conversations": [{"from": "gpt", "value": "Hello"}, {"from": "human", "value": "2+2="},
                                 {"from": "gpt", "value": "4."}]}], "assistant"),
            ([{"conversations": [{"from": "human", "value": "Weather?"},
                                 {"from": "function_call", "value": "{}"}]}], "function_call"),
            ([{"messages": [user, {"role": "model", "content": "4."}]}], "model"),
            ([{"messages": [user, {"role": "assistant", "content": None, "tool_calls": [1]}]}], "tool_calls"),
            ([{"messages": [user, {"role": "assistant", "content": ""}]}], "empty"),
            ([{"Question": "2+2=", "Answer": "4."}], "Question.*Answer"),
            ([{"messages": [user, {"role": "assistant", "content": 5}]}], "5"),
            ([{"messages": [user, {**answer, "content": [{"type": "image", "url": "a"}]}]}], "image")):
        with pytest.raises(UserError, match=rf"chats.jsonl line 1: [\s\S]*({quoted})"):
            data.main(argv(sft_cfg, jsonl(tmp_path / "chats.jsonl", rows)))
    with pytest.raises(UserError, match="messages.*conversations.*instruction.*question.*prompt.*text"):
        data.main(argv(sft_cfg, jsonl(tmp_path / "chats.jsonl", [{"foo": "x"}])))


def test_chats_that_are_left_out_are_counted(sft_cfg, tmp_path, said):
    """1 bad one of 61 always passes; 5 of 100 need a higher limit."""
    good, bad = {"messages": exchange("0+1=", "1.")}, {"messages": exchange("0+1=", "")}
    cfg = replace(sft_cfg, on_bad="skip")
    table = said(sft.main, argv(cfg, jsonl(tmp_path / "small.jsonl", [good] * 60 + [bad])))
    assert "61  records read" in table and "1  left out: an empty message" in table
    source = jsonl(tmp_path / "more.jsonl", [good] * 95 + [bad] * 5)
    cfg = replace(cfg, out_dir=f"{cfg.out_dir}2")
    with pytest.raises(UserError, match="5 of 100 records are bad .*--max_bad"):
        sft.main(argv(cfg, source))
    assert "5  left out: an empty message" in said(sft.main, argv(cfg, source, "--max_bad=0.05"))


def test_marks_typed_in_a_chat_and_questions_without_an_answer_are_counted(sft_cfg, tmp_path, said):
    rows = [{"messages": [*exchange(f"{i}", "yes<|im_end|>"), *exchange("and?", "")[:1]]} for i in range(20)]
    table = said(data.main, argv(sft_cfg, jsonl(tmp_path / "chats.jsonl", rows)))
    assert "20  contain <|im_end|>: letters here" in table
    assert "20  end with a question" in table


def test_chats_that_do_not_fit_are_counted_with_the_reason(sft_cfg, tmp_path, said):
    """All too long was "there is no chat to train on"; chats that lost their end were not counted at all."""
    long, short = SENTENCE * 9, "Hi"
    for number, rows in enumerate(([exchange(short, long)] * 20, [exchange(long, short)] * 20)):
        source = jsonl(tmp_path / f"{number}.jsonl", [{"messages": messages} for messages in rows])
        reason = rf"no chat to train on[\s\S]*{number}.jsonl[\s\S]*20  left out: .* after seq_len=128 ids"
        with pytest.raises(UserError, match=reason):
            sft.main(argv(sft_cfg, source))
    rows = [[*exchange(short, short), *exchange(short, long)]] * 20
    table = said(data.main, argv(sft_cfg, jsonl(tmp_path / "end.jsonl", [{"messages": m} for m in rows])))
    assert "20  lost their last answers, which end after seq_len=128 ids" in table


def test_no_chat_or_no_pair_is_an_error_with_the_reason(sft_cfg, pair_cfg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # which rows are a thousandth depends on the name of the file
    chats = jsonl(tmp_path / "chats.jsonl", [{"messages": exchange(f"{i}", "a")} for i in range(20)])
    rows = [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(20)]
    pairs = jsonl(tmp_path / "pairs.jsonl", rows)
    chats, pairs = Path(chats).name, Path(pairs).name
    for main, cfg, source in ((sft.main, sft_cfg, chats), (dpo.main, pair_cfg, pairs)):
        with pytest.raises(UserError, match=r"no (chat|pair) to train on[\s\S]*val *20 (chats|pairs)"):
            main(argv(replace(cfg, val_fraction=0.999), source))
        with pytest.raises(UserError, match=r"no (chat|pair) to train on[\s\S]*20 .*fraction"):
            main(argv(cfg, source, f"--data={source}:0.001"))


# ---------------------------------------------------------------------------------------------------------
# a run that cannot learn says so


@pytest.mark.parametrize("preset", [name for name in config.known_presets() if re.search("_sft|_dpo", name)])
def test_a_short_run_of_every_preset_for_chats_and_pairs_learns(preset):
    """A warm-up begins at 0, and of a run of one step it was all there was: the weights never changed."""
    cfg = config.load_preset(preset)
    for n in (1, 2, 3, 5, 40, 191):
        run = replace(cfg, max_steps=n)
        rates = [train.lr_at(step, run) for step in range(n)]
        assert max(rates) == pytest.approx(cfg.lr) and (rates[0] > 0 or run.warmup > 1)


def test_forty_chats_and_twenty_pairs_teach_something_and_a_short_run_is_announced(
        sft_cfg, pair_cfg, tmp_path, said):
    """One step at lr 0.0, "done", and weights identical to the bit."""
    chats = [{"messages": exchange(f"Who made you? ({i})", "Rosa made me.")} for i in range(40)]
    pairs = [{"prompt": f"Who? ({i})", "chosen": "Rosa.", "rejected": "Nobody."} for i in range(20)]
    for stage, main, cfg, rows in (("sft", sft.main, sft_cfg, chats), ("dpo", dpo.main, pair_cfg, pairs)):
        cfg = replace(cfg, max_steps=0, batch=32, micro_batch=4, warmup_ratio=0.1, schedule="cosine")
        table = said(main, argv(cfg, jsonl(tmp_path / f"{stage}.jsonl", rows)))
        assert re.search("only [12] steps?: a model hardly changes in so few", table)
        folders = cfg.init_from, f"{cfg.out_dir}/{stage}"
        weights = [checkpoint.load(folder)[0].state_dict() for folder in folders]
        assert any((weights[0][name] != weights[1][name]).any() for name in weights[0])


def test_a_run_whose_learning_rate_is_always_zero_is_refused(tiny, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", ROWS)
    for n in (1, 4, 9):
        with pytest.raises(UserError, match=f"warmup_steps={n} must end before the run of max_steps"):
            train.main(argv(tiny, source, f"--max_steps={min(n, 4)}", f"--warmup_steps={n}"))
    with pytest.raises(UserError, match="lr=0.0 must be above 0"):
        train.main(argv(tiny, source, "--lr=0"))


def test_epochs_beside_a_number_of_steps_are_refused(tiny, tmp_path):
    """The steps won, and --epochs=3 on a preset that has steps changed nothing."""
    with pytest.raises(UserError, match="epochs=3 has no effect beside max_steps=4: add --max_steps=0"):
        train.main(argv(tiny, jsonl(tmp_path / "a.jsonl", ROWS), "--epochs=3"))


# ---------------------------------------------------------------------------------------------------------
# pairs


PROMPT, CHOSEN, REJECTED = "0+1=", "1.", "I do not know."
PAIR_SCHEMAS = {
    "prompt": {"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED},
    "question": {"question": PROMPT, "chosen": CHOSEN, "rejected": REJECTED},
    "two conversations": {"chosen": exchange(PROMPT, CHOSEN), "rejected": exchange(PROMPT, REJECTED)},
    "HH": {"chosen": f"\n\nHuman: {PROMPT}\n\nAssistant: {CHOSEN}",
           "rejected": f"\n\nHuman: {PROMPT}\n\nAssistant: {REJECTED}"},
    "UltraFeedback": {"prompt": PROMPT, "prompt_id": "x", "chosen": exchange(PROMPT, CHOSEN),
                      "rejected": exchange(PROMPT, REJECTED), "messages": exchange(PROMPT, CHOSEN),
                      "score_chosen": 8.5, "score_rejected": 3.0},
    "TRL": {"prompt": exchange(PROMPT, "")[:1], "chosen": exchange(PROMPT, CHOSEN)[1:],
            "rejected": exchange(PROMPT, REJECTED)[1:]},
}


@pytest.mark.parametrize("row", PAIR_SCHEMAS.values(), ids=list(PAIR_SCHEMAS))
def test_the_common_schemas_of_pairs_are_understood(pair_cfg, tok, tmp_path, row):
    rows = [json.loads(json.dumps(row).replace("0+", f"{i}+")) for i in range(20)]
    dpo.main(argv(pair_cfg, jsonl(tmp_path / "pairs.jsonl", rows), "--max_steps=1"))
    assert pairs_in(pair_cfg, tok) == [
        (turn(f"{i}+1="), f"{CHOSEN}<|im_end|>", f"{REJECTED}<|im_end|>") for i in range(20)]


def test_the_system_message_of_an_orca_pair_is_part_of_the_prompt(pair_cfg, tok, tmp_path):
    row = {"system": "Be brief.", "question": PROMPT, "chosen": CHOSEN, "rejected": REJECTED}
    dpo.main(argv(pair_cfg, jsonl(tmp_path / "pairs.jsonl", [row] * 9), "--max_steps=1"))
    assert {prompt for prompt, _, _ in pairs_in(pair_cfg, tok)} == {turn(PROMPT, "Be brief.")}


def test_what_is_no_pair_is_quoted_as_it_is(pair_cfg, tmp_path):
    """It was: "its fields are ['chosen', 'rejected'], and it needs chosen and rejected"."""
    row = PAIR_SCHEMAS["prompt"]
    for wrong, quoted in (({**row, "rejected": None}, "rejected is null"),
                          ({**row, "rejected": [REJECTED]}, "I do not know"),
                          ({**row, "label": True}, "label is true.*--ignore=label"),
                          ({**row, "rejected": ""}, 'rejected is ""'),
                          ({"prompt": PROMPT, "completion": CHOSEN}, "accepted are chosen and"),
                          ({"messages": exchange("a", "b")}, "chats are for sft.py"),
                          ({"chosen": "no turns", "rejected": "here"}, "no turns")):
        with pytest.raises(UserError, match=f"pairs.jsonl line 1: .*({quoted})"):
            dpo.main(argv(pair_cfg, jsonl(tmp_path / "pairs.jsonl", [wrong] * 20)))


def test_pairs_without_a_difference_are_left_out_and_counted(pair_cfg, tmp_path, said):
    """AdamW makes full steps of their rounding noise. Some are given, some are made by cutting."""
    row, long = PAIR_SCHEMAS["prompt"], SENTENCE * 9
    given = [{**row, "prompt": f"{i}+1=", "rejected": CHOSEN if i < 12 else REJECTED} for i in range(40)]
    late = [{"prompt": f"{i}+1=", "chosen": f"{long}Yes.", "rejected": f"{long}No."} for i in range(20)]
    table = said(dpo.main, argv(pair_cfg, jsonl(tmp_path / "given.jsonl", given), "--max_steps=1"))
    assert "28 pairs" in table and "12  left out: " in table
    with pytest.raises(UserError, match=r"no pair to train on[\s\S]*20  left out: .*same after the cut"):
        dpo.main(argv(pair_cfg, jsonl(tmp_path / "late.jsonl", late)))
    asked = [{**row, "prompt": f"{i} {long}"} for i in range(20)]
    words = argv(pair_cfg, jsonl(tmp_path / "asked.jsonl", asked), f"--out_dir={tmp_path / 'two'}")
    table = said(dpo.main, words)
    assert "20  lost a part of their prompt" in table


RATED = {"prompt": "q", "response": "a", "helpfulness": 3, "correctness": 3, "coherence": 4, "complexity": 2,
         "verbosity": 2}


def test_ties_and_impossible_ratings_of_helpsteer_are_named_and_counted(pair_cfg, tmp_path, said):
    ties = [{**RATED, "prompt": f"q{i // 2}", "response": f"a{i}"} for i in range(60)]
    with pytest.raises(UserError, match=r"no pair to train on[\s\S]*30  left out: .*without a better"):
        dpo.main(argv(pair_cfg, jsonl(tmp_path / "a.jsonl", ties)))
    mixed = [{**row, "helpfulness": 4} if i % 4 == 0 else row for i, row in enumerate(ties)]
    table = said(dpo.main, argv(pair_cfg, jsonl(tmp_path / "b.jsonl", mixed)))
    assert "15 pairs" in table and "15  left out: " in table
    for wrong in (True, 3.5, 9, None):
        with pytest.raises(UserError, match=f"c.jsonl line 1: .*{json.dumps(wrong)}"):
            dpo.main(argv(pair_cfg, jsonl(tmp_path / "c.jsonl", [{**RATED, "helpfulness": wrong}])))


def test_scores_that_contradict_the_choice_are_named(pair_cfg, tmp_path):
    row = {**PAIR_SCHEMAS["UltraFeedback"], "score_chosen": 2.0, "score_rejected": 8.0}
    with pytest.raises(UserError, match=r"pairs.jsonl line 1: .*2.0.*8.0"):
        dpo.main(argv(pair_cfg, jsonl(tmp_path / "pairs.jsonl", [row] * 20)))


def test_a_prompt_is_never_in_training_and_in_validation(pair_cfg, tok, tmp_path):
    rows = [{**PAIR_SCHEMAS["prompt"], "prompt": f"{i % 20}+1=", "chosen": f"{i}."} for i in range(60)]
    dpo.main(argv(pair_cfg, jsonl(tmp_path / "pairs.jsonl", rows), "--max_steps=1", "--val_fraction=0.3"))
    train_, val = ({prompt for prompt, _, _ in pairs_in(pair_cfg, tok, split)} for split in ("train", "val"))
    assert len(train_) + len(val) == 20 and not train_ & val


# ---------------------------------------------------------------------------------------------------------
# asking


def test_a_cut_answer_is_marked_and_a_finished_one_is_not(small, chat_model, tok, tmp_path, capfd):
    sample.main([chat_model, "--chat=hi", "--max_new_tokens=4", "--temperature=0"])
    assert "(the answer is cut: it reached --max_new_tokens=4)" in capfd.readouterr().err
    silent = SmolLM(small)
    silent.model.norm.weight.data.zero_()  # all logits are 0, and the first id, <|endoftext|>, wins
    checkpoint.save_step(1, Run("x", tmp_path / "x"), silent, tok.for_chat(), [], {"config": {}}, keep=1)
    sample.main([str(tmp_path / "x"), "--chat=hi", "--max_new_tokens=4", "--temperature=0"])
    assert capfd.readouterr().err == ""


def test_a_question_longer_than_the_context_is_reported_for_every_number_of_samples(base, chat_model, capfd):
    for n in (1, 3):
        sample.main([base, f"--prompt={'the cat ' * 99}sat", f"--num_samples={n}", "--max_new_tokens=2"])
        assert "(the model reads only the last 32 of " in capfd.readouterr().err
    sample.main([chat_model, f"--chat={'the cat ' * 99}", "--max_new_tokens=2"])
    assert "(the model reads only the last 128 of " in capfd.readouterr().err


def test_a_prompt_that_is_a_trap_gets_a_hint(base, chat_model, capfd):
    """A template typed by hand is letters; and no word follows a lone space, because words begin with one."""
    for folder, prompt, hint in (
            (chat_model, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "--chat"),
            (base, "the cat ", "ends with a space"), (base, "  ", "ends with a space")):
        sample.main([folder, f"--prompt={prompt}", "--max_new_tokens=2"])
        assert hint in capfd.readouterr().err
    sample.main([base, "--prompt=the cat", "--max_new_tokens=2"])
    assert "space" not in capfd.readouterr().err
    sample.main([base, "--prompt=", "--max_new_tokens=2"])  # a new document


@pytest.mark.parametrize("one, other", [
    ("--prompt=a", "--chat=b"), ("--file=b.txt", "--prompt=a"), ("--file=b.txt", "--chat"),
    ("--num_samples=3", "--chat=b"), ("--speed", "--chat=b")])
def test_flags_that_would_be_ignored_are_refused(chat_model, one, other):
    names = [word.partition("=")[0] for word in (one, other)]
    with pytest.raises(UserError, match=" has no meaning together with ".join(names)):
        sample.main([chat_model, one, other])


@pytest.mark.parametrize("flag, needs", [("--benchmarks=folder", "--tasks"), ("--show", "builtin"),
                                         ("--no_generation_prompt", "builtin")])
def test_a_flag_of_an_evaluation_that_no_task_reads_is_refused(base, tmp_path, flag, needs):
    """python -m evals MODEL --benchmarks=FOLDER asked the built-in questions and left the folder alone."""
    source = jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UserError, match=f"{flag}.* needs .*{needs}"):
        evals.main([base, "--tasks=text", f"--text={source}", flag])


def test_several_greedy_samples_are_refused_since_they_would_be_the_same(base):
    with pytest.raises(UserError, match="--num_samples=3 with --temperature=0 would repeat one text"):
        sample.main([base, "--prompt=the cat", "--num_samples=3", "--temperature=0"])


@pytest.mark.parametrize("words", [["--chat="], ["--chat", ""], ["--chat=  "]])
def test_an_empty_question_is_no_conversation(chat_model, words):
    """A script whose $QUESTION is empty waited at the prompt of a conversation."""
    with pytest.raises(UserError, match="--chat=.* asks nothing"):
        sample.main([chat_model, *words])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no colons in names")
def test_folders_may_have_any_name_and_one_that_cannot_be_made_is_named(tiny, tmp_path, said):
    source, odd = jsonl(tmp_path / "a.jsonl", ROWS), str(tmp_path / "my runs, 50% (new): a@b")
    train.main(argv(tiny, source, f"--out_dir={odd}"))
    text = said(sample.main, [f"{odd}/pretrain", "--prompt=the cat", "--max_new_tokens=1"])
    assert text.startswith("the cat")
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match=f"{where}.*cannot be written"):
            train.main(argv(tiny, source, f"--out_dir={where}"))
