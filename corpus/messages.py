"""
messages.py: a list of messages, as data sets write it, into ours: [{"role": "user", "content": "hi"}, ...].

    [{"from": "human", "value": "hi"}, ...]                                ShareGPT's words for the same
    "[{\\"role\\": \\"user\\", \\"content\\": \\"hi\\"}, ...]"                       JSON text
    [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ...]   parts, joined by line breaks
    "<|im_start|>user\\nhi<|im_end|> ..."                                   one text: transcripts.py

A key that says how a message is to be learned (weight, train), or that says more than its text (tool_calls,
reasoning_content, name), is not understood here, so such a message is refused unless --ignore names the key.
"""

import json
import re
from collections.abc import Collection
from typing import Any

from corpus import transcripts
from corpus.files import Bad, clean

SPEAKERS = {"system": "system", "developer": "system", "user": "user", "human": "user",
            "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
# of rows and messages: where they come from and what they are about; nothing that anyone says
METADATA = set("""id idx index uid uuid prompt_id question_id message_id conversation_id conversation_hash
    source dataset category topic subtopic subsubtopic full_topic language lang created created_at
    timestamp date url avatarUrl license model model_name split hash sha1 fingerprint views
    skip_prompt_formatting gen_input_configs intent task_category difficulty difficulty_generator
    input_quality quality_explanation quality_generator input_length token_length""".split())
LAYOUT = re.compile(  # what a rendering adds to the messages: Alpaca's preamble, names of roles, marks
    r"\A(?=[^\n]*\n\n### ?Instruction:)[^\n]*\b(?:task|instruction)\b[^\n]*"
    r"|### ?(?:(?:Instruction|Input|Response):)?|\b(?i:system|human|user|ai|gpt|assistant):|</?s>|\[/?INST\]"
    r"|<(?:\|im_start\||\|start_header_id\||start_of_turn)>\w+|<\|\w+\|>|<end_of_turn>|<bos>")
LABEL = 200  # characters that a label may have
ACCEPTED = 'accepted are {"role": "user", "content": "hi"} and {"from": "human", "value": "hi"}'

Messages = list[dict[str, str]]


def in_order(messages: Messages) -> Messages:
    """The messages, if they are a conversation: user and assistant in turn, maybe after a system message."""
    roles = [message["role"] for message in messages]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    if roles != [("user", "assistant")[i % 2] for i in range(len(roles))] or "assistant" not in roles:
        raise Bad("messages out of order", f"{', '.join(roles) or 'none'}: user and assistant must take "
                  "turns, and the user begins")
    return messages


def spoken(messages: list, ignore: Collection[str] = (), text: str = "") -> Messages:
    """Each message with its role and its text, in whatever order; `text` is what a transcript came from."""
    plain = []
    for number, message in enumerate(messages, 1):
        where = f"message {number} is {quote(message)}" if not text else f"message {number} in {quote(text)}"
        plain.append(message_of(message, where, ignore))
    return plain


def message_of(message: Any, where: str, ignore: Collection[str] = ()) -> dict[str, str]:
    if not isinstance(message, dict):
        raise Bad("a message without a role and a text", f"{where}; {ACCEPTED}")
    speaker, words = first(("role", "from"), message), first(("content", "value"), message)
    strange = unknown(message, {speaker, words, *ignore})
    if strange:
        raise Bad("an unknown key of a message", f"{strange[0]} is {quote(message[strange[0]], 50)} where "
                  f"{where}; if it does not matter, say --ignore={','.join(strange)}")
    role, content = message.get(speaker), joined(message.get(words), where)
    if not isinstance(role, str) or not isinstance(content, str):
        raise Bad("a message without a role and a text", f"{where}; {ACCEPTED}")
    role = SPEAKERS.get(role.strip().lower())
    if role is None:
        raise Bad("an unknown role", f"{where}; accepted are {', '.join(SPEAKERS)}")
    if empty(content) and role != "system":
        raise Bad("an empty message", where)
    return {"role": role, "content": content}


def joined(content: Any, where: str) -> Any:
    """[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}] -> "a\\nb"; a text stays as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        is_text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not is_text or unknown(part, {"type", "text"}):
            raise Bad("a part of a message that is not text", f"{quote(part)} where {where}; accepted are "
                      'parts like {"type": "text", "text": "hi"}')
    return "\n".join(part["text"] for part in content)


# ---------------------------------------------------------------------------------------------------------
# values of a row


def as_messages(value: Any, ignore: Collection[str] = ()) -> Messages | None:
    """A list of messages in any of these forms -> ours; None for a text that is none of them."""
    if isinstance(value, list):
        return spoken(value, ignore)
    if not isinstance(value, str):
        return None
    if (found := from_json(value)) is not None and all(isinstance(item, dict) for item in found):
        return spoken(found, ignore) if all({"role", "from"} & item.keys() for item in found) else None
    found = transcripts.parse(value)
    return None if found is None else spoken(found, text=value)


def from_json(text: str) -> list | None:
    """The list that a text contains as JSON; None for any other text."""
    try:
        value = json.loads(text) if text.lstrip()[:1] == "[" else None
    except (ValueError, RecursionError):
        return None
    return clean(value) if isinstance(value, list) and value else None


def text_in(row: dict, name: str) -> str:
    if empty(row[name]):
        raise Bad("an empty message", f"{name} is {quote(row[name])}")
    if not isinstance(row[name], str):
        raise Bad("a column that is not text", f"{name} is {quote(row[name])}")
    return row[name]


def check_rest(row: dict, used: set[str], messages: Messages) -> None:
    """Raise Bad if a column says something that the messages do not."""
    strange = [name for name in unknown(row, used) if not repeats(row[name], messages)]
    if strange:
        raise Bad("an unknown column", f"{strange[0]} is {quote(row[strange[0]])}; if it does not matter, "
                  f"say --ignore={','.join(strange)}")


def repeats(value: object, messages: Messages) -> bool:
    """Whether a column is one of the messages, some of them from the first one on, or a rendering of all.

    "### Instruction:\\nhi\\n\\n### Response:\\nHello!" -> True for hi, Hello!
    """
    contents = [message["content"].strip() for message in messages]
    if contents and isinstance(value, str):
        if value.strip() in contents or words(value) == words("\n".join(contents)):
            return True
    try:
        said = as_messages(value) or []
    except Bad:
        return False
    return bool(said) and said in (messages[:len(said)], messages[1:len(said) + 1])


def words(text: str) -> list[str]:
    """A text without its layout: "### Human: hi### Assistant: Hello!" -> ["hi", "Hello!"]."""
    return LAYOUT.sub(" ", text).split()


def first(names: Collection[str], row: dict) -> str | None:
    """The first of these keys with a value; without one the first key that is there at all."""
    return max((name for name in names if name in row), key=lambda name: not empty(row[name]), default=None)


def empty(value: Any) -> bool:
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())


def unknown(row: dict, used: Collection[str | None]) -> list[str]:
    """The keys of a row or a message with a value that nobody uses."""
    return [key for key, value in row.items() if key not in used and not empty(value)
            and (key not in METADATA or is_long(key, value))]


def is_long(key: str, value: Any) -> bool:
    """Whether a `source` or `topic` is more than a label: it may be a text to translate."""
    return key in ("source", "topic") and isinstance(value, str) and ("\n" in value or len(value) > LABEL)



def quote(value: Any, limit: int = 100) -> str:
    """A value as it is in the file, shortened: None -> null."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else f"{text[:limit]} ..."
