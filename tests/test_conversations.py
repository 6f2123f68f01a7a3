"""corpus/conversations.py: the schemas of other people's chats and preferences, and what is bad in them."""

import json
import random
import re
import time
from dataclasses import replace

import pyarrow
import pytest
from pyarrow import parquet

from config import Config, UserError
from corpus.conversations import (
    best_and_worst,
    conversations,
    exchange,
    messages_of,
    pair_of,
    pairs_of,
    preferences,
)
from corpus.files import Bad, LeftOut
from corpus.messages import in_order, spoken

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello!"}
HI, NO = [USER, ASSISTANT], {"role": "assistant", "content": "Go away!"}
BRIEF = {"role": "system", "content": "Be brief."}
HH = "\n\nHuman: hi\n\nAssistant: "


# ---------------------------------------------------------------------------------------------------------
# chats


@pytest.mark.parametrize(
    "row",
    [
        {"messages": HI},
        {"messages": json.dumps(HI)},
        HI,
        {"messages": HI, "prompt": "hi", "prompt_id": "6f1e"},  # UltraChat
        {"messages": [{**USER, "name": None}, {**ASSISTANT, "tool_calls": None, "refusal": ""}]},
        {"messages": [{"role": "USER", "content": "hi"}, {"role": " assistant ", "content": "Hello!"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Hello!"}], "id": 7},
        {"conversations": HI},
        {"conversation": [{"role": "user", "value": "hi"}, {"from": "bot", "content": "Hello!"}]},
        {"instruction": "hi", "output": "Hello!"},
        {"instruction": "hi", "input": "", "output": "Hello!"},
        {"instruction": "hi", "context": None, "response": "Hello!", "category": "open_qa"},  # Dolly
        {"input": "hi", "output": "Hello!"},
        {"question": "hi", "answer": "Hello!", "source": "mathstackexchange"},
        {"system_prompt": "", "question": "hi", "response": "Hello!", "id": "niv.1"},  # OpenOrca
        {"prompt": "hi", "completion": "Hello!"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": "Hello!"},
        {"prompt": "hi", "completion": HI},
        {"prompt": [USER], "completion": json.dumps([ASSISTANT])},
        {"prompt": json.dumps([USER]), "completion": json.dumps([ASSISTANT])},
        {"prompt": "hi", "completion": "<|im_start|>assistant\nHello!<|im_end|>"},
        {"query": "hi", "response": "Hello!"},
        {"problem": "hi", "solution": "Hello!", "messages": HI},  # NuminaMath
        {"messages": None, "instruction": "hi", "response": "Hello!"},  # columns of a Parquet file
        {"instruction": None, "response": None, "conversations": HI, "text": ""},
        {"instruction": None, "question": "hi", "output": None, "answer": "Hello!"},
    ],
)
def test_each_schema_becomes_the_same_messages(row):
    assert messages_of(row) == HI


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [BRIEF, *HI]},
        {"messages": [{"role": "developer", "content": "Be brief."}, *HI]},
        {"messages": [BRIEF, *HI], "system": "Be brief."},
        {"messages": [{"role": "system", "content": ""}, *HI], "system": "Be brief."},
        {"system": "Be brief.", "messages": HI},
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "hi"}, ASSISTANT]},
        {"system": "Be brief.", "instruction": "hi", "output": "Hello!"},
        {"system_prompt": "Be brief.", "question": "hi", "response": "Hello!"},
        {"system": "Be brief.", "prompt": [USER], "completion": [ASSISTANT]},
        {"text": "Be brief.\n\n### Human: hi\n### Assistant: Hello!"},
    ],
)
def test_the_system_message_is_found_wherever_it_is(row):
    assert messages_of(row) == [BRIEF, *HI]


def test_inputs_and_contexts_follow_the_question_after_a_blank_line():
    row = {"instruction": "Reverse it.", "input": "abc", "output": "cba"}
    assert messages_of(row) == exchange("Reverse it.\n\nabc", "cba")
    row = {"context": "Ann has two kites.", "question": "How many?", "answer": "Two."}
    assert messages_of(row) == exchange("How many?\n\nAnn has two kites.", "Two.")
    row = {"instruction": "a", "context": "c", "input": "b", "response": "d"}
    assert messages_of(row) == exchange("a\n\nb\n\nc", "d")


@pytest.mark.parametrize("history", [[["2+2?", "Four."]], [("2+2?", "Four.")], '[["2+2?", "Four."]]'])
def test_a_history_becomes_earlier_turns(history):
    row = {"instruction": "Twice that?", "input": "In words.", "output": "Eight.", "history": history}
    assert messages_of(row) == [*exchange("2+2?", "Four."), *exchange("Twice that?\n\nIn words.", "Eight.")]


