"""
synthesize.py: synthetic textbooks, as Cosmopedia was made.

The prompts of prompts.py go to a writer, and each answer becomes a record: prompt, text, words, audience,
format, style, seed_data. The built-in writer needs no model. Any other is a server that speaks OpenAI's
protocol (vLLM, llama.cpp, ...) and is sent the very same prompts, or with --seeds those from your own pages:

    python -m corpus.synthesize --n=200 --out=textbooks.jsonl
    python -m corpus.synthesize --n=200 --out=mine.jsonl --writer=http://localhost:8000/v1 --model=NAME

Servers are slow, stop, and cut answers off. So every answer is appended as soon as it comes, and the same
command goes on where it was interrupted. What a model says before the text is taken away, an answer that was
cut off ends with its last whole sentence, and one that is too short is left out.

    python data.py config/demo.py --data=textbooks.jsonl                                    next: sources.py
"""

import argparse
import http.client
import itertools
import json
import os
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib import error as url_error
from urllib import request

from filelock import FileLock, Timeout
from tqdm import tqdm

import config
from config import UserError
from corpus.prompts import Prompt, built_in, builtin_prompts, page_prompts, unlike

SAMPLING = {"max_tokens": 2500, "temperature": 0.6, "top_p": 0.95, "top_k": 50,  # Cosmopedia's;
            "repetition_penalty": 1.2, "repeat_penalty": 1.2}  # the last by its names in vLLM and llama.cpp
FIRST_WAIT, LONGEST_WAIT = 1.0, 600.0  # seconds before the next attempt; it doubles each time
FAILURES = 10  # prompts in a row: then the server is gone
MALFORMED = (ValueError, KeyError, IndexError, TypeError, AttributeError)
START = b'{"id": "'  # of every record

# what models say before the text, each at its beginning; a whole line, where it is not only a label
GENRE = r"\b(?:story|tale|textbook|page|section|chapter|article|post|exercise|example|guide|instructions)\b"
LABEL = r"(?:title|headline|heading|textbook|story|article|blog post)"
OPENING = re.compile("|".join((
    r"<think>(?s:.*?)(?:</think>|\Z)",  # all of it, if the thoughts never end
    r"(?:sure|certainly|of course|absolutely|ok|okay|great)(?: thing)?[!,.:]+"
    r"(?=\s*\n|\s+(?:here|below|i)\b)",  # Sure!
    r"(?:here(?:['’]?s| is| are)|below is|this is|i(?:['’]ll| will) write|i(?:['’]ve| have) written)\b"
    rf"[^\n]{{0,150}}{GENRE}(?:[^\n]{{0,150}}:|[^\n.:]{{0,150}}\.?)[*_]*(?=\s*\n)",  # Here is a story:
    rf"[#*_ ]*{LABEL}(?:[*_]+:|:[*_]+)",  # **Title:** Bees
    rf"(?P<marks>[#*_ ]*){LABEL}:",  # **Title: Bees**
    r"-{3,}(?=\s*\n)")), re.I)
END = re.compile(r"""(?s:.*)[^\W\d]["'”’)*]*[.!?]["'”’)*]*(?=\s|$)""")  # "3." begins the next item of a list


class Failed(Exception):
    """No answer to one prompt, after all attempts: Failed(reason)."""


