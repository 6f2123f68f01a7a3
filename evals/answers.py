"""
evals/answers.py: ask the questions, generate the answers, judge them.

An answer is generated greedily, each token the most likely one, so the same model always gives the same
answer. It is judged twice: does it contain what a right answer must contain, and does it end by itself before
it says more than is enough?
"""

import itertools
import re
from collections import Counter

from tqdm import tqdm

from corpus.chats import chats
from evals.questions import Question, questions
from model import SmolLM
from plumbing.processes import escape_controls
from sample import generate_batch
from tokenizer import Tokenizer

ONLY_ENDS = 60  # questions from new chats, asked only to see whether the answers end


def prompt_of(tok: Tokenizer, text: str, generation_prompt: bool = True) -> list[int]:
    """The ids of a question. A base model is asked as in the transcripts that it has read."""
    if not tok.is_chat:
        return tok.encode(f"User: {text}\nAssistant:")
    return tok.chat([{"role": "user", "content": text}], generation_prompt)[0]


def answers(model: SmolLM, tok: Tokenizer, prompts: list[list[int]],
            limit: int = 100) -> list[tuple[str, bool]]:
    """[(answer, whether it has an end)] for prompts, lists of ids. Prompts of equal length run together."""
    ends = set(tok.stop_ids)
    if not tok.is_chat:  # in a transcript, a line break ends an answer
        ends |= {i for i, data in enumerate(tok.token_bytes) if b"\n" in data}
    found: dict[int, tuple[str, bool]] = {}
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(index)
    for indices in tqdm(by_length.values(), "asking", disable=None, leave=False):
        written: list[list[int]] = [[] for _ in indices]
        for new in generate_batch(model, [prompts[index] for index in indices], limit, temperature=0):
            for ids, i in zip(written, new):
                ids.append(i)
            if all(ends & set(ids) for ids in written):
                break
        for index, ids in zip(indices, written):
            answer = list(itertools.takewhile(lambda i: i not in ends, ids))
            found[index] = tok.decode(answer).strip(), len(answer) < len(ids)
    return [found[index] for index in range(len(prompts))]


def sentences(text: str) -> int:
    return len(re.findall(r"[.!?](?=\s|$)", text))


def rambles(question: Question, answer: str, ended: bool) -> bool:
    """Whether an answer does not end by itself, is empty, or has more sentences than are enough."""
    return not ended or not answer or sentences(answer) > question.sentences


def ask_all(model: SmolLM, tok: Tokenizer, generation_prompt: bool = True,
            show: bool = False) -> dict[str, tuple[int, int]]:
    """{group: (right answers, questions)}, the totals over all groups, and how many answers ramble or do not
    end."""
    last = [[message["content"] for message in chat["messages"][-2:]] for chat in chats("eval", ONLY_ENDS)]
    others = [Question("", text, "", sentences(good) + 1) for text, good in last]
    asked = [*questions(), *others]
    prompts = [prompt_of(tok, question.text, generation_prompt) for question in asked]
    right, n, n_rambling = Counter[str](), Counter[str](), 0
    for question, (answer, ended) in zip(asked, answers(model, tok, prompts)):
        is_right, is_rambling = question.is_right(answer), rambles(question, answer, ended)
        right[question.group] += is_right
        n[question.group] += 1
        n_rambling += is_rambling
        if show and question.group and (not is_right or is_rambling):
            print(f"{question.text}  ->  {escape_controls(answer)}")
    table = {group: (right[group], n[group]) for group in n if group}
    return table | {"all questions": (right.total() - right[""], n.total() - n[""]),
                    "rambling or unfinished answers": (n_rambling, len(asked))}