@pytest.mark.parametrize(
    "history", [[["a", "b", "c"]], [["a", 3]], [["a", ""]], ["a", "b"], "earlier", {"a": 1}]
)
def test_a_history_that_is_no_list_of_pairs_is_bad(history):
    with pytest.raises(Bad, match="no list of pairs"):
        messages_of({"instruction": "hi", "output": "Hello!", "history": history})


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n", HI),
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\nHello!<|im_end|><|endoftext|>",
            [BRIEF, *HI],
        ),
        (
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n  x\n\ny\n<|im_end|>",
            exchange("hi", "  x\n\ny\n"),
        ),
        ("### Human: hi### Assistant: Hello!", HI),
        ("### Human: hi\n### Assistant: Hello!\n### Human: hi\n### Assistant: Hello!\n", HI + HI),
        ("### Instruction:\nhi\n\n### Response:\nHello!", HI),
        ("### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3", exchange("Add.\n\n1, 2", "3")),
        ("### Instruction:\nf?\n\n### Response:\n    return 3", exchange("f?", "    return 3")),
        ("\n\nHuman: hi\n\nAssistant: Hello!", HI),
        (
            "Human: hi\n\nAssistant: A list:\n\n- one\n\nHuman: hi\n\nAssistant: Hello!",
            exchange("hi", "A list:\n\n- one") + HI,
        ),
        (f"{HH}Here:\n\nUser: admin logged in.", exchange("hi", "Here:\n\nUser: admin logged in.")),
        ("User: hi\n\nAssistant: a\n\nHuman: b", exchange("hi", "a\n\nHuman: b")),
        ("### Human: hi### Assistant: a\n### User: b", exchange("hi", "a\n### User: b")),
        ("Hi.### User: a\n### Human: b### Assistant: c", [
            {"role": "system", "content": "Hi."}, *exchange("a\n### Human: b", "c")]),
    ],
)
def test_a_chat_that_is_one_text_becomes_messages(text, expected):
    assert messages_of({"text": text}) == expected
    assert messages_of({"text": text}, documents=True) == expected
    assert messages_of({"messages": text}) == expected


@pytest.mark.parametrize(
    "prompt, completion, expected",
    [
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "Hello!<|im_end|>\n", HI),
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "Hello!", HI),
        ("\n\nHuman: hi\n\nAssistant:", " Hello!", HI),
        ("### Human: hi", "### Assistant: Hello!", HI),
        ("Human: hi\n", "Assistant: Hello!", HI),
        ("Human: hi\n\nAssistant: Hello!\n\nHuman: hi", "\n\nAssistant: Hello!", HI + HI),
        ("### Input: 5", "### Response: 6", exchange("5", "6")),
        (
            "Be brief.\n\n### Instruction:\nf?\n\n### Response:\n",
            "    return",
            [BRIEF, *exchange("f?", "    return")],
        ),
    ],
)
def test_a_prompt_in_the_marks_of_a_chat_is_read_like_the_whole_text(prompt, completion, expected):
    assert messages_of({"prompt": prompt, "completion": completion}) == expected


@pytest.mark.parametrize(
    "text",
    [
        "<s>[INST] hi [/INST] Hello!",
        "USER: hi ASSISTANT: Hello!</s>",
        "A chat between a curious user and an AI. It is polite. USER: hi ASSISTANT: Hello!</s>",  # Vicuna
        "User: hi\nAssistant: Hello!",
        "<start_of_turn>user\nhi",
        "<|start_header_id|>user<|end_header_id|>\n\nhi",
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nhi<|eot|>",
        "<|user|>\nhi</s>",
        "<|system|>\nBe brief.<|end|>",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nhi",
        "Be brief.<\uff5cUser\uff5c>hi<\uff5cAssistant\uff5c>Hello!",  # DeepSeek
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nHel",  # cut off
        "<|im_start|>user\nhi<|im_end|>\nlost\n<|im_start|>assistant\nHello!<|im_end|>",
        "A story. <|im_end|> The end.",
    ],
)
def test_a_text_with_the_marks_of_a_chat_is_never_a_document(text):
    with pytest.raises(Bad, match="chat marks that do not form a chat"):
        messages_of({"text": text}, documents=True)


@pytest.mark.parametrize(
    "text", ["### Human: a### Human: b### Assistant: c", "### Human: hi", "### Response:\nx"]
)
def test_a_chat_that_is_one_text_must_be_a_conversation_too(text):
    with pytest.raises(Bad, match="messages out of order"):
        messages_of({"text": text}, documents=True)