# --- the writer at the other end ---


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible endpoint, and how to ask it."""
    url: str
    body: dict        # model and sampling parameters
    headers: dict
    timeout: float    # seconds
    retries: int

    def __call__(self, prompt: Prompt) -> tuple[str, bool]:  # type: ignore[return]
        """(text, whether it was cut off). Raises Failed after the last attempt, and UserError if the server
        refuses and will refuse again."""
        for attempt in itertools.count():
            asked = ""
            try:
                return self.post(prompt)
            except url_error.HTTPError as error:
                reason, asked = f"HTTP {error.code}", error.headers.get("Retry-After", "")
                if error.code < 500 and error.code != 429:
                    said = " ".join(error.read(2000).decode(errors="replace").split())[:200]
                    raise UserError(f"{self.url} refuses with HTTP {error.code}, {said or error.reason}: "
                                    "look at --writer, --model, --key_file and --sampling") from None
            except (OSError, http.client.HTTPException) as error:
                reason = type(getattr(error, "reason", error)).__name__
            except MALFORMED:
                reason = "malformed answer"
            if attempt == self.retries:
                raise Failed(reason)
            wait = max(float(asked) if asked.isdecimal() else 0.0, FIRST_WAIT * 2**attempt)
            time.sleep(min(wait, LONGEST_WAIT))

    def post(self, prompt: Prompt) -> tuple[str, bool]:
        body = {**self.body, "messages": [{"role": "user", "content": prompt.text}]}
        question = request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(),
                                   {"Content-Type": "application/json"})
        for name, value in self.headers.items():
            question.add_unredirected_header(name, value)  # the key is for this server alone
        with request.urlopen(question, timeout=self.timeout) as reply:
            choice = json.load(reply)["choices"][0]
        text = choice["message"]["content"] or ""
        return text.encode(errors="replace").decode(), choice.get("finish_reason") == "length"


def answers(prompts: Iterator[Prompt], writer: Callable, n_threads: int) -> Iterator[tuple]:
    """(prompt, answer) in the order in which they come; an answer may be the Exception that came instead. The
    threads are daemons, so that Ctrl-C need not wait for what a slow server is still writing."""
    todo, done, busy = queue.Queue[Prompt](), queue.Queue[tuple](), 0

    def work():
        while True:
            prompt = todo.get()
            try:
                done.put((prompt, writer(prompt)))
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
        while done.empty():  # a get() that waits would not hear Ctrl-C on Windows
            time.sleep(0.005)
        yield done.get()
        busy -= 1


# --- from answers to records ---


def cleaned(text: str, cut_off: bool) -> str:
    """The text without what a model says before it, and up to its last whole sentence if it was cut off:
    "Sure! Here is a story:\\n\\n**Title: Bees**\\n\\nBees hum. They" -> "**Bees**\\n\\nBees hum."."""
    text = text.strip()
    while opening := OPENING.match(text):
        text = (opening["marks"] or "") + text[opening.end():].strip()
    whole = END.match(text)
    return text if not cut_off else whole[0] if whole else ""


def answered(path: Path, model: str) -> set[str]:
    """The ids of the prompts that earlier runs have answered. A half-written last line is cut off."""
    ids, end = set[str](), 0
    with open(path, "r+b") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                found, writer = record["id"], record["model"]
            except (ValueError, KeyError, TypeError) as error:
                ours = line.startswith(START) or START.startswith(line)
                if ours and not line.endswith(b"\n") and isinstance(error, ValueError):
                    break
                raise UserError(f"{path} line {number} is not of this command: name another --out") from None
            if writer != model:
                raise UserError(f"{path} was written by {writer!r}, not {model!r}: name another --out")
            if line.endswith(b"\n"):  # else it is asked for again
                ids.add(found)
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


def usable(found: Iterable[tuple], min_words: int, counts: Counter, bar: tqdm) -> Iterator[tuple]:
    """(prompt, text, whether it was cut off) of the answers that are long enough; the others are counted."""
    in_a_row = 0
    for prompt, answer in found:
        bar.update()
        if isinstance(answer, Failed):
            counts[f"  failed: {answer}"] += 1
            in_a_row += 1
            if in_a_row == FAILURES:
                raise UserError(f"{FAILURES} prompts in a row have failed, the last with {answer}: look at "
                                "the server, then go on with the same command")
            continue
        if isinstance(answer, Exception):
            raise answer
        in_a_row, text = 0, cleaned(*answer)
        if len(text.split()) >= min_words:
            yield prompt, text, answer[1]
        else:
            counts[f"  left out: under {min_words} words"] += 1


def append(file: BinaryIO, records: Iterable[dict]) -> None:
    """Write each record as a line, in one piece, and at least once a second onto the disk itself."""
    last = time.monotonic()
    try:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            if time.monotonic() > last + 1:
                os.fsync(file.fileno())
                last = time.monotonic()
    finally:
        os.fsync(file.fileno())


def checked(argv: list[str]) -> argparse.Namespace:
    """The command line; UserError if it cannot work."""
    parser = argparse.ArgumentParser(prog="python -m corpus.synthesize", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="a .jsonl file; what it holds already is not asked for again")
    add("--n", type=int, default=200, help="how many prompts")
    add("--seed", type=int, default=0, help="another seed, other prompts")
    add("--seeds", help="your pages: a file with a column text (and perhaps topic), or what data.py reads")
    add("--writer", default="", help="the address of a server, up to /v1")
    add("--model", default="", help="the model's name there")
    add("--key_file", type=Path, help="a file that holds the server's key")
    add("--concurrency", type=int, default=8, help="prompts that are sent at a time")
    add("--timeout", type=float, default=600, help="seconds to wait for an answer")
    add("--retries", type=int, default=5, help="after 1, 2, 4, ... seconds, or what the server asks for")
    add("--min_words", type=int, default=110, help="shorter answers are left out; 110 are about 150 tokens")
    add("--sampling", type=json.loads, default={},
        help='changes to the request, such as {"temperature": 1, "top_k": null}; null leaves it out')
    args = parser.parse_args(argv)
    if args.out.suffix != ".jsonl" or not args.out.parent.is_dir():
        raise UserError(f"--out={args.out} must be a .jsonl file in a folder that exists")
    if args.n < 1 or args.concurrency < 1 or args.retries < 0 or args.timeout <= 0:
        raise UserError("--n, --concurrency and --timeout must be above 0, and --retries not below")
    if bool(args.writer) != bool(args.model):
        raise UserError("--writer=http://localhost:8000/v1 needs --model=NAME, and the other way round")
    if args.writer and not re.fullmatch(r"https?://(\[[\da-fA-F:]+\]|[^\s/:]+)(:\d+)?(/\S*)?", args.writer):
        raise UserError(f"--writer={args.writer} must be an address like http://localhost:8000/v1")
    if args.seeds and not args.writer:
        raise UserError("--seeds needs a --writer: the built-in one knows only the seeds of its own world")
    if not isinstance(args.sampling, dict):
        raise UserError(f"--sampling={args.sampling} must be a JSON object, like {{\"top_k\": null}}")
    return args


def server(args: argparse.Namespace) -> Server:
    headers = {}
    if args.key_file:
        try:
            headers["Authorization"] = f"Bearer {args.key_file.read_text(encoding='utf-8').strip()}"
        except (OSError, ValueError) as error:
            raise UserError(f"--key_file={args.key_file} cannot be read: {error}") from None
    body = {"model": args.model, **SAMPLING, **args.sampling}
    return Server(args.writer, {name: value for name, value in body.items() if value is not None}, headers,
                  args.timeout, args.retries)


def records(args: argparse.Namespace, ids: set[str], counts: Counter, bar: tqdm) -> Iterator[dict]:
    """A record for each of the first args.n prompts that is new and gets a usable answer."""
    prompts = page_prompts(args.seeds, args.seed) if args.seeds else builtin_prompts(args.seed)
    new = unanswered(itertools.islice(unlike(prompts), args.n), ids, counts, bar)
    if args.writer:
        found = answers(new, server(args), args.concurrency)
    else:
        found = ((prompt, (built_in(prompt), False)) for prompt in new)
    for prompt, text, cut_off in usable(found, args.min_words if args.writer else 1, counts, bar):
        counts["written"] += 1
        counts["  of these, cut back to the last whole sentence"] += cut_off
        yield {"id": prompt.id, "prompt": prompt.text, "text": text, "words": len(text.split()),
               "audience": prompt.audience, "format": prompt.format, "style": prompt.style,
               "seed_data": prompt.seed_data, "model": args.model or "builtin", "cut_off": cut_off}


def main(argv: list[str]) -> None:
    args, counts = checked(argv), Counter[str]()
    try:
        with FileLock(args.out.with_name(f".{args.out.name}.lock"), timeout=0), \
                open(args.out, "ab", buffering=0) as file, \
                tqdm(total=args.n, desc="writing", unit=" prompts", disable=None) as bar:
            append(file, records(args, answered(args.out, args.model or "builtin"), counts, bar))
    except Timeout:
        raise UserError(f"another process is writing to {args.out}: name another --out") from None
    finally:
        print("\n".join(f"{what:50} {count:>9,}" for what, count in counts.items() if count))
    if failed := sum(count for what, count in counts.items() if "failed" in what):
        raise UserError(f"{failed} prompts have no answer yet: the same command asks for them again")


if __name__ == "__main__":
    config.command(main, own_help=True)
