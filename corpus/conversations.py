"""
conversations.py: other people's chats and preferences, from the schemas of their data sets to ours.

sft.py reads chats, in rows with these columns,

    messages                                 [{"role": "user", "content": "hi"}, ...]      our own schema
    conversations             ShareGPT       [{"from": "human", "value": "hi"}, ...]
    instruction, output       Alpaca         one exchange: any column of QUESTIONS with any of ANSWERS
    question, response        OpenOrca
    prompt, completion        TRL            texts, or lists of messages
    text                      Guanaco        a chat written as one text: transcripts.py has the formats
    text                                     a document, every token of which is learned: --documents=True

and dpo.py reads pairs:

    chosen, rejected          dpo-mix-7k     two lists of messages that differ in the last answer
    chosen, rejected          HH             the same as texts: "\\n\\nHuman: hi\\n\\nAssistant: Hello!"
    prompt, chosen, rejected  UltraFeedback  a question and its answers: texts, or lists of messages
    prompt, response, helpfulness, correctness, ...     HelpSteer: answers with ratings, see best_and_worst

A list of messages may also be JSON text, or be the row itself. Beside any of these, `system` or
`system_prompt` becomes the system message. `input` and `context` follow the question after a blank line, and
`history`, [[question, answer], ...], precedes it.

Nothing is left out unnoticed. A column must be used, be METADATA, be empty, or repeat what is said anyway, as
Alpaca's `text` does; the keys of a message likewise. Any other raises Bad, unless --ignore names it. Whatever
raises Bad is reported with its file and line.
"""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from operator import itemgetter
from typing import Any

from config import Config
from corpus import transcripts
from corpus.files import Bad, LeftOut
from corpus.messages import (
    Messages,
    as_messages,
    check_rest,
    empty,
    first,
    from_json,
    in_order,
    quote,
    repeats,
    spoken,
    text_in,
)
from corpus.sources import Documents, ignored, is_builtin

SCHEMAS = ("corpus/conversations.py", "corpus/messages.py", "corpus/transcripts.py")  # the code of schemas
LISTS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
QUESTIONS = ("instruction", "question", "prompt", "query", "problem", "input")
ANSWERS = ("output", "response", "answer", "completion", "solution")
SYSTEM = ("system", "system_prompt")
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
          ("chosen_rating", "rejected_rating"), ("chosen-rating", "rejected-rating"))
OF_PAIRS = {"chosen", "rejected", "fault", "chosen_model", "rejected_model", "chosen-model", "rejected-model",
            *(name for names in SCORES for name in names)}
HELPSTEER = {"helpfulness", "correctness", "coherence", "complexity", "verbosity"}
CHATS = (f"accepted are {' or '.join(LISTS[:2])} (a list of messages), {', '.join(QUESTIONS[:3])} with "
         f"{', '.join(ANSWERS[:4])}, or text")
PAIRS = ("accepted are chosen and rejected, as texts beside a prompt, as lists of messages or as "
         "'Human: ... Assistant: ...', and HelpSteer's ratings")


def messages_of(row: Any, ignore: frozenset[str] = frozenset(), documents: bool = False) -> Messages | str:
    """A row in any of these schemas -> its messages; a document -> its text."""
    if not isinstance(row, dict | list | str):
        raise Bad("no conversation", f"{quote(row)}; {CHATS}")
    row = {"text": row} if isinstance(row, str) else {"messages": row} if isinstance(row, list) else row
    said = {name: value for name, value in row.items() if name not in ignore}
    listed, question, answer = first(LISTS, said), first(QUESTIONS, said), first(ANSWERS, said)
    text = said.get("text")
    if {"helpfulness", "correctness"} <= said.keys():
        raise Bad("no conversation", "these look like rated answers, good and bad ones: they are for dpo.py")
    if listed and not empty(said[listed]):
        messages, used = as_messages(said[listed], ignore), {listed}
        if messages is None:
            raise Bad("not a list of messages", f"{listed} is {quote(said[listed])}")
    elif question and answer and not (empty(said[question]) and empty(said[answer])):
        if row.get("source") == "socratic":  # of WebInstructSub
            raise LeftOut("from socratic, which is not for commercial use")
        messages, used = exchange_of(said, answer, ignore)
    elif isinstance(text, str) and not empty(text):
        messages, used = as_transcript(text), {"text"}
    elif {"chosen", "rejected"} & row.keys():
        raise Bad("no conversation", "these look like preference pairs: they are for dpo.py")
    else:
        raise Bad("no conversation", f"{quote(row)}; {CHATS}")
    if messages is None:
        check_rest(said, used, [])
        if not documents:
            raise Bad("a document among chats", f"text is {quote(text)}; say --documents=True to learn "
                      "documents whole, among the chats")
        return text
    messages, used = with_system(said, messages, used)
    check_rest(said, used, messages)
    return in_order(messages)