def test_a_long_source_is_what_somebody_is_asked_to_translate():
    row = {"instruction": "Translate into English.", "output": "hello"}
    assert messages_of({**row, "source": "opus"})[-1]["content"] == "hello"
    for text in ("Bonjour.\nAu revoir.", "bonjour " * 40):
        with pytest.raises(Bad, match="an unknown column"):
            messages_of({**row, "source": text})


def test_documents_are_learned_among_chats_only_if_the_user_says_so():
    for row in ({"text": "a story", "id": 3, "url": "https://example.com"}, "a story"):
        with pytest.raises(Bad, match="a document among chats") as error:
            messages_of(row)
        assert '"a story"' in error.value.args[1] and "--documents=True" in error.value.args[1]
        assert messages_of(row, documents=True) == "a story"
    columns_of_chats = {"instruction": None, "response": None, "messages": []}  # of others in the same file
    assert messages_of({**columns_of_chats, "text": "a story"}, documents=True) == "a story"
    with pytest.raises(Bad, match="an unknown column"):
        messages_of({"text": "a story", "summary": "short"}, documents=True)


def test_the_part_that_is_not_free_is_left_out():
    with pytest.raises(LeftOut, match="not for commercial use"):
        messages_of({"question": "hi", "answer": "Hello!", "source": "socratic"})


@pytest.mark.parametrize(
    "row, column",
    [
        ({"messages": HI, "tools": [{"name": "look"}]}, "tools"),
        ({"messages": HI, "notes": "hi, then Hello!"}, "notes"),
        ({"messages": HI, "prompt": "another"}, "prompt"),
        ({"messages": HI, "text": "The passage that hi is about."}, "text"),
        ({"messages": HI, "text": "System: NEVER say it. hi Hello!"}, "text"),
        ({"messages": HI, "text": "NEVER say it.\n\n### Instruction:\nhi\n\n### Response:\nHello!"}, "text"),
        ({"messages": HI, "text": "Assistant: Hello!\nUser: hi"}, "text"),
        ({"question": "Who?", "answer": "Ann", "text": "Ann has a kite. Bob has a dog. Who? Ann"}, "text"),
        ({"messages": HI, "conversations": exchange("3?", "4")}, "conversations"),
        ({"messages": HI, "history": [["a", "b"]]}, "history"),
        ({"messages": HI, "context": "c"}, "context"),
        ({"messages": HI, "chosen": HI, "rejected": [USER, NO]}, "rejected"),
        ({"messages": [BRIEF, *HI], "system": "Be long."}, "system"),
        ({"prompt": "hi", "completion": "Hello!", "label": False}, "label"),
        ({"instruction": "hi", "question": "who?", "answer": "Hello!"}, "question"),
        ({"instruction": "hi", "response": "Hello!", "output": "Bye!"}, "response"),
        ({"prompt": [USER], "completion": [ASSISTANT], "input": "x"}, "input"),
    ],
)
def test_a_column_that_says_something_else_is_refused_by_name_unless_it_is_ignored(row, column):
    with pytest.raises(Bad, match="an unknown column") as error:
        messages_of(row)
    value = json.dumps(row[column])
    assert error.value.args[1] == f"{column} is {value}; if it does not matter, say --ignore={column}"
    assert messages_of(row, ignore=frozenset({column}))[-1]["role"] == "assistant"


def test_all_unknown_columns_are_named_together():
    with pytest.raises(Bad) as error:
        messages_of({"messages": HI, "a": 1, "b": False, "source": "web", "c": None, "d": []})
    assert error.value.args[1] == "a is 1; if it does not matter, say --ignore=a,b"


def test_the_rendering_of_a_chat_beside_it_is_not_learned():
    """Alpaca has such a text; data sets of the hub have some as a list, too."""
    text = "Below is a task.\n\n### Instruction:\nReverse.\n\n### Input:\nabc\n\n### Response:\ncba"
    row = {"instruction": "Reverse.", "input": "abc", "output": "cba", "text": text}
    assert messages_of(row) == exchange("Reverse.\n\nabc", "cba")
    texts = [HI, f"{HH}Hello!", "<s>[INST] hi [/INST] Hello!</s>", "USER: hi ASSISTANT: Hello!</s>"]
    for text in [*texts, "Below is an instruction that describes a task.\n\n### Instruction:\nhi\n\n"
                 "### Input:\n\n\n### Response:\nHello!"]:
        assert messages_of({"instruction": "hi", "response": "Hello!", "text": text}) == HI
    everyday = {"topic": "t", "subtopic": "s", "subsubtopic": "u", "full_topic": "t/s/u", "token_length": 9}
    row = {**everyday, "completion": "User: hi\n\nAI: Hello!", "messages": HI}
    assert messages_of(row) == HI
    magpie = {"gen_input_configs": {"top_p": 1}, "difficulty": "easy", "input_quality": "good",
              "quality_explanation": "It is clear.", "task_category": "Chat", "input_length": 2}
    assert messages_of({**magpie, "instruction": "hi", "response": "Hello!", "conversations": HI}) == HI


