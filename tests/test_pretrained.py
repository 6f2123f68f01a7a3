"""pretrained/demo: the model that the README talks to says what the README prints."""

import re
from pathlib import Path

import pytest

import tokenizer
from plumbing import checkpoint
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "pretrained" / "demo"
ASKED = ["hello", "1+1=", "What is the capital of Italy?", "47+38=", "Who are you?"]


def conversation():
    """{question: answer} of the README's block of lines "> question", each with its answer below."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```\n(> .*?)\n```$", text, re.M | re.S)
    return dict(part.split("\n", 1) for part in re.split(r"^> ", block + "\n", flags=re.M)[1:])


def test_the_readme_shows_what_demo_sh_asks():
    script = (ROOT / "demo.sh").read_text(encoding="utf-8")
    assert all(f'"{question}"' in script for question in ASKED)
    assert ASKED == list(conversation())[: len(ASKED)]


@pytest.mark.parametrize("question", ASKED)
def test_the_finished_demo_answers_as_the_readme_prints(question, run_here):
    """With the defaults of sample.py, seed included."""
    assert run_here("sample.py", FOLDER, "--chat", question) == (0, conversation()[question], "")


def test_the_ids_that_open_the_tokenizers_lesson_are_its_ids():
    ids = Tokenizer.load(FOLDER).encode("Once upon a time")
    assert f'"Once upon a time"  ->  {ids}  ->  "Once upon a time"' in tokenizer.__doc__


def test_its_files_are_those_that_were_written_and_small():
    sums = dict(reversed(line.split("  ")) for line in (FOLDER / "B2SUMS").read_text().splitlines())
    found = {path.name: checkpoint.digest(path) for path in FOLDER.iterdir()
             if path.name not in ("B2SUMS", "README.md")}
    assert found == sums
    assert 4e6 < sum(path.stat().st_size for path in FOLDER.iterdir()) < 5e6


def test_its_card_says_how_it_was_made_and_what_it_knows():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for part in ("license: mit", "python dpo.py config/demo_dpo.py", "two-digit sums, held out", "limits"):
        assert part in card
