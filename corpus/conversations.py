"""
conversations.py: other people's chats and preferences, from the schemas of their data sets to ours.

sft.py reads rows with these fields,

    messages                                     [{"role": "user", "content": "hi"}, ...]      our own schema
    conversations   OpenHermes                   [{"from": "human", "value": "hi"}, ...]
    instruction, response   question, answer     one exchange
    text                                         a document, of which every token is learned

and dpo.py rows with these:

    chosen, rejected    dpo-mix-7k               two lists of messages that differ in the last answer
    prompt, chosen, rejected                     the same as three texts
    prompt, response, helpfulness, correctness   HelpSteer: answers with ratings, see best_and_worst

A record in no such schema raises Bad, so it is reported with its file and line.
"""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from operator import itemgetter

from config import Config
from corpus.files import Bad
from corpus.sources import Documents

ROLES = {"human": "user", "gpt": "assistant"}  # the words of OpenHermes


def messages_of(row: dict | list | str, ignore: frozenset[str] = frozenset(),
                documents: bool = False) -> list[dict[str, str]] | str | None:
    """A row in any of these schemas -> its messages; a document -> its text; None if it is left out."""
    if isinstance(row, str):  # a built-in document
        return row
    if isinstance(row.get("messages"), list):
        return check_messages(row["messages"])
    if isinstance(row.get("conversations"), list):
        turns = [turn if isinstance(turn, dict) else {} for turn in row["conversations"]]
        return check_messages([{"role": ROLES.get(turn.get("from"), turn.get("from")),
                                "content": turn.get("value")} for turn in turns])
    for question, answer in (("instruction", "response"), ("question", "answer")):
        if question in row and answer in row:
            if row.get("source") == "socratic":  # of WebInstructSub: not for commercial use
                return None
            return check_messages(exchange(row[question], row[answer]))
    if isinstance(row.get("text"), str):
        return row["text"]
    if {"chosen", "rejected"} <= row.keys():
        raise Bad("no conversation", "these look like preference pairs: they are for dpo.py")
    raise Bad("no conversation", f"its fields are {list(row)}; it needs messages, conversations, "
              "instruction and response, question and answer, or text")


def exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def check_messages(messages: list) -> list[dict[str, str]]:
    """The messages, if they are a conversation: user and assistant in turn, maybe after a system message."""
    plain = []
    for number, message in enumerate(messages, 1):
        message = message if isinstance(message, dict) else {}
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise Bad("a message without a role and a text", f"message {number}: {message!r}")
        if role not in ("system", "user", "assistant"):
            raise Bad("an unknown role", f"message {number}: {role!r}")
        if not content.strip() and role != "system":
            raise Bad("an empty message", f"message {number} of the {role}")
        plain.append({"role": role, "content": content})
    roles = [message["role"] for message in plain]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    if roles != [("user", "assistant")[i % 2] for i in range(len(roles))] or "assistant" not in roles:
        raise Bad("messages out of order", f"{', '.join(roles)}: user and assistant must take turns, and "
                  "the user begins")
    return plain


def pair_of(row: dict | list | str, ignore: frozenset[str] = frozenset()) -> tuple:
    """A row -> (messages of the prompt, chosen answer, rejected answer); for a rated answer of HelpSteer,
    (prompt, answer, rating)."""
    if isinstance(row, str):
        raise Bad("no pair", "it is a document")
    if isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list):
        chosen, rejected = check_messages(row["chosen"]), check_messages(row["rejected"])
        if chosen[:-1] != rejected[:-1] or chosen[-1]["role"] != "assistant":
            raise Bad("not a pair", "chosen and rejected must be the same except for the last answer")
        return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]
    if all(isinstance(row.get(name), str) for name in ("prompt", "chosen", "rejected")):
        chosen = check_messages(exchange(row["prompt"], row["chosen"]))
        rejected = check_messages(exchange(row["prompt"], row["rejected"]))
        return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]
    if "helpfulness" in row:
        ratings = row["helpfulness"], row.get("correctness")
        if not all(isinstance(rating, int) for rating in ratings):
            raise Bad("a rating that is not a whole number", ratings)
        messages = check_messages(exchange(row.get("prompt"), row.get("response")))
        return messages[:-1], messages[-1]["content"], sum(ratings) / 2
    if {"messages", "conversations"} & row.keys():
        raise Bad("no pair", "this looks like a chat: chats are for sft.py")
    raise Bad("no pair", f"its fields are {list(row)}; it needs chosen and rejected, or prompt, response, "
              "helpfulness and correctness")


def best_and_worst(rated: Iterable[tuple]) -> tuple[list[tuple], int]:
    """(prompt, answer, rating) of all prompts -> [(prompt, best, worst)], and how many prompts have none,
    because their answers are rated alike.

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
# the sources of a config


def conversations(cfg: Config) -> list[Documents]:
    """The sources of a config as streams of chats, lists of messages, and of documents, plain texts."""
    item = partial(messages_of, ignore=ignored(cfg), documents=cfg.documents)
    return [Documents("builtin-chats" if source == "builtin" else source, cfg, item=item, fraction=fraction)
            for source, fraction in cfg.data]


def preferences(cfg: Config) -> list[Documents]:
    """The sources of a config as streams of pairs, or of rated answers."""
    item = partial(pair_of, ignore=ignored(cfg))
    return [Documents("builtin-pairs" if source == "builtin" else source, cfg, item=item, fraction=fraction)
            for source, fraction in cfg.data]


def ignored(cfg: Config) -> frozenset[str]:
    return frozenset(name.strip() for name in cfg.ignore.split(",") if name.strip())


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
        documents.left_out["prompts whose answers are all rated alike"] += ties
    yield from found
