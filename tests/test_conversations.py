"""corpus/conversations.py: the schemas of other people's chats and preferences, and what is bad in them."""

import json
from dataclasses import replace

import pyarrow
import pytest
from pyarrow import parquet

from config import Config, UserError
from corpus.conversations import (
    best_and_worst,
    check_messages,
    conversations,
    exchange,
    messages_of,
    pair_of,
    preferences,
)
from corpus.files import Bad

HI = exchange("hi", "Hello!")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": HI},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Hello!"}], "id": 7},
        {"instruction": "hi", "response": "Hello!", "prompt": "the generator's prompt"},
        {"question": "hi", "answer": "Hello!", "source": "mathstackexchange"},
    ],
)
def test_each_schema_becomes_the_same_messages(row):
    assert messages_of(row) == HI


def test_documents_stay_texts_and_the_part_that_is_not_free_is_left_out():
    assert messages_of({"text": "a story"}) == "a story"
    assert messages_of({"question": "hi", "answer": "Hello!", "source": "socratic"}) is None


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([{"role": "user", "content": "hi"}], "out of order"),
        (HI[::-1], "out of order"),
        ([*HI, *HI[1:]], "out of order"),
        ([*HI, {"role": "system", "content": "x"}], "out of order"),
        ([], "out of order"),
        ([{"role": "robot", "content": "hi"}, HI[1]], "unknown role"),
        ([{"role": "user", "content": " "}, HI[1]], "empty message"),
        ([{"role": "user", "content": None}, HI[1]], "without a role and a text"),
        (["hi", "Hello!"], "without a role and a text"),
        ([{"content": "hi"}, HI[1]], "without a role and a text"),
    ],
)
def test_what_is_not_a_conversation_is_bad(messages, reason):
    with pytest.raises(Bad, match=reason):
        check_messages(messages)


def test_a_system_message_may_come_first_and_a_user_message_last():
    system = {"role": "system", "content": ""}
    assert check_messages([system, *HI, HI[0]]) == [system, *HI, HI[0]]


def test_the_error_for_a_row_in_no_schema_names_its_fields():
    with pytest.raises(Bad, match="no conversation") as error:
        messages_of({"words": "x"})
    assert "words" in error.value.args[1] and "messages" in error.value.args[1]


def test_pairs_for_sft_and_chats_for_dpo_are_sent_to_the_other_script():
    with pytest.raises(Bad, match="these look like preference pairs: they are for dpo.py"):
        messages_of({"chosen": HI, "rejected": HI})
    with pytest.raises(Bad, match="this looks like a chat: chats are for sft.py"):
        pair_of({"messages": HI})


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": HI, "rejected": exchange("hi", "Go away!"), "chosen_rating": 5.0},
        {"prompt": "hi", "chosen": "Hello!", "rejected": "Go away!"},
    ],
)
def test_pairs_become_a_prompt_and_two_answers(row):
    assert pair_of(row) == (HI[:1], "Hello!", "Go away!")


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"chosen": HI, "rejected": exchange("hello", "Go away!")}, "not a pair"),
        ({"chosen": HI[:1], "rejected": HI[:1]}, "out of order"),
        ({"text": "x"}, "no pair"),
        ({"prompt": "hi", "response": "x", "helpfulness": "4", "correctness": 4}, "not a whole number"),
    ],
)
def test_what_is_not_a_pair_is_bad(row, reason):
    with pytest.raises(Bad, match=reason):
        pair_of(row)


def rated(prompt, *answers):
    return [
        {"prompt": prompt, "response": text, "helpfulness": a, "correctness": b} for text, a, b in answers
    ]


def test_helpsteer_becomes_pairs_of_best_and_worst_and_ties_are_dropped():
    rows = [
        *rated("p", ("middle", 2, 3), ("best", 4, 4), ("worst", 0, 1)),
        *rated("tie", ("x", 3, 1), ("y", 2, 2)),
        *rated("alone", ("z", 4, 4)),
    ]
    found = list(best_and_worst(map(pair_of, rows)))
    assert found == [([{"role": "user", "content": "p"}], "best", "worst")]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_sources_follow_each_other_and_each_gives_its_fraction(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"messages": exchange(f"a {i}", "x")} for i in range(100)])
    table = pyarrow.table({"instruction": [f"b {i}" for i in range(1000)], "response": ["x"] * 1000})
    parquet.write_table(table, tmp_path / "b.parquet")
    cfg = Config(data=((a, 1.0), (str(tmp_path / "b.parquet"), 0.1)), fractions=True)
    found = [messages[0]["content"] for messages in conversations(cfg)]
    assert found[:100] == [f"a {i}" for i in range(100)] and 70 < len(found[100:]) < 130
    assert found == [messages[0]["content"] for messages in conversations(cfg)]
    other = replace(cfg, data_seed=1)
    assert found[100:] != [messages[0]["content"] for messages in conversations(other)][100:]


def test_rated_answers_and_pairs_can_be_used_together(tmp_path):
    a = write(tmp_path / "a.jsonl", rated("p", ("best", 4, 4), ("worst", 0, 1)))
    b = write(tmp_path / "b.jsonl", [{"chosen": HI, "rejected": exchange("hi", "Go away!")}])
    cfg = Config(data=((a, 1.0), (b, 1.0)), fractions=True)
    assert [pair[1:] for pair in preferences(cfg)] == [("best", "worst"), ("Hello!", "Go away!")]


def test_a_bad_chat_is_reported_with_its_file_and_line_or_counted(tmp_path):
    rows = [{"messages": exchange(f"a {i}", "x")} for i in range(200)]
    rows[150] = {"messages": [{"role": "user", "content": ""}, HI[1]]}
    cfg = Config(data=((write(tmp_path / "a.jsonl", rows), 1.0),), fractions=True)
    with pytest.raises(UserError, match=r"a.jsonl line 151: an empty message \(message 1 of the user\)"):
        list(conversations(cfg))
    assert len(list(conversations(replace(cfg, on_bad="skip")))) == 199


def test_the_built_in_source_means_chats_to_sft_and_pairs_to_dpo():
    assert isinstance(next(conversations(Config())), list)
    prompt, chosen, rejected = next(preferences(Config()))
    assert prompt[-1]["role"] == "user" and chosen != rejected


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
    }
    for name, columns in tables.items():
        folder = tmp_path / name / "data"
        folder.mkdir(parents=True)
        parquet.write_table(pyarrow.table(columns), folder / f"{HUB[name].split}-00000-of-00001.parquet")
        monkeypatch.setitem(sources.HUB, name, replace(HUB[name], path=str(tmp_path / name)))
        cfg = Config(data=((name, 1.0),), fractions=True)
        if name in ("helpsteer", "dpo-mix-7k"):
            assert list(preferences(cfg)) == [(HI[:1], "Hello!", "Go")], name
        else:
            assert list(filter(None, conversations(cfg))) == [HI], name
