"""
conversations.py: chats and preferences of other people, each in the schema of its data set, as ours.

    messages                                     [{"role": "user", "content": "hi"}, ...]      as it is
    conversations   OpenHermes                   [{"from": "human", "value": "hi"}, ...]
    instruction, response   question, answer     one exchange
    text                                         a document: learnt whole, so that it is not forgotten

    chosen, rejected    dpo-mix-7k               two message lists that differ in the last answer
    prompt, chosen, rejected                     the same as three texts
    prompt, response, helpfulness, correctness   HelpSteer: answers with ratings, see best_and_worst

A record that does not fit raises Bad, and so is named with its file and line.             next: ../packing.py
"""

from collections.abc import Callable, Iterable, Iterator

from config import Config
from corpus.files import Bad
from corpus.sources import Documents, key_of

ROLES = {"human": "user", "gpt": "assistant"}  # OpenHermes' words


def messages_of(row: dict | str) -> list[dict[str, str]] | str | None:
    """A row of any of these schemas -> its messages; a document -> its text; None for what is left out."""
    if isinstance(row, str):  # a built-in document
        return row
    if isinstance(row.get("messages"), list):
        return checked(row["messages"])
    if isinstance(row.get("conversations"), list):
        turns = [turn if isinstance(turn, dict) else {} for turn in row["conversations"]]
        return checked([{"role": ROLES.get(turn.get("from"), turn.get("from")), "content": turn.get("value")}
                        for turn in turns])
    for question, answer in (("instruction", "response"), ("question", "answer")):
        if question in row and answer in row:
            if row.get("source") == "socratic":  # WebInstructSub: this part must not be used commercially
                return None
            return checked(exchange(row[question], row[answer]))
    if isinstance(row.get("text"), str):
        return row["text"]
    raise Bad("no conversation", f"there are the fields {list(row)}, and not messages, conversations, "
              "instruction and response, question and answer, or text")


def exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def checked(messages: list) -> list[dict[str, str]]:
    """The messages, if they are a conversation: perhaps a system message, then user and assistant in turn."""
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
    start = plain[0]["role"] == "system" if plain else 0
    roles = [message["role"] for message in plain[start:]]
    if roles != [("user", "assistant")[i % 2] for i in range(len(roles))] or "assistant" not in roles:
        raise Bad("messages out of order", f"{', '.join(roles)}: user and assistant must take turns, the "
                  "user first")
    return plain


def pair_of(row: dict | str) -> tuple:
    """A row -> (messages of the prompt, chosen answer, rejected answer); for a rated answer of HelpSteer,
    (prompt, answer, rating)."""
    if isinstance(row, str):
        raise Bad("no pair", "it is a document")
    if isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list):
        chosen, rejected = checked(row["chosen"]), checked(row["rejected"])
        if chosen[:-1] != rejected[:-1] or chosen[-1]["role"] != "assistant":
            raise Bad("not a pair", "chosen and rejected must be the same but for the last answer")
        return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]
    if all(isinstance(row.get(name), str) for name in ("prompt", "chosen", "rejected")):
        chosen, rejected = (checked(exchange(row["prompt"], row[name])) for name in ("chosen", "rejected"))
        return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]
    if "helpfulness" in row:
        ratings = row["helpfulness"], row.get("correctness")
        if not all(isinstance(rating, int) for rating in ratings):
            raise Bad("a rating that is not a whole number", ratings)
        messages = checked(exchange(row.get("prompt"), row.get("response")))
        return messages[:-1], messages[-1]["content"], sum(ratings) / 2
    raise Bad("no pair", f"there are the fields {list(row)}, and not chosen and rejected, or prompt, "
              "response, helpfulness and correctness")


def best_and_worst(rated: Iterable[tuple]) -> Iterator[tuple]:
    """(prompt, answer, rating) of one prompt after another -> (prompt, best, worst); ties are left out.

    HelpSteer's answers are rated 0 to 4; the mean of helpfulness and correctness decides, as in the
    community's binarised versions. SmolLM's own rule is not published.
    """
    answers: dict[str, list] = {}
    for prompt, answer, rating in rated:
        answers.setdefault(prompt[-1]["content"], []).append((rating, answer, prompt))
    for some in answers.values():
        best, worst = max(some, key=lambda row: row[0]), min(some, key=lambda row: row[0])
        if best[0] > worst[0]:
            yield best[2], best[1], worst[1]


def used(source: str, cfg: Config, item: Callable, fraction: float) -> Iterator:
    """item(row) for the given fraction of the rows of a source, always the same ones."""
    for number, made in enumerate(Documents(source, cfg, item=item)):
        if key_of(cfg.data_seed, source, number) < fraction * 2**64:
            yield made


def conversations(cfg: Config) -> Iterator[list[dict[str, str]] | str]:
    """Message lists (or texts) of all sources of a config, one after another."""
    for source, fraction in cfg.data:
        yield from used({"builtin": "builtin-chats"}.get(source, source), cfg, messages_of, fraction)


def preferences(cfg: Config) -> Iterator[tuple]:
    """(prompt, chosen, rejected) of all sources of a config, one after another."""
    for source, fraction in cfg.data:
        rated = []
        for made in used({"builtin": "builtin-pairs"}.get(source, source), cfg, pair_of, fraction):
            if isinstance(made[2], float):
                rated.append(made)
            else:
                yield made
        yield from best_and_worst(rated)
