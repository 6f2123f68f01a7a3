"""
synthesize.py: synthetic textbooks, made in the same way as Cosmopedia.

The prompts of prompts.py go to a writer, and each answer becomes a record: prompt, text, words, audience,
format, style, seed_data. The built-in writer needs no model. Any other writer is a server with OpenAI's
protocol (vLLM, llama.cpp, ...), which gets the same prompts, or with --seeds prompts about your own pages:

    python -m corpus.synthesize --n=200 --out=textbooks.jsonl
    python -m corpus.synthesize --n=200 --out=mine.jsonl --writer=http://localhost:8000/v1 --model=NAME

Servers are slow, stop, and cut answers off. So each answer is appended as soon as it arrives, and the same
command resumes where it was interrupted. What a model says before the text is removed, an answer that was cut
off ends with its last complete sentence, and an answer that is too short is left out.

    python data.py config/demo.py --data=textbooks.jsonl
"""

import argparse
import itertools
import json
import os
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout
from tqdm import tqdm

from config import UserError
from corpus.prompts import Prompt, built_in, builtin_prompts, distinct, page_prompts
from plumbing import disk
from plumbing.processes import command

SAMPLING = {"max_tokens": 2500, "temperature": 0.6, "top_p": 0.95, "top_k": 50,  # as for Cosmopedia
            "repetition_penalty": 1.2, "repeat_penalty": 1.2}  # vLLM's and llama.cpp's name for the same
FAILURES = 10  # so many failed prompts in a row mean that the server is gone
MALFORMED = (ValueError, KeyError, IndexError, TypeError, AttributeError)  # when an answer is taken apart
START = b'{"id": "'  # of every record


class Failed(Exception):
    """No answer to one prompt after all attempts: Failed(reason)."""


# ---------------------------------------------------------------------------------------------------------
# from answers to texts

# what models say before the text: a complete line, or a label in front of the title
GENRE = r"\b(?:story|tale|textbook|page|section|chapter|article|post|exercise|example|guide|instructions)\b"
LABEL = r"(?:title|headline|heading|textbook|story|article|blog post)"
OPENINGS = [
    r"<think>(?s:.*?)(?:</think>|\Z)",  # everything, if the thoughts never end
    r"(?:sure|certainly|of course|absolutely|ok|okay|great)(?: thing)?[!,.:]+"
    r"(?=\s*\n|\s+(?:here|below|i)\b)",  # Sure!
    r"(?:here(?:['’]?s| is| are)|below is|this is|i(?:['’]ll| will) write|i(?:['’]ve| have) written)\b"
    rf"[^\n]{{0,150}}{GENRE}(?:[^\n]{{0,150}}:|[^\n.:]{{0,150}}\.?)[*_]*(?=\s*\n)",  # Here is a story:
    rf"[#*_ ]*{LABEL}(?:[*_]+:|:[*_]+)",  # **Title:** Bees
    rf"(?P<marks>[#*_ ]*){LABEL}:",  # **Title: Bees**
    r"-{3,}(?=\s*\n)",  # a line
]
OPENING = re.compile("|".join(OPENINGS), re.I)
# up to the last word with a full stop after it: "3." only begins the next item of a list
SENTENCES = re.compile(r"""(?s:.*)[^\W\d]["'”’)*]*[.!?]["'”’)*]*(?=\s|$)""")


def text_of_answer(answer: str, cut_off: bool) -> str:
    """An answer without its opening, and up to its last complete sentence if it was cut off.

    "Sure! Here is a story:\\n\\n**Title: Bees**\\n\\nBees hum. They" -> "**Bees**\\n\\nBees hum."
    """
    text = answer.strip()
    while opening := OPENING.match(text):
        text = (opening["marks"] or "") + text[opening.end():].strip()
    if cut_off:
        complete = SENTENCES.match(text)
        text = complete[0] if complete else ""
    return text


def usable(answers: Iterable[tuple], min_words: int, counts: Counter, bar: tqdm) -> Iterator[tuple]:
    """(prompt, text, whether it was cut off) of each answer that is long enough. Counts all others."""
    in_a_row = 0
    for prompt, answer in answers:
        bar.update()
        if isinstance(answer, Failed):
            counts[f"  failed: {answer}"] += 1
            in_a_row += 1
            if in_a_row == FAILURES:
                raise UserError(f"{FAILURES} prompts in a row have failed, the last with {answer}: look at "
                                "the server, then resume with the same command")
            continue
        if isinstance(answer, Exception):
            raise answer
        in_a_row, text = 0, text_of_answer(*answer)
        if len(text.split()) >= min_words:
            yield prompt, text, answer[1]
        else:
            counts[f"  left out: under {min_words} words"] += 1


