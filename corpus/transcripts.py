"""
transcripts.py: chats that were written as one text, back into messages.

    ChatML        <|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>
    Guanaco       ### Human: hi### Assistant: Hello!
    Alpaca        ### Instruction:\\nAdd.\\n\\n### Input:\\n1, 2\\n\\n### Response:\\n3
    HH            \\n\\nHuman: hi\\n\\nAssistant: Hello!
    HelpSteer 2   hi\\n<extra_id_1>Assistant\\nHello!\\n<extra_id_1>User\\nWho are you?

Learned as plain text, such marks would be letters that the model never meets again, and the questions would
be targets. So a text that looks like a chat in a format that is not understood is refused, not guessed at.
The user has one name in a text, Human or User, whichever comes first; the other is a word like any other.
What precedes the first mark of Guanaco and Alpaca ("Below is an instruction ...") is the system message.
Alpaca's input follows its instruction after a blank line.
"""

import re

from corpus.files import Bad

ROLES = {"human": "user", "instruction": "user", "response": "assistant"}
HEADERS = (  # each splits a text into [preamble, name, content, name, content, ...]
    r"(?:\A\s*|\n\n)(Human|User|Assistant):", r"### ?(Human|User|Assistant|System):",
    r"### ?(Instruction|Input|Response):", r"(?:\A|\n)<extra_id_1>(User|Assistant)\n",
)
CHATML = re.compile(r"<\|im_(?:start|end)\|>")
OPEN = re.compile(r"(<\|im_start\|>assistant|\n\nAssistant:|\sASSISTANT:|### ?(Assistant|Response):)\s*\Z")
OTHERS = re.compile(  # marks of formats that are not understood, and some of ours in the wrong place
    r"(<s>|<bos>|<\|begin_of_text\|>)?(\[/?INST\]|<<SYS>>|<start_of_turn>|<extra_id_1>(User|Assistant)"
    r"|<[|\uff5c](?i:user|assistant|system|start_header_id|header_start)[|\uff5c]>)"
    r"|### ?(Human|Assistant|Instruction):|\A\s*(User|USER|Human):(?s:.)*\s(Assistant|ASSISTANT):")
VICUNA = re.compile(r"\b(USER|ASSISTANT):")  # after a preamble of any length


def parse(text: str) -> list[dict[str, str]] | None:
    """The messages of a text in one of these formats; None for any other text."""
    if CHATML.match(text.lstrip()):
        return chatml(text)
    if text.count("<extra_id_1>Assistant\n"):
        text = text if text.startswith("<extra_id_1>") else "<extra_id_1>User\n" + text
    for header in HEADERS:
        user = next((name for name in re.findall(header, text) if name in ("Human", "User")), "User")
        preamble, *found = re.split(header.replace("Human|User", user), text)
        names, contents = [name.lower() for name in found[::2]], found[1::2]
        roles = [ROLES.get(name, name) for name in names]
        both, begins = {"user", "assistant"} <= set(roles), not preamble.strip()
        if (both and begins) or ("#" in header and (both or (roles and begins))):
            messages = [{"role": "system", "content": preamble.strip()}] if preamble.strip() else []
            for role, content in zip(roles, contents):
                content = re.sub(r"\A[ \n]", "", content).rstrip()  # what follows the mark is layout
                if role != "input":
                    messages.append({"role": role, "content": content})
                elif content:
                    last = messages.pop()["content"] + "\n\n" if messages else ""
                    messages.append({"role": "user", "content": last + content})
            return messages
    return None


def chatml(text: str) -> list[dict[str, str]]:
    """"<|im_start|>user\\nhi<|im_end|>" -> messages. The last one may be an empty one of the assistant."""
    before, *turns = text.split("<|im_start|>")
    messages, rest = [], before
    for number, turn in enumerate(turns, 1):
        role, _, content = turn.partition("\n")
        content, end, after = content.partition("<|im_end|>")
        if not end and (number < len(turns) or role.strip() != "assistant" or content.strip()):
            raise Bad("chat marks that do not form a chat",
                      f"its turn {number} has no <|im_end|>: {turn[:80]!r}")
        messages.append({"role": role, "content": content if end else ""})
        rest += after
    rest = rest.replace("<|endoftext|>", "")
    if rest.strip():
        raise Bad("chat marks that do not form a chat", f"{rest.strip()[:80]!r} is in no turn")
    return messages


def completed(prompt: str, answer: str) -> list[dict[str, str]] | None:
    """The messages of a prompt that ends where its answer begins, "\\n\\nHuman: hi\\n\\nAssistant:", and of
    that answer, or of "Human: hi" and "Assistant: Hello!"; None for any other prompt."""
    if re.match(r"\s*(Human|User):", prompt) and re.match(r"\s*Assistant:", answer):
        return parse(f"{prompt.rstrip()}\n\n{answer.lstrip()}")
    if not OPEN.search(prompt):
        return None
    messages = parse(prompt + answer + ("" if "<|im_" in answer or "<|im_" not in prompt else "<|im_end|>"))
    if messages is None:
        raise Bad("chat marks that do not form a chat", f"a prompt ends in {prompt[-60:]!r}, but is in no "
                  "format that is understood")
    return messages


def has_marks(text: str) -> bool:
    """Whether a text has marks of some chat format, anywhere."""
    return bool(CHATML.search(text) or OTHERS.search(text) or len(set(VICUNA.findall(text))) == 2)


def begins_with_marks(text: str) -> bool:
    return OTHERS.match(text.lstrip()) is not None