@pytest.mark.parametrize(
    "key, value",
    [
        ("weight", 0),
        ("train", False),
        ("loss", True),
        ("name", "ann"),
        ("tool_calls", [{"name": "look"}]),
        ("reasoning_content", "hm"),
        ("from", "gpt"),
    ],
)
def test_a_key_of_a_message_that_says_more_is_refused_by_name_unless_it_is_ignored(key, value):
    row = {"messages": [USER, {**ASSISTANT, key: value}]}
    with pytest.raises(Bad, match="an unknown key of a message") as error:
        messages_of(row)
    assert error.value.args[1].startswith(f"{key} is {json.dumps(value)} where message 2 is {{")
    assert error.value.args[1].endswith(f"--ignore={key}")
    assert messages_of(row, ignore=frozenset({key, "x"})) == HI


@pytest.mark.parametrize(
    "messages, reason, quoted",
    [
        ([USER], "out of order", "user:"),
        (HI[::-1], "out of order", "assistant, user:"),
        ([ASSISTANT, *HI], "out of order", "assistant, user, assistant:"),
        ([USER, *HI], "out of order", "user, user, assistant:"),
        ([*HI, ASSISTANT], "out of order", "user, assistant, assistant:"),
        ([*HI, BRIEF], "out of order", "user, assistant, system:"),
        ([], "out of order", "none:"),
        ([{"role": "robot", "content": "hi"}, ASSISTANT], "unknown role", '"robot"'),
        ([USER, {"from": "function_call", "value": "{}"}], "unknown role", '"function_call"'),
        ([*HI, {"role": "tool", "content": "4"}], "unknown role", 'message 3 is {"role": "tool"'),
        ([{"role": "user", "content": " "}, ASSISTANT], "empty message", 'message 1 is {"role": "user"'),
        ([USER, {"role": "assistant", "content": ""}], "empty message", "message 2"),
        ([USER, {"role": "assistant", "content": None}], "without a role and a text", '"content": null'),
        ([{"role": "user", "content": 5}, ASSISTANT], "without a role and a text", '"content": 5'),
        ([{"role": 1, "content": "hi"}, ASSISTANT], "without a role and a text", '"role": 1'),
        (["hi", "Hello!"], "without a role and a text", 'message 1 is "hi"'),
        ([HI], "without a role and a text", 'message 1 is [{"role"'),
        ([{"content": "hi"}, ASSISTANT], "without a role and a text", '{"content": "hi"}'),
        ([{"Role": "user", "Content": "hi"}], "unknown key", "Role"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "a"}]}],
            "not text",
            '{"type": "image", "url": "a"}',
        ),
        ([{"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}], "not text", '"b": 1'),
        ([{"role": "user", "content": ["hi"]}, ASSISTANT], "not text", '"hi"'),
    ],
)
def test_what_is_not_a_conversation_is_bad_and_quoted_as_it_is(messages, reason, quoted):
    with pytest.raises(Bad, match=reason) as error:
        in_order(spoken(messages))
    assert quoted in error.value.args[1]


def test_a_system_message_may_come_first_and_a_user_message_last():
    system = {"role": "system", "content": ""}
    assert in_order(spoken([system, *HI, USER])) == [system, *HI, USER]


def test_several_parts_of_a_message_are_joined_by_a_line_break():
    parts = [{"type": "text", "text": "Read this:"}, {"type": "text", "text": "ünï\u00a0code"}]
    messages = spoken([{"role": "user", "content": parts}, ASSISTANT])
    assert messages[0]["content"] == "Read this:\nünï\u00a0code"


@pytest.mark.parametrize(
    "row, reason, quoted",
    [
        ({"words": "x"}, "no conversation", '{"words": "x"}; accepted are messages or conversations'),
        ({"Question": "hi", "Answer": "x"}, "no conversation", '{"Question": "hi", "Answer": "x"}'),
        (USER, "no conversation", '{"role": "user", "content": "hi"}'),  # a message per line
        ({"messages": []}, "no conversation", '{"messages": []}'),
        ({"messages": None}, "no conversation", '{"messages": null}'),
        (5, "no conversation", "5; accepted"),
        ({"text": 5}, "no conversation", '{"text": 5}'),
        ({"system": "x", "prompt": [], "completion": []}, "no conversation", '{"system": "x", "prompt": []'),
        ({"system": "x", "prompt": [], "completion": "y"}, "out of order", "assistant:"),
        ({"messages": "[]"}, "not a list of messages", 'messages is "[]"'),
        ({"messages": "user: hi"}, "not a list of messages", 'messages is "user: hi"'),
        ({"messages": "[{'role': 'user'}]"}, "not a list of messages", "messages is \"[{'role': 'user'}]\""),
        ({"messages": json.dumps(json.dumps(HI))}, "not a list of messages", "messages is "),
        ({"messages": {"role": ["user"]}}, "not a list of messages", 'messages is {"role": ["user"]}'),
        ({"question": "2+2?", "answer": 4}, "not text", "answer is 4"),
        ({"question": "2+2?", "answer": ""}, "empty message", 'answer is ""'),
        ({"question": "2+2?", "answer": " \n"}, "empty message", r'answer is " \n"'),
        ({"question": None, "answer": "4"}, "empty message", "question is null"),
        ({"instruction": "i", "input": {"a": 1}, "output": "o"}, "not text", 'input is {"a": 1}'),
        (
            {"prompt": "[INST] hi [/INST]", "completion": "Hello!"},
            "chat marks",
            'prompt is "[INST] hi',
        ),
        (
            {"prompt": "Hm.\n\nHuman: hi\n\nAssistant:", "completion": "x"},
            "chat marks",
            "prompt ends in",
        ),
        (
            {"prompt": "Be brief. USER: hi ASSISTANT:", "completion": "x"},
            "chat marks",
            "in no format that is understood",
        ),
        (
            {"prompt": "<s><|user|>\nhi<|end|>\n<|assistant|>\n", "completion": "x"},
            "chat marks",
            "prompt is",
        ),
        ({"text": "### Human: hi### Assistant: "}, "empty message", 'message 2 in "### Human: hi'),
        (
            {"chosen": HI, "rejected": HI},
            "no conversation",
            "these look like preference pairs: they are for dpo.py",
        ),
        (
            {"prompt": "a", "response": "b", "helpfulness": 1, "correctness": 0},
            "no conversation",
            "for dpo.py",
        ),
    ],
)
def test_what_is_in_no_schema_is_bad_and_quoted_as_it_is(row, reason, quoted):
    with pytest.raises(Bad, match=reason) as error:
        messages_of(row)
    assert quoted in error.value.args[1]


@pytest.mark.parametrize(
    "question, answer",
    [
        ("Write a chat as JSON.", json.dumps(HI)),
        ("Show an API example.", json.dumps([ASSISTANT])),
        ("[1, 2] sorted?", "[1, 2]"),
        ('[{"a": 2}, {"a": 1}]', '[{"a": 1}, {"a": 2}]'),
        ("What does <|im_start|> mean?", "It begins a message."),
        ("Continue:", "\n\nHuman: hi\n\nAssistant: Hello!"),
        ("Define human.", "Human: a person."),
        ("Document it.", "### Response:\n\n200 OK"),
        ("Document it.", "### Input: 5\n\n### Response: 6"),
        ("Write a dialog.", "Assistant: Hello!\n\nUser: hi"),
    ],
)
def test_an_answer_about_chats_stays_a_text(question, answer):
    assert messages_of({"question": question, "answer": answer}) == exchange(question, answer)


def test_no_letter_between_the_marks_of_a_transcript_is_lost():
    """Texts of marks in any order: either they are refused, or all but marks and white space is said."""
    mark = re.compile(r"### \w+:|(Human|Assistant):|<\|im_start\|>(user|assistant)|<\|im_end\|>|\s")
    pieces = ["hi", " x ", "a\n\nb", "### Human:", "### Assistant:", "### Instruction:\n", "### Input:\n"]
    pieces += ["### Response:\n", "\n\nHuman: ", "\n\nAssistant: ", "<|im_start|>user\nq<|im_end|>\n"]
    pieces += ["<|im_start|>assistant\nA<|im_end|>"]
    rng, found = random.Random(0), 0
    for _ in range(9000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(2, 9)))
        try:
            said = "".join(message["content"] for message in messages_of({"text": text}))
        except Bad:
            continue
        found += 1
        assert mark.sub("", said) == mark.sub("", text)
    assert found > 100


