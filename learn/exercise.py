"""
learn/exercise.py: can you write it yourself? Each exercise is one function of this project without its body.

    python -m learn.exercise                    lists the exercises in the order of the course
    python -m learn.exercise rope               copies the project to out/exercise/rope, without that body
    python -m learn.exercise rope --hint        two or three sentences that lead there
    python -m learn.exercise rope --solution    the body that was cut out

The signature and the docstring stay: they say what goes in and what comes out. The tests are the project's
own, which compare with a formula, a slower version, or another library. Edit the copy, run the command, until
they are green.
"""

import argparse
import ast
import difflib
import os
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path

from config import UserError
from plumbing import disk
from plumbing.processes import command

CHAPTERS = ("text to tokens", "rows and targets", "embedding, residual stream, head, loss",
            "attention, heads, RoPE", "training", "writing", "chats", "preferences")


@dataclass(frozen=True)
class Station:
    """One exercise. tests: the files, and words of the names of the tests that must turn green."""

    name: str
    chapter: int
    function: str
    tests: tuple[str, str]
    task: str
    hint: str


STATIONS = [
    Station("merge", 1, "tokenizer.merge", ("test_tokenizer.py", "joins_every train_bpe_slowly"),
            "Copy the word from left to right, and write `new` wherever the pair occurs.",
            "Keep an index. At the pair it moves by two places, otherwise by one: in 5 5 5 the second 5 is "
            "used up by the first pair. The last item has no neighbor to compare with."),
    Station("counts", 1, "tokenizer.merge_and_count", ("test_tokenizer.py", "long_word fast_trainer"),
            "Merge as merge does, and return how often each pair of neighbors appeared (above 0) or "
            "disappeared (below 0). Begin with counting the old and the new word whole; then count only "
            "what is next to a merge.",
            "Collect the places where the pair occurs. A merge at place i touches the old pairs i - 1, i "
            "and i + 1, and two pairs of the new word; n merges further left have moved those n places to "
            "the left. Two merges may touch the same pair: count it once."),
    Station("encode", 1, "tokenizer.encode_bpe", ("test_tokenizer.py", "encode_bpe"),
            "Cut the text into words with `split`. In each word, which is a list of characters at first, "
            "join the pair that was merged first in training, until no known pair is left.",
            "Of all pairs of neighbors, take the one with the smallest rank; a pair without a rank was "
            "never merged. `merge` writes the new token, which is both texts together. The same pair may "
            "occur twice, and joining one pair can make another one possible."),
    Station("targets", 2, "data.inputs_and_targets", ("test_data.py", "targets_of_a_row every_target"),
            "Cut rows of T + 1 ids into inputs and targets, and number the documents of each row.",
            "Inputs and targets are two slices of the same rows: one leaves out the last column, the other "
            "the first. For doc, write a 1 where an input is END and add up from the left; an END must not "
            "count for itself."),
    Station("permutation", 2, "data.permute", ("test_data.py", "test_permute"),
            "Shuffle the numbers 0 to n - 1 without a list: a Feistel network of six turns on the bits of "
            "i, with `scramble` for the copy, and another key in each turn.",
            "Split i into left and right, `half` bits each, so that 2 * half bits can hold n - 1. A turn "
            "is: the new left is the old right, and the new right is the old left XOR some function of "
            "right and key, cut to half bits. While the result is n or more, run it through again."),
    Station("norm", 3, "model.RMSNorm.forward", ("test_model.py", "the_norm"),
            "Divide each position's vector by its root mean square, and multiply by the weight: the formula "
            "is in the docstring of the class. Compute in float32 and return the dtype of x.",
            "Square, average over the last dimension and keep that dimension, add eps, take the root. eps "
            "belongs under the root. torch has the formula as one function, too."),
    Station("gradient", 3, "model.log_probs_in_chunks",
            ("test_model.py", "plain_formula without_a_target without_gradients memory_grows"),
            "Compute the log-probabilities of the targets from chunks of logits: LOGITS_AT_ONCE // V "
            "positions at a time, and only positions whose target is not IGNORE. With weight, add up the "
            "gradients, too. Sums and logarithms are in float32 at least.",
            "The gradient of log p(target) in the logits is onehot(target) - softmax(logits), times the "
            "position's weight. Call it d_logits (n, V): then d_x is d_logits @ head, and each chunk adds "
            "d_logits.T @ x to d_head. exp(log_softmax) is softmax: no second one is needed."),
    Station("attention", 4, "model.attend_slowly", ("test_model.py", "attend_slowly"),
            "Write attention as the formula: scores, mask, softmax, weighted mean. Use no softmax of torch.",
            "Repeat each key and value head for its H / K query heads (repeat_interleave). A hidden score "
            "is minus infinity, so its exp is 0. Subtract the largest score of a row before exp: softmax "
            "stays the same, and scores of a thousand no longer overflow."),
    Station("rope", 4, "model.rotate", ("test_model.py", "to_rotate rope_scores"),
            "Rotate each pair (x[i], x[i + D/2]) by the angle whose cosine and sine are in `rope`.",
            "The tables are (T, D) wide: each angle appears twice, in both halves. So x * cos is right for "
            "both halves at once; what is added is a copy of x with its halves swapped and one sign "
            "changed, times sin. Return the dtype of x: the tables are float32."),
    Station("schedule", 5, "train.lr_at", ("test_train.py", "test_wsd test_cosine jump_down"),
            "Return the learning rate of a step: a line from 0 to cfg.lr over cfg.warmup steps, then what "
            "cfg.schedule says. wsd falls in the last cfg.decay of cfg.max_steps steps.",
            "Treat the warm-up first, and beware of a division by a warm-up of 0. After it, turn the step "
            "into a share from 0 to 1 of the part it is in: wsd is 1 - sqrt(share) in the decay, cosine is "
            "(1 + cos(pi * share)) / 2 from the end of the warm-up to the last step."),
    Station("muon", 5, "train.orthogonalize", ("test_muon.py", "singular_values"),
            "Scale each matrix so that no singular value is above 1, and apply the polynomial five times.",
            "The norm over both dimensions is at least the largest singular value. Powers of a matrix that "
            "is not square go through A = X X^T: the polynomial is 3.4445 X + (-4.7750 A + 2.0315 A A) X."),
    Station("accounting", 5, "train.add_up",
            ("test_train.py", "name_by_name own_divisor"),
            "Add up the (sum, count) of each name over the micro-batches and the processes. "
            "run.union(names) are the names that any process has, and run.sum(tensor) adds a tensor over "
            "all of them.",
            "Every process must call run.sum with a tensor of the same length and order, so take the names "
            "from run.union and put (0, 0) where one is missing. Values are numbers or tensors. Add in "
            "float64: a sum over a million tokens loses digits in float32."),
    Station("cache", 6, "model.KVCache.append", ("test_model.py", "the_cache_changes next_logits_are"),
            "Store the new keys and values of a layer in self.keys and self.values, after the self.length "
            "positions that are there, and return views of everything up to the new end.",
            "self.keys is (n_layer, B, K, room, D). Only one of its five dimensions grows. Leave "
            "self.length alone: all layers append at the same place, and the decoder moves it after the "
            "last one."),
    Station("top-p", 6, "sample.probabilities", ("test_sample.py", "top_k_keeps top_p_keeps a_temperature"),
            "Divide by the temperature, cut what top_k and top_p cut, and return probabilities.",
            "A cut id gets a logit of minus infinity. For top_p, sort the probabilities from the largest "
            "down: an id stays if those before it add up to less than p, so the best one always stays. Then "
            "bring the answer from sorted order back to the order of ids (scatter)."),
    Station("mask", 7, "tokenizer.Tokenizer.chat",
            ("test_tokenizer.py", "targets_of_a_conversation prompt_ends nobody_can"),
            "Write a conversation as ids, with a mask of what the assistant says. Start from "
            "self.with_default_system(messages); the ids of the special tokens are in self.im_start_id and "
            "self.im_end_id.",
            "Text goes through self.encode, special tokens never do. What is the assistant's own? Not its "
            "name, which it is given, but its words and its <|im_end|>, without which it would never stop. "
            "The line break after <|im_end|> belongs to nobody."),
    Station("packing", 7, "sft.first_fit_decreasing", ("test_sft.py", "first_row rows_hold"),
            "Take the items from the largest to the smallest; put each into the first row with room, or "
            "begin a new row.",
            "Sort the indexes, not the sizes, since the answer consists of indexes. Remember how much room "
            "each row has left. A loop over the rows is right; numpy's argmax over `room >= size` is "
            "faster."),
    Station("dpo", 8, "dpo.dpo_loss", ("test_dpo.py", "toy has_alone a_step_makes"),
            "Write equation 7 for B pairs: the first B entries are the chosen answers, the last B the "
            "rejected ones. The rewards are for the log, so detach them.",
            "A reward is beta times the difference of two log-probabilities, pi minus reference. The loss "
            "is -log sigmoid of how much the chosen reward is above the rejected one. F.logsigmoid is exact "
            "where the logarithm of a sigmoid would be log 0."),
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------
# the copy

HERE = Path(__file__).resolve().parents[1]
# the project, also for a command that is given inside of a copy
ROOT = HERE.parents[2] if HERE.parts[-3:-1] in (("out", "exercise"), ("out", "bug")) else HERE


def copy_project(folder: Path, changed: dict[str, str], again: bool = False) -> bool:
    """Copy the scripts, the rooms and their tests into a new folder; changed: {file: its new text}. If the
    folder exists, it is kept, and the result is False; unless `again`, which deletes it first."""
    if folder.exists() and not again:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    rooms = [path.parent.name for path in ROOT.glob("*/__init__.py")]
    with disk.new_folder(folder) as new:
        for file in [*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt"), ROOT / "pyproject.toml"]:
            shutil.copy(file, new)
        for room in [*rooms, "tests"]:
            shutil.copytree(ROOT / room, new / room, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        for name, text in changed.items():
            (new / name).write_text(text, encoding="utf-8")
    return True


def body_of(function: str, source: str) -> tuple[int, int]:
    """Which lines of a file are the body of "Class.method", without its docstring: first, and one after the
    last, counted from 0."""
    node: ast.AST = ast.parse(source)
    for name in function.split("."):
        node = next(each for each in ast.iter_child_nodes(node) if getattr(each, "name", "") == name)
    assert isinstance(node, ast.FunctionDef)
    doc = ast.get_docstring(node) is not None
    return node.body[0].end_lineno if doc else node.body[0].lineno - 1, node.end_lineno


def cut(function: str, source: str) -> tuple[str, str]:
    """(the file with `raise NotImplementedError` in place of the body, the body)."""
    (first, end), lines = body_of(function, source), source.splitlines(keepends=True)
    indent = "    " * (function.count(".") + 1)
    rest = [*lines[:first], f"{indent}raise NotImplementedError\n", *lines[end:]]
    return "".join(rest), "".join(lines[first:end])


def names_of_tests(station: Station) -> list[str]:
    """The tests whose name, or one of whose cases, contains one of the station's words."""
    (files, words), found = station.tests, []
    for file in files.split():
        for node in ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                text = " ".join([node.name, *map(ast.unparse, node.decorator_list)])
                found += [node.name] * any(word in text for word in words.split())
    return found


def pytest_words(station: Station) -> list[str]:
    """The command that runs exactly these: ["-m", "pytest", ...]."""
    files, words = station.tests
    return ["-m", "pytest", "-q", "--tb=short", *(f"tests/{file}" for file in files.split()),
            "-k", " or ".join(words.split())]


# ---------------------------------------------------------------------------------------------------------
# the command


def catalog() -> str:
    """All stations, chapter by chapter."""
    lines = []
    for number, title in enumerate(CHAPTERS, 1):
        lines.append(f"\n{number}  {title}")
        lines += [f"     {each.name:12} {each.function.replace('.', '.py: ', 1):32} "
                  f"{len(names_of_tests(each))} test{'s' * (len(names_of_tests(each)) > 1)}"
                  for each in STATIONS if each.chapter == number]
    return "\n".join(lines).strip("\n")


def find(name: str) -> Station:
    names = [each.name for each in STATIONS]
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(names)}."
        raise UserError(f"there is no exercise {name!r}. {hint}")
    return STATIONS[names.index(name)]


def wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_on_hyphens=False)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m learn.exercise", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("station", nargs="?", help="its name; without one, all are listed")
    parser.add_argument("--hint", action="store_true", help="how to begin")
    parser.add_argument("--solution", action="store_true", help="the original body")
    parser.add_argument("--again", action="store_true", help="delete the copy and your work in it")
    args = parser.parse_args(argv)
    if args.station is None:
        return print(f"{catalog()}\n\nBegin with one: python -m learn.exercise merge")
    station = find(args.station)
    file, _, function = station.function.partition(".")
    source = (ROOT / f"{file}.py").read_text(encoding="utf-8")
    if args.hint or args.solution:
        return print(wrapped(station.hint) if args.hint else cut(function, source)[1].rstrip())
    folder = ROOT / "out" / "exercise" / station.name
    shown = os.path.relpath(folder)
    if not copy_project(folder, {f"{file}.py": cut(function, source)[0]}, args.again):
        print("The copy exists, and your work in it was kept. --again deletes it and starts over.\n")
    words = [f'"{word}"' if " " in word else word for word in pytest_words(station)]
    line = body_of(function, source)[0] + 1
    print(f"{station.name}: chapter {station.chapter}, {CHAPTERS[station.chapter - 1]}\n\n"
          f"Write the body of {function} in {shown}{os.sep}{file}.py, line {line}.\n"
          f"{wrapped(station.task)}\n\nThese tests must turn green:")
    for name in names_of_tests(station):
        print(f"    {name.removeprefix('test_').replace('_', ' ')}")
    print(f"\nThis runs them:\n    cd {shown}\n    python {' '.join(words)}\n\n"
          f"python -m learn.exercise {station.name} --hint      helps, and --solution shows the original.")


if __name__ == "__main__":
    command(main, own_help=True)
