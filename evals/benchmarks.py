"""
evals/benchmarks.py: public multiple-choice questions, as contexts, choices and the right one.

Eight benchmarks in the layouts of their authors, from the hub or from a folder with files of the same layout:

    FOLDER/hellaswag.jsonl   FOLDER/arc_easy.parquet   ...

The *style* decides what a model reads, and thus its score. Compare only scores of the same style:

    smollm    SmolLM's own prompts, as its authors evaluated it with lighteval: each answer as a full text
    lm_eval   those of lm-evaluation-harness: commonsense_qa and mmlu ask for the letters of listed answers,
              and winogrande compares how likely the end of the sentence is after each option

    Question: What do bees make?⏎Answer:  +  " honey" | " bread" | " milk"             an item of arc_easy
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from config import UserError
from corpus.files import READERS, Bad, clean, reader_of
from corpus.hub import Hub, ask_hub

HUB = {"hellaswag": Hub("Rowan/hellaswag", split="validation"),
       "arc_easy": Hub("allenai/ai2_arc", "ARC-Easy", split="test"),
       "arc_challenge": Hub("allenai/ai2_arc", "ARC-Challenge", split="test"),
       "piqa": Hub("baber/piqa", split="validation"),
       "winogrande": Hub("allenai/winogrande", "winogrande_xl", split="validation"),
       "openbookqa": Hub("allenai/openbookqa", "main", split="validation"),
       "commonsense_qa": Hub("tau/commonsense_qa", split="validation"),
       "mmlu": Hub("cais/mmlu", "all", split="test")}
OTHER_SPLITS = {("lm_eval", "openbookqa"): Hub("allenai/openbookqa", "main", split="test")}


@dataclass(frozen=True)
class Entry:
    """A question as its authors wrote it. topic: the subject of mmlu, the activity of hellaswag, or ""."""

    topic: str
    text: str
    choices: tuple
    answer: int  # which of the choices is right


@dataclass(frozen=True)
class Item:
    """A question as a model reads it: choices[i] is scored after contexts[i], mostly all the same."""

    contexts: tuple
    choices: tuple
    answer: int


# ---------------------------------------------------------------------------------------------------------
# rows


def multiple(text: str) -> Callable[[dict], tuple]:
    """The layout of arc, openbookqa and commonsense_qa. Labels are A to E, or 1 to 4."""
    return lambda row: ("", row[text], row["choices"]["text"], row["choices"]["label"], row["answerKey"])


LAYOUTS = {  # row -> topic, text, choices, their labels, the label of the right one
    "hellaswag": lambda row: (row["activity_label"], row["ctx_a"] + " " + row["ctx_b"].capitalize(),
                              row["endings"], range(4), row["label"]),
    "arc_easy": multiple("question"), "arc_challenge": multiple("question"),
    "piqa": lambda row: ("", row["goal"], [row["sol1"], row["sol2"]], range(2), row["label"]),
    "winogrande": lambda row: ("", row["sentence"], [row["option1"], row["option2"]], (1, 2), row["answer"]),
    "openbookqa": multiple("question_stem"), "commonsense_qa": multiple("question"),
    "mmlu": lambda row: (row["subject"], row["question"], row["choices"], range(4), row["answer"])}


def entry_of(task: str, row: dict) -> Entry:
    """A row as an Entry. Raises Bad if the row does not have the layout of its benchmark."""
    try:
        topic, text, choices, labels, label = LAYOUTS[task](row)
        labels = [str(label) for label in labels]
    except KeyError as error:
        raise Bad(f"no field {error}", f"there are {list(row)}") from None
    except (AttributeError, TypeError) as error:
        raise Bad(f"not the layout of {task}", error) from None
    if not isinstance(choices, list) or not all(isinstance(part, str) for part in [topic, text, *choices]):
        raise Bad("the question, or one of its choices, is not text")
    if not text.strip() or not all(choice.strip() for choice in choices):
        raise Bad("the question, or one of its choices, is empty")
    if len(labels) != len(choices) or str(label).strip() not in labels:
        raise Bad(f"the right one is {label!r}, but the choices are {', '.join(labels)}",
                  f"and there are {len(choices)} of them")
    if task == "winogrande" and text.count("_") != 1:
        raise Bad("the sentence must have one gap, written _", text)
    return Entry(topic, text, tuple(choices), labels.index(str(label).strip()))


def locate(task: str, folder: Path | str | None, style: str = "smollm") -> Hub | Path:
    """The file of a benchmark in a folder, or its place on the hub if the folder is None."""
    if folder is None:
        return OTHER_SPLITS.get((style, task), HUB[task])
    names = [task + ending for ending in READERS if ending != ".txt"]
    found = [Path(folder) / name for name in names if (Path(folder) / name).is_file()]
    if not found:
        raise UserError(f"the folder {str(folder)!r} has no {' or '.join(names)}: put the questions there, "
                        f"with the columns of {HUB[task].path} on the hub")
    return found[0]


def hub_records(hub: Hub) -> Iterator[tuple[str, Callable]]:
    """(place, make) of a benchmark on the hub, as in corpus/files.py. `datasets` keeps a copy."""
    from datasets import load_dataset
    from huggingface_hub.errors import OfflineModeIsEnabled

    known = ask_hub(hub.path)  # or `datasets` tries for two minutes; with HF_HUB_OFFLINE=1 it uses its copy
    if isinstance(known, Exception) and not isinstance(known, OfflineModeIsEnabled):
        raise UserError(f"the hub cannot be reached for {hub.path!r} ({known}): try again with a network, or "
                        "name a folder with the questions as --benchmarks=FOLDER")
    try:
        rows = load_dataset(hub.path, hub.config, split=hub.split)
    except Exception as error:
        raise UserError(f"{hub.path!r} cannot be opened: {' '.join(str(error).split())[:300]}") from None
    for place, row in enumerate(rows, 1):
        yield f"{hub.path} {hub.split} record {place}", partial(dict, row)


def entries(task: str, folder: Path | str | None = None, style: str = "smollm") -> Iterator[Entry]:
    """The questions of a benchmark, in order. Raises UserError at the first bad one, or if there are none."""
    found = locate(task, folder, style)
    records = hub_records(found) if isinstance(found, Hub) else reader_of(found)(found)
    entry = None
    for place, make in records:
        try:
            entry = entry_of(task, clean(make()))
        except Bad as bad:
            raise UserError(f"{place} is not a question of {task}: {', '.join(map(str, bad.args))}") from None
        yield entry
    if entry is None:
        raise UserError(f"{found} contains no questions")


# ---------------------------------------------------------------------------------------------------------
# prompts

Prompt = tuple[str | tuple[str, ...], tuple[str, ...]]  # the context, or one for each choice; the choices
LETTERS = "ABCDEFGHIJ"


def without_brackets(text: str) -> str:
    """hellaswag's how-to articles contain marks of where they were cut: "[title] ... [step] ..."."""
    return re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).replace("  ", " ")