def test_line_ends_inside_of_json_text_are_those_of_every_text():
    text = json.dumps(exchange("a\r\nb", "c\u2028d"))
    assert messages_of({"messages": text}) == exchange("a\nb", "c\nd")


def test_large_and_strange_texts_are_read_in_linear_time():
    texts = [" " * 99_999 + "Human:" + "\n" * 99_999, "### " * 99_999, "[" * 99_999, "User: " + "a " * 99_999]
    start = time.process_time()
    for text in texts:
        messages_of({"question": text.strip(), "answer": text.strip()[:-1] + "y"})
    assert time.process_time() - start < 10


# ---------------------------------------------------------------------------------------------------------
# pairs


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": HI, "rejected": [USER, NO], "chosen_rating": 5.0, "rejected_rating": 2},
        {"chosen": HI, "rejected": [USER, NO], "chosen_rating": "10", "rejected_rating": "9.5"},
        {"chosen": HI, "rejected": [USER, NO], "chosen_rating": "", "rejected_rating": 2},
        {"chosen": json.dumps(HI), "rejected": json.dumps([USER, NO])},
        {"chosen": [{"from": "human", "value": "hi"}, ASSISTANT], "rejected": [USER, NO]},
        {"chosen": f"{HH}Hello!", "rejected": f"{HH}Go away!"},
        {"prompt": "hi", "chosen": "Hello!", "rejected": "Go away!"},
        {"question": "hi", "chosen": "Hello!", "rejected": "Go away!", "system": ""},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [NO]},
        {"prompt": [USER], "chosen": "Hello!", "rejected": "Go away!"},
        {"prompt": "hi", "chosen": [ASSISTANT], "rejected": [NO]},
        {
            "prompt": "hi",
            "prompt_id": "a",
            "chosen": HI,
            "rejected": [USER, NO],
            "messages": HI,
            "score_chosen": 8.5,
            "score_rejected": 8.5,
        },  # UltraFeedback
        {
            "prompt": "\n\nHuman: hi\n\nAssistant:",
            "response": " Hello!",
            "chosen": " Hello!",
            "rejected": " Go away!",
        },
    ],
)
def test_pairs_become_a_prompt_and_two_answers(row):
    assert pair_of(row) == ([USER], "Hello!", "Go away!")