# ---------------------------------------------------------------------------------------------------------
# the writer on a server


def server(args: argparse.Namespace) -> Callable[[Prompt], tuple[str, bool]]:
    """A function that sends a prompt to the server: ask(prompt) -> (answer, whether it was cut off).

    The client waits and tries again when the network or the server fails. After the last try, ask raises
    Failed; it raises UserError if the server refuses the request and would refuse it again.
    """
    key = "none"  # the client wants one; servers without keys ignore it
    if args.key_file:
        try:
            key = args.key_file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise UserError(f"--key_file={args.key_file} cannot be read: {error}") from None
    try:
        import openai
    except ImportError:
        raise UserError("--writer needs the client of OpenAI's protocol: pip install openai") from None

    client = openai.OpenAI(base_url=args.writer, api_key=key, timeout=args.timeout, max_retries=args.retries)
    sampling = {name: value for name, value in {**SAMPLING, **args.sampling}.items() if value is not None}

    def ask(prompt: Prompt) -> tuple[str, bool]:
        for _ in range(args.retries + 1):
            try:
                reply = client.chat.completions.with_raw_response.create(
                    model=args.model, messages=[{"role": "user", "content": prompt.text}],
                    extra_body=sampling)
                choice = reply.http_response.json()["choices"][0]
                text = (choice["message"]["content"] or "").encode(errors="replace").decode()
                return text, choice.get("finish_reason") == "length"
            except openai.APIStatusError as error:
                status, said = error.status_code, " ".join(error.response.text.split())[:200]
                if status < 500 and status not in (408, 409, 429):
                    raise UserError(f"{args.writer} refuses with HTTP {status}, {said or error.message}: "
                                    "look at --writer, --model, --key_file and --sampling") from None
                raise Failed(f"HTTP {status}") from None
            except openai.APIConnectionError as error:
                raise Failed(type(error.__cause__ or error).__name__) from None
            except MALFORMED:
                pass
        raise Failed("malformed answer")

    return ask


def ask_all(prompts: Iterator[Prompt], ask: Callable, n_threads: int) -> Iterator[tuple]:
    """(prompt, answer) in the order of arrival. An answer may be the Exception that was raised instead.

    The threads are daemons, so that Ctrl-C need not wait for a slow server.
    """
    todo, done, busy = queue.Queue[Prompt](), queue.Queue[tuple](), 0

    def work() -> None:
        while True:
            prompt = todo.get()
            try:
                done.put((prompt, ask(prompt)))
            except Exception as error:
                done.put((prompt, error))

    for _ in range(n_threads):
        threading.Thread(target=work, daemon=True).start()
    while True:
        for prompt in itertools.islice(prompts, n_threads - busy):
            todo.put(prompt)
            busy += 1
        if not busy:
            return
        while done.empty():  # on Windows, Ctrl-C does not interrupt a get() that waits
            time.sleep(0.005)
        yield done.get()
        busy -= 1


# ---------------------------------------------------------------------------------------------------------
# the file, and the command


def answered(path: Path, model: str) -> set[str]:
    """The ids of the prompts that earlier runs have answered. Removes an incomplete last line."""
    ids, end = set[str](), 0
    with disk.writable(path), open(path, "r+b") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                prompt_id, writer = record["id"], record["model"]
            except (ValueError, KeyError, TypeError) as error:
                ours = line.startswith(START) or START.startswith(line)
                if ours and not line.endswith(b"\n") and isinstance(error, ValueError):
                    break
                raise UserError(f"{path} line {number} is not of this command: name another --out") from None
            if writer != model:
                raise UserError(f"{path} was written by {writer!r}, not {model!r}: name another --out")
            if line.endswith(b"\n"):  # otherwise it is asked again
                ids.add(prompt_id)
                end += len(line)
        file.truncate(end)
    return ids


def unanswered(prompts: Iterable[Prompt], ids: set[str], counts: Counter, bar: tqdm) -> Iterator[Prompt]:
    """The prompts whose id is not among ids."""
    for prompt in prompts:
        counts["prompts"] += 1
        if prompt.id in ids:
            counts["  answered by an earlier run"] += 1
            bar.update()
        else:
            yield prompt