def as_transcript(text: str) -> Messages | None:
    """The messages of a chat that is one text; None if it is a document."""
    parsed = transcripts.parse(text)
    if parsed is None and transcripts.has_marks(text):
        raise no_chat("text", text)
    return None if parsed is None else spoken(parsed, text=text)


def no_chat(name: str, text: str) -> Bad:
    return Bad("chat marks that do not form a chat",
               f"{name} is {quote(text)}; corpus/transcripts.py has the formats that are understood")


def pair_of(row: Any, ignore: frozenset[str] = frozenset()) -> tuple:
    """A row -> (messages of the prompt, chosen answer, rejected answer); for a rated answer of HelpSteer,
    (prompt, answer, rating)."""
    if not isinstance(row, dict):
        what = "a document" if isinstance(row, str) else "no row with columns"
        raise Bad("no pair", f"it is {what}: {quote(row)}; {PAIRS}")
    said = {name: value for name, value in row.items() if name not in ignore}
    if not {"chosen", "rejected"} & said.keys():
        answer = first(ANSWERS, said)
        if answer and "helpfulness" in said:
            return rated_of(said, answer, ignore)
        chat = "this looks like a chat: chats are for sft.py; " if answer or first(LISTS, said) else ""
        raise Bad("no pair", f"{chat}{quote(row)}; {PAIRS}")
    for name in ("chosen", "rejected"):
        if empty(said.get(name)):
            what = f"{name} is {quote(said[name])}" if name in said else f"there is no {name}"
            raise Bad("a pair without two answers", f"{what}; {PAIRS}")
    chosen, used = with_system(said, *exchange_of(said, "chosen", ignore))
    rejected, also = with_system(said, *exchange_of(said, "rejected", ignore))
    check_rest(said, used | also | OF_PAIRS, chosen)
    for higher, lower in SCORES:
        scores = [score_in(said, name) for name in (higher, lower) if not empty(said.get(name))]
        if len(scores) == 2 and scores[0] < scores[1]:
            raise Bad("scores that contradict the choice", f"{higher} is {quote(said[higher])}, {lower} "
                      f"{quote(said[lower])}; if they do not matter, say --ignore={higher},{lower}")
    chosen, rejected = in_order(chosen), in_order(rejected)
    if chosen[:-1] != rejected[:-1] or chosen[-1]["role"] != "assistant":
        raise Bad("not a pair", "chosen and rejected must be the same except for the last answer; they have "
                  f"{len(chosen)} and {len(rejected)} messages, and end in {quote(chosen[-1])} and "
                  f"{quote(rejected[-1])}")
    if chosen == rejected:
        raise LeftOut("no difference between chosen and rejected")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def score_in(row: dict, name: str) -> float:
    """A score, which may be text: "8.5" -> 8.5."""
    try:
        return float(row[name])
    except (TypeError, ValueError):
        raise Bad("a score that is not a number", f"{name} is {quote(row[name])}; if it does not matter, "
                  f"say --ignore={name}") from None


def rated_of(row: dict, answer: str, ignore: frozenset[str]) -> tuple:
    """A row of HelpSteer -> (prompt, answer, rating)."""
    ratings = {name: row.get(name) for name in ("helpfulness", "correctness")}
    if not all(type(rating) is int and 0 <= rating <= 4 for rating in ratings.values()):
        raise Bad("a rating that is no whole number from 0 to 4", quote(ratings))
    messages, used = with_system(row, *exchange_of(row, answer, ignore))
    check_rest(row, used | HELPSTEER, messages)
    *prompt, last = in_order(messages)
    return prompt, last["content"], sum(ratings.values()) / 2


def best_and_worst(rated: Iterable[tuple]) -> tuple[list[tuple], int]:
    """(prompt, answer, rating) of all prompts -> [(prompt, best, worst)], and how many prompts have none.

    HelpSteer's answers are rated 0 to 4. The mean of helpfulness and correctness decides, as in the
    community's binarized versions. SmolLM's own rule is not published.
    """
    answers: dict[str, list] = {}
    for prompt, answer, rating in rated:
        answers.setdefault(json.dumps(prompt), []).append((prompt, answer, rating))
    groups = [sorted(group, key=itemgetter(2)) for group in answers.values()]
    found = [(group[-1][0], group[-1][1], group[0][1]) for group in groups if group[-1][2] > group[0][2]]
    return found, len(groups) - len(found)