def test_all_that_belongs_to_the_prompt_of_a_pair_is_in_it():
    row = {"system": "Be brief.", "question": "hi", "chosen": "Hello!", "rejected": "Go away!"}  # Orca
    assert pair_of(row) == ([BRIEF, USER], "Hello!", "Go away!")
    row |= {"history": [["a", "b"]], "context": "c"}
    prompt = [BRIEF, *exchange("a", "b"), {"role": "user", "content": "hi\n\nc"}]
    assert pair_of(row) == (prompt, "Hello!", "Go away!")
    row = {"system": "Be brief.", "chosen": HI, "rejected": [USER, NO], "messages": HI}
    assert pair_of(row) == ([BRIEF, USER], "Hello!", "Go away!")
    turns = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    prompt = [*exchange("a", "b"), {"role": "user", "content": "c"}]
    assert pair_of({"chosen": f"{turns}d", "rejected": f"{turns}e"}) == (prompt, "d", "e")


@pytest.mark.parametrize(
    "row, reason, quoted",
    [
        ({"chosen": HI, "rejected": exchange("hello", "Go away!")}, "not a pair", '"Go away!"'),
        ({"chosen": HI + HI, "rejected": HI}, "not a pair", "they have 4 and 2 messages"),
        ({"chosen": [*HI, USER], "rejected": [*HI, USER]}, "not a pair", "end in"),
        ({"chosen": [USER], "rejected": [USER]}, "out of order", "user:"),
        (
            {"prompt": "hi", "chosen": "x", "rejected": None},
            "without two answers",
            "rejected is null; accepted",
        ),
        ({"prompt": "hi", "chosen": [], "rejected": "x"}, "without two answers", "chosen is []"),
        ({"prompt": "hi", "chosen": "x"}, "without two answers", "there is no rejected"),
        ({"prompt": "hi", "chosen": 5, "rejected": 6}, "not text", "chosen is 5"),
        ({"prompt": "hi", "chosen": "x", "rejected": ["y"]}, "without a role", 'message 1 is "y"'),
        ({"chosen": "x", "rejected": "y"}, "an answer without a question", 'chosen is "x"'),
        ({"chosen": f"{HH}x", "rejected": HH}, "empty message", "message 2 in "),
        ({"prompt": "hi", "chosen": "x", "rejected": "y", "margin": 2}, "unknown column", "margin is 2"),
        ({"prompt": "other", "chosen": HI, "rejected": [USER, NO]}, "unknown column", 'prompt is "other"'),
        (
            {"prompt": "hi", "chosen": "x", "rejected": "y", "score_chosen": 2, "score_rejected": 8},
            "scores that contradict",
            "score_chosen is 2, score_rejected 8",
        ),
        (
            {"prompt": "hi", "chosen": "x", "rejected": "y", "score_chosen": "9", "score_rejected": "10"},
            "scores that contradict",
            'score_chosen is "9", score_rejected "10"',
        ),
        *(
            (
                {"prompt": "hi", "chosen": "x", "rejected": "y", "score_chosen": score, "score_rejected": 1},
                "a score that is not a number",
                f"score_chosen is {json.dumps(score)}; if it does not matter, say --ignore=score_chosen",
            )
            for score in ("good", [4])
        ),
        ({"text": "x"}, "no pair", '{"text": "x"}; accepted are chosen and rejected'),
        ("a page", "no pair", 'it is a document: "a page"'),
        (HI, "no pair", "no row with columns"),
        ({"messages": HI}, "no pair", "this looks like a chat: chats are for sft.py"),
        ({"prompt": "hi", "completion": "x"}, "no pair", "this looks like a chat"),
        ({"prompt": "hi", "response": "x", "helpfulness": "4", "correctness": 4}, "no whole number", '"4"'),
        ({"prompt": "hi", "response": "x", "helpfulness": True, "correctness": 4}, "no whole number", "true"),
        ({"prompt": "hi", "response": "x", "helpfulness": 5, "correctness": 4}, "no whole number", "5"),
        ({"prompt": "hi", "response": "x", "helpfulness": 4}, "no whole number", '"correctness": null'),
        (
            {"prompt": "hi", "response": "", "helpfulness": 4, "correctness": 4},
            "empty message",
            'response is ""',
        ),
    ],
)
def test_what_is_not_a_pair_is_bad_and_quoted_as_it_is(row, reason, quoted):
    with pytest.raises(Bad, match=reason) as error:
        pair_of(row)
    assert quoted in error.value.args[1]