def records(args: argparse.Namespace, ids: set[str], counts: Counter, bar: tqdm) -> Iterator[dict]:
    """A record for each of the first args.n prompts that is new and gets a usable answer."""
    prompts = page_prompts(args.seeds, args.seed) if args.seeds else builtin_prompts(args.seed)
    new = unanswered(itertools.islice(distinct(prompts), args.n), ids, counts, bar)
    if args.writer:
        answers = ask_all(new, server(args), args.concurrency)
    else:
        answers = ((prompt, (built_in(prompt), False)) for prompt in new)
    for prompt, text, cut_off in usable(answers, args.min_words if args.writer else 1, counts, bar):
        counts["written"] += 1
        counts["  of these, cut to the last complete sentence"] += cut_off
        yield {"id": prompt.id, "prompt": prompt.text, "text": text, "words": len(text.split()),
               "audience": prompt.audience, "format": prompt.format, "style": prompt.style,
               "seed_data": prompt.seed_data, "model": args.model or "builtin", "cut_off": cut_off}


def append(path: Path, file: BinaryIO, records: Iterable[dict]) -> None:
    """Write each record as a line, in one piece, and flush the file to the disk at least once per second."""
    last = time.monotonic()
    try:
        for record in records:
            with disk.writable(path):
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                if time.monotonic() > last + 1:
                    os.fsync(file.fileno())
                    last = time.monotonic()
    finally:
        with disk.writable(path):
            os.fsync(file.fileno())


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError if it cannot work."""
    parser = argparse.ArgumentParser(prog="python -m corpus.synthesize", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="a .jsonl file; what it contains is not asked for again")
    add("--n", type=int, default=200, help="how many prompts")
    add("--seed", type=int, default=0, help="another seed gives other prompts")
    add("--seeds", help="your pages: a file with a column text (and maybe topic), or any source of data.py")
    add("--writer", default="", help="the address of a server, up to /v1")
    add("--model", default="", help="the model's name there")
    add("--key_file", type=Path, help="a file that contains the server's key")
    add("--concurrency", type=int, default=8, help="prompts that are sent at the same time")
    add("--timeout", type=float, default=600, help="seconds to wait for an answer")
    add("--retries", type=int, default=5, help="after 0.5, 1, 2, ... 8 seconds, or when the server says")
    add("--min_words", type=int, default=110, help="shorter answers are left out; 110 are about 150 tokens")
    add("--sampling", type=json.loads, default={},
        help='changes to the request, such as {"temperature": 1, "top_k": null}; null leaves a field out')
    args = parser.parse_args(argv)
    if args.out.suffix != ".jsonl" or not args.out.parent.is_dir():
        raise UserError(f"--out={args.out} must be a .jsonl file in a folder that exists")
    if args.n < 1 or args.concurrency < 1 or args.retries < 0 or args.timeout <= 0:
        raise UserError("--n, --concurrency and --timeout must be above 0, and --retries 0 or more")
    if bool(args.writer) != bool(args.model):
        raise UserError("--writer=http://localhost:8000/v1 needs --model=NAME, and the other way round")
    if args.writer and not re.fullmatch(r"https?://(\[[\da-fA-F:]+\]|[^\s/:]+)(:\d+)?(/\S*)?", args.writer):
        raise UserError(f"--writer={args.writer} must be an address like http://localhost:8000/v1")
    if args.seeds and not args.writer:
        raise UserError("--seeds needs a --writer: the built-in one can only write about its own world")
    if not isinstance(args.sampling, dict):
        raise UserError(f"--sampling={args.sampling} must be a JSON object, like {{\"top_k\": null}}")
    return args


def main(argv: list[str]) -> None:
    args, counts = parse(argv), Counter[str]()
    try:
        with disk.writable(args.out):
            file = open(args.out, "ab", buffering=0)
        with file, FileLock(args.out.with_name(f".{args.out.name}.lock"), timeout=0), \
                tqdm(total=args.n, desc="writing", unit=" prompts", disable=None) as bar:
            append(args.out, file, records(args, answered(args.out, args.model or "builtin"), counts, bar))
    except Timeout:
        raise UserError(f"another process is writing to {args.out}: name another --out") from None
    finally:
        print("\n".join(f"{what:50} {count:>9,}" for what, count in counts.items() if count))
    if failed := sum(count for what, count in counts.items() if "failed" in what):
        raise UserError(f"{failed} prompts have no answer yet: the same command asks for them again")


if __name__ == "__main__":
    command(main, own_help=True)