# ---------------------------------------------------------------------------------------------------------
# from columns to messages


def exchange(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def exchange_of(row: dict, answer: str, ignore: frozenset[str]) -> tuple[Messages, set[str]]:
    """The messages that end with an answer, and the columns that they come from.

    {"question": "Who?", "context": "Ann has a kite.", "answer": "Ann."} -> "Who?\n\nAnn has a kite.", "Ann."
    """
    name, value = first(QUESTIONS, row), row[answer]
    said = as_messages(value, ignore)
    whole = bool(said) and said[0]["role"] != "assistant"  # the answer column has the question, too
    if whole and (name is None or isinstance(value, list) or repeats(row[name], said)):
        return said, {answer}
    if name is None:
        raise Bad("an answer without a question", f"{answer} is {quote(value)}, and there is no "
                  f"{' or '.join(QUESTIONS)}")
    texts = isinstance(value, str) and isinstance(row[name], str)
    if texts and (messages := transcripts.completed(row[name], value)) is not None:
        return spoken(messages, text=row[name] + value), {name, answer}
    asked = as_messages(row[name], ignore)
    if texts and asked is None and not value.lstrip().startswith("<|im_start|>"):
        said = None  # "### Response:" is a heading here, and JSON is an example
    if not said or whole:  # a text, be it one about messages
        said = [{"role": "assistant", "content": text_in(row, answer)}]
    if asked is not None:
        return asked + said, {name, answer}
    if transcripts.begins_with_marks(row[name] if isinstance(row[name], str) else ""):
        raise no_chat(name, row[name])
    names = [name, *(extra for extra in ("input", "context") if extra != name and not empty(row.get(extra)))]
    question = "\n\n".join(text_in(row, text) for text in names)
    return [*history_of(row), {"role": "user", "content": question}, *said], {*names, "history", answer}


def history_of(row: dict) -> Messages:
    """{"history": [["hi", "Hello!"], ...]} -> messages."""
    value = row.get("history")
    pairs = [] if empty(value) else from_json(value) if isinstance(value, str) else value
    if not isinstance(pairs, list) or not all(
            isinstance(pair, list | tuple) and len(pair) == 2 and not any(map(empty, pair))
            and all(isinstance(text, str) for text in pair) for pair in pairs):
        raise Bad("a history that is no list of pairs", f"history is {quote(value)}; accepted is "
                  '[["a question", "its answer"], ...]')
    return [message for pair in pairs for message in exchange(*pair)]


def with_system(row: dict, messages: Messages, used: set[str]) -> tuple[Messages, set[str]]:
    """The same with a column's system message, unless there is another: then the column counts as unknown."""
    name, rest = first(SYSTEM, row), [m for m in messages if m["role"] != "system" or not empty(m["content"])]
    if name is None or empty(row[name]) or [m["role"] for m in rest[:1]] == ["system"]:
        return messages, used
    return [{"role": "system", "content": text_in(row, name)}, *rest], used | {name}


# ---------------------------------------------------------------------------------------------------------
# the sources of a config


def conversations(cfg: Config) -> list[Documents]:
    """The sources of a config as streams of chats, lists of messages, and of documents, plain texts."""
    item = partial(messages_of, ignore=ignored(cfg), documents=cfg.documents)
    data = [("builtin-chats" if source == "builtin" else source, fraction) for source, fraction in cfg.data]
    return [Documents(source, cfg, item=built_in if is_builtin(source) else item, fraction=fraction)
            for source, fraction in data]


def built_in(row: dict | str) -> Messages | str:
    """A chat or a document of the built-in corpus: its documents may be among chats without being asked."""
    return row if isinstance(row, str) else messages_of(row)


def preferences(cfg: Config) -> list[Documents]:
    """The sources of a config as streams of pairs, or of rated answers."""
    item = partial(pair_of, ignore=ignored(cfg))
    return [Documents("builtin-pairs" if source == "builtin" else source, cfg, item=item, fraction=fraction)
            for source, fraction in cfg.data]


def pairs_of(documents: Documents) -> Iterator[tuple]:
    """(prompt, chosen, rejected) of one source; of rated answers, the best and the worst to each prompt."""
    rated = []
    for pair in documents:
        if isinstance(pair[2], float):
            rated.append(pair)
        else:
            yield pair
    found, ties = best_and_worst(rated)
    if ties:
        documents.left_out["prompts without a better and a worse answer"] += ties
    yield from found