def test_pairs_without_a_difference_are_left_out_and_what_is_ignored_is_not_looked_at():
    with pytest.raises(LeftOut, match="no difference between chosen and rejected"):
        pair_of({"prompt": "hi", "chosen": "x", "rejected": "x"})
    row = {
        "prompt": "hi",
        "chosen": "x",
        "rejected": "y",
        "margin": 2,
        "score_chosen": 2,
        "score_rejected": 8,
    }
    ignore = frozenset({"margin", "score_chosen", "score_rejected"})
    assert pair_of(row, ignore=ignore) == ([USER], "x", "y")


def rated(prompt, *answers):
    return [
        {"prompt": prompt, "response": text, "helpfulness": a, "correctness": b, "verbosity": 2}
        for text, a, b in answers
    ]


def test_helpsteer_becomes_pairs_of_best_and_worst_and_ties_are_counted():
    rows = [
        *rated("p", ("middle", 2, 3), ("best", 4, 4), ("worst", 0, 1)),
        *rated("tie", ("x", 3, 1), ("y", 2, 2)),
        *rated("alone", ("z", 4, 4)),
    ]
    found, ties = best_and_worst(map(pair_of, rows))
    assert found == [([{"role": "user", "content": "p"}], "best", "worst")] and ties == 2


def test_helpsteer_2_has_prompts_of_several_turns():
    """They are told apart by all of their turns, not by the last one."""
    rows = []
    for first in "ab":
        mark = "<extra_id_1>User\n" if first == "b" else ""
        prompt = f"{mark}{first}\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc"
        rows += rated(prompt, (f"{first} best", 4, 4), (f"{first} worst", 1, 1))
    found, _ = best_and_worst(map(pair_of, rows))
    last = {"role": "user", "content": "c"}
    assert found == [([*exchange(f, "b"), last], f"{f} best", f"{f} worst") for f in "ab"]


# ---------------------------------------------------------------------------------------------------------
# sources


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chats_of(cfg):
    return [item for documents in conversations(cfg) for item in documents]


def pairs_in(cfg):
    return [pair for documents in preferences(cfg) for pair in pairs_of(documents)]


def test_sources_follow_each_other_and_each_gives_its_fraction(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"messages": exchange(f"a {i}", "x")} for i in range(100)])
    table = pyarrow.table({"instruction": [f"b {i}" for i in range(1000)], "response": ["x"] * 1000})
    parquet.write_table(table, tmp_path / "b.parquet")
    cfg = Config(data=((a, 1.0), (str(tmp_path / "b.parquet"), 0.1)), fractions=True)
    found = [messages[0]["content"] for messages in chats_of(cfg)]
    assert found[:100] == [f"a {i}" for i in range(100)] and 70 < len(found[100:]) < 130
    assert found == [messages[0]["content"] for messages in chats_of(cfg)]
    other = replace(cfg, data_seed=1)
    assert found[100:] != [messages[0]["content"] for messages in chats_of(other)][100:]