def with_space(choices: Iterable[str]) -> tuple[str, ...]:
    return tuple(" " + choice for choice in choices)


def question(entry: Entry) -> Prompt:
    return f"Question: {entry.text}\nAnswer:", with_space(entry.choices)


def text_alone(entry: Entry) -> Prompt:
    return entry.text, with_space(entry.choices)


def filled_gap(entry: Entry) -> Prompt:
    """winogrande: each option with the rest of the sentence, after what comes before the gap."""
    before, rest = entry.text.split("_")
    return before, tuple(f"{choice} {rest.strip()}" for choice in entry.choices)


def after_the_gap(entry: Entry) -> Prompt:
    """winogrande: the rest of the sentence, after each option."""
    before, rest = entry.text.split("_")
    return tuple(before + choice for choice in entry.choices), with_space([rest.strip()] * 2)


def letters(intro: str, entry: Entry) -> Prompt:
    """The choices are listed, and the model chooses between their letters."""
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, entry.choices))
    choices = with_space(LETTERS[:len(entry.choices)])
    return f"{intro}{entry.text.strip()}\n{listed}\nAnswer:", choices


def subject(entry: Entry) -> str:
    return entry.topic.replace("_", " ")


SMOLLM: dict[str, Callable[[Entry], Prompt]] = {  # as in Cosmopedia's evaluation/lighteval_tasks.py
    "hellaswag": lambda entry: (without_brackets(f"{entry.topic}: {entry.text} "),  # yes, two spaces in all
                                with_space(map(without_brackets, entry.choices))),
    "arc_easy": question, "arc_challenge": question, "piqa": question,
    "winogrande": filled_gap, "openbookqa": text_alone, "commonsense_qa": text_alone,
    "mmlu": lambda entry: (f"The following are questions about {subject(entry)}.\n{question(entry)[0]}",
                           with_space(entry.choices))}
LM_EVAL = SMOLLM | {  # version 0.4.13, lm_eval/tasks/*, without examples (0-shot); the others are asked alike
    "hellaswag": lambda entry: (without_brackets(f"{entry.topic}: {entry.text}".strip()),
                                with_space(without_brackets(choice.strip()) for choice in entry.choices)),
    "winogrande": after_the_gap,
    "commonsense_qa": partial(letters, "Question: "),
    "mmlu": lambda entry: letters("The following are multiple choice questions (with answers) about "
                                  f"{subject(entry)}.\n\n", entry)}
STYLES = {"smollm": SMOLLM, "lm_eval": LM_EVAL}


def items(task: str, style: str = "smollm", folder: Path | str | None = None,
          limit: int | None = None) -> list[Item]:
    """The questions of a benchmark as Items, at most the first `limit`; errors as in `entries`."""
    found = []
    for entry in islice(entries(task, folder, style), limit):
        context, choices = STYLES[style][task](entry)
        contexts = (context,) * len(choices) if isinstance(context, str) else context
        found.append(Item(contexts, choices, entry.answer))
    return found


def texts(task: str, folder: Path | str | None = None) -> Iterator[str]:
    """Each question with its right answer: what curate/decontaminate.py looks for in training data."""
    for entry in entries(task, folder):
        right = entry.choices[entry.answer]
        if task == "winogrande":
            yield entry.text.replace("_", right)
        else:
            text = f"{entry.text} {right}"
            yield without_brackets(text) if task == "hellaswag" else text
