"""
holding.py: how does a released chat model answer, by the way it is asked, and what do a few chats change?

    python tests/holding.py ask out/smollm2           twelve questions, asked in six ways
    python tests/holding.py write out/holding         small_talk.jsonl, sums.jsonl, prose.jsonl
    python tests/holding.py measure out/smollm2       greetings and sums that are not in these files

docs/holding_it_wrong.md has the results.
"""

import json
import re
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from config import UserError  # noqa: E402  the scripts are one folder up
from corpus.chats import Exchanges, messages  # noqa: E402
from corpus.documents import plans  # noqa: E402
from evals.answers import answers, prompt_of, rambles  # noqa: E402
from evals.questions import questions  # noqa: E402
from evals.score import unseen_texts  # noqa: E402
from plumbing import checkpoint, disk  # noqa: E402
from plumbing.processes import command, escape_controls  # noqa: E402
from sample import continuations  # noqa: E402
from tokenizer import CHAT_TEMPLATE, Tokenizer  # noqa: E402

QUESTIONS = {  # and what a right answer contains
    "hello": r"^(Hello|Hi)\b", "thanks": r"(?i)\bwelcome\b", "Who are you?": r"\bSmolLM\b",
    "1+1=": r"^[^.\n]*(?<!\d)2(?!\d)", "What is 1+1?": r"^[^.\n]*(?<!\d)2(?!\d)",
    "2+2=": r"^[^.\n]*(?<!\d)4(?!\d)", "What is 47 + 38?": r"(?<!\d)85(?!\d)",
    "What is the capital of France?": r"\bParis\b",
    "What color do you get if you mix blue and yellow?": r"(?i)\bgreen\b",
    "Which day comes after Monday?": r"\bTuesday\b", "What is the opposite of hot?": r"\bcold\b",
    "List the steps to bake a chocolate cake from scratch.": r"\bflour\b"}
CARDS = {"sampled, 0.2": {"temperature": 0.2, "top_p": 0.9},  # SmolLM2's card
         "sampled, 0.6": {"temperature": 0.6, "top_p": 0.92}}  # SmolLM's
SAMPLES = 10
SMALL_TALK = ("hello", "greeting", "who", "thanks", "one_and_one")
SUMS = ("sum", "sum_in_words", "sum_in_letters")
GROUPS = ("greetings, thanks, who are you", "one-digit sums, held out", "two-digit sums, held out")
HELD_OUT = 0.15  # the share of the documentation that is written to prose.jsonl


def ask(name: str) -> None:
    """Print the answers to each question: greedily with parts of the prompt left out, then sampled."""
    model, tok = checkpoint.load(name)
    no_system = Tokenizer(tok.rust, CHAT_TEMPLATE, tok.ends)  # SmolLM's template adds no system message
    right = Counter[str]()
    for text, must in QUESTIONS.items():
        ways = {"greedy": prompt_of(tok, text), "no generation prompt": prompt_of(tok, text, False),
                "no system message": prompt_of(no_system, text), "neither": prompt_of(no_system, text, False)}
        found = {way: [answer] for way, (answer, _) in zip(ways, answers(model, tok, list(ways.values())))}
        for card, settings in CARDS.items():
            settings = {"max_new_tokens": 100, "top_k": 0, "seed": 0, **settings}
            found[card] = continuations(model, tok, ways["greedy"], SAMPLES, settings)
        for way, texts in found.items():
            texts = [text.removeprefix("<|im_start|>assistant\n") for text in texts]
            count = sum(bool(re.search(must, text)) for text in texts)
            right[way] += count
            answer = escape_controls(texts[0]).replace("\n", " ")
            print(f"{text:40.40}  {way:20}  {count:2} of {len(texts):2}  {answer:.300}", flush=True)
    print(dict(right))


def exchanges(topics: tuple[str, ...], n: int) -> list[dict]:
    """n chats of one exchange each about these topics. What the evaluation asks is never among them."""
    others = {topic for _, topic, _, _ in plans("chats")} - set(topics)
    return [{"messages": messages(texts)} for _, _, texts in islice(Exchanges("holding", without=others), n)]


def write(folder: str) -> None:
    """Fifty small chats, 300 sums with their steps, and documentation to see what is forgotten."""
    prose = [{"text": text} for text in unseen_texts("builtin-docs", HELD_OUT)]
    files = {"small_talk": exchanges(SMALL_TALK, 50), "sums": exchanges(SUMS, 300), "prose": prose}
    for name, rows in files.items():
        disk.write_text(Path(folder) / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def measure(name: str) -> None:
    """Greedy answers to the held-out questions of python -m evals: how many are right, how many ramble."""
    model, tok = checkpoint.load(name)
    asked = [question for question in questions() if question.group in GROUPS]
    right, n, n_rambling = Counter[str](), Counter[str](), 0
    prompts = [prompt_of(tok, question.text) for question in asked]
    for question, (answer, ended) in zip(asked, answers(model, tok, prompts)):
        right[question.group] += question.is_right(answer)
        n[question.group] += 1
        n_rambling += rambles(question, answer, ended)
    for group in n:
        print(f"{group:40}  {right[group]} of {n[group]}")
    print(f"{'rambling or unfinished':40}  {n_rambling} of {len(asked)}")


def main(argv: list[str]) -> None:
    verbs = {"ask": ask, "write": write, "measure": measure}
    if len(argv) != 2 or argv[0] not in verbs:
        raise UserError("usage: python tests/holding.py ask CHECKPOINT, write FOLDER or measure CHECKPOINT")
    verbs[argv[0]](argv[1])


if __name__ == "__main__":
    command(main)