def test_rated_answers_and_pairs_can_be_used_together(tmp_path):
    a = write(tmp_path / "a.jsonl", [*rated("p", ("best", 4, 4), ("worst", 0, 1)), *rated("q", ("x", 1, 1))])
    b = write(tmp_path / "b.jsonl", [{"chosen": HI, "rejected": [USER, NO]}])
    cfg = Config(data=((a, 1.0), (b, 1.0)), fractions=True)
    assert [pair[1:] for pair in pairs_in(cfg)] == [("best", "worst"), ("Hello!", "Go away!")]


def test_a_bad_chat_is_reported_with_its_file_and_line_or_counted(tmp_path):
    rows = [{"messages": exchange(f"a {i}", "x")} for i in range(200)]
    rows[150] = {"messages": [{"role": "user", "content": ""}, ASSISTANT]}
    cfg = Config(data=((write(tmp_path / "a.jsonl", rows), 1.0),), fractions=True)
    said = r'a.jsonl line 151: an empty message \(message 1 is {"role": "user", "content": ""}\)'
    with pytest.raises(UserError, match=said):
        chats_of(cfg)
    assert len(chats_of(replace(cfg, on_bad="skip"))) == 199


def test_columns_and_keys_named_by_ignore_are_left_out(tmp_path):
    chats = write(tmp_path / "a.jsonl", [{"messages": [USER, {**ASSISTANT, "weight": 1}], "notes": "x"}])
    cfg = Config(data=((chats, 1.0),), fractions=True)
    with pytest.raises(UserError, match="--ignore=weight"):
        chats_of(cfg)
    assert chats_of(replace(cfg, ignore="notes, weight")) == [HI]
    pairs = write(tmp_path / "b.jsonl", [{"prompt": "hi", "chosen": "x", "rejected": "y", "notes": "z"}])
    assert pairs_in(replace(cfg, data=((pairs, 1.0),), ignore="notes")) == [([USER], "x", "y")]


def test_the_built_in_source_means_chats_to_sft_and_pairs_to_dpo():
    assert isinstance(next(iter(conversations(Config())[0])), list)
    prompt, chosen, rejected = next(pairs_of(preferences(Config())[0]))
    assert prompt[-1]["role"] == "user" and chosen != rejected


@pytest.mark.parametrize("source", ["builtin-world", "builtin-transcripts"])
def test_built_in_documents_may_be_among_chats(source):
    (documents,) = conversations(Config(data=((source, 1.0),), fractions=True))
    assert isinstance(next(iter(documents)), str)


def test_data_sets_on_the_hub_are_read_by_their_columns(tmp_path, monkeypatch):
    """On folders with the layout and the schemas of the hub."""
    from corpus import sources
    from corpus.hub import HUB

    tables = {
        "webinstruct": {
            "orig_question": ["q"] * 2,
            "question": ["hi", "no"],
            "answer": ["Hello!", "x"],
            "source": ["stackexchange", "socratic"],
            "index": [1, 2],
        },
        "self-oss-instruct": {"id": [1], "prompt": ["p"], "instruction": ["hi"], "response": ["Hello!"]},
        "everyday-conversations": {"topic": ["t"], "messages": [HI]},
        "instruct-data-basics": {"instruction": ["hi"], "response": ["Hello!"], "text": [HI]},
        "smol-smoltalk": {"messages": [HI], "source": ["smol-magpie-ultra-short"]},
        "helpsteer": {
            "prompt": ["hi"] * 2,
            "response": ["Hello!", "Go"],
            "helpfulness": [4, 0],
            "correctness": [4, 1],
            "coherence": [4, 4],
            "complexity": [1, 1],
            "verbosity": [1, 1],
        },
        "dpo-mix-7k": {
            "dataset": ["d"],
            "chosen": [HI],
            "rejected": [exchange("hi", "Go")],
            "chosen_rating": [5.0],
            "rejected_rating": [1.0],
        },
        "ultrafeedback-binarized": {
            "prompt": ["hi"],
            "prompt_id": ["6f1e"],
            "chosen": [HI],
            "rejected": [exchange("hi", "Go")],
            "messages": [HI],
            "score_chosen": [8.5],
            "score_rejected": [3.0],
        },
    }
    for name, columns in tables.items():
        folder = tmp_path / name / "data"
        folder.mkdir(parents=True)
        parquet.write_table(pyarrow.table(columns), folder / f"{HUB[name].split}-00000-of-00001.parquet")
        monkeypatch.setitem(sources.HUB, name, replace(HUB[name], path=str(tmp_path / name)))
        cfg = Config(data=((name, 1.0),), fractions=True)
        if name in ("helpsteer", "dpo-mix-7k", "ultrafeedback-binarized"):
            assert pairs_in(cfg) == [(HI[:1], "Hello!", "Go")], name
        else:
            assert chats_of(cfg) == [HI], name
