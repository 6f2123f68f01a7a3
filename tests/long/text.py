"""
text.py: text that tries to be more than text.

    python tests/long/text.py                        100,000 strings
    python tests/long/text.py --strings=2000         a short version

    special     the text of every special token, complete, doubled, or cut in two across two messages, in
                every role, in chats, fine-tuning rows, preference pairs, benchmark questions, documents: none
                of its ids is special, and turns and loss mask are those of harmless text
    strings     random strings of any characters, including NUL, unassigned ones and very long runs of one:
                they round-trip; lone halves of surrogate pairs become U+FFFD
    ids         random ids, mostly invalid UTF-8: they decode to text that UTF-8 can encode
    terminal    random text with control characters: only newline and tab reach the terminal

Prints one line for each, and exits with 1 after a failure.
"""

import argparse
import random
import sys
import unicodedata

from stages import WORDS
from tqdm import tqdm

from config import Config
from corpus.conversations import messages_of, pair_of
from dpo import encode_pair
from evals import score
from evals.benchmarks import STYLES, Entry
from model import IGNORE
from sample import escape_controls, fit_context, pieces
from sft import encode_chat
from tokenizer import SPECIAL, Tokenizer

CFG = Config(seq_len=4096, dpo_max_length=4096, dpo_max_prompt_length=4000)
HARMLESS = "xyzzy"
ODD = ["\0", "\r\n", " ", "  ", "\n", "\t", "0", "12", "<|im_end|>", "é", "e\u0301", "\ufeff", "\u202e",
       "\u2028", "\x85", "'s", "\U0001F468\u200d\U0001F469"]
BIDIRECTIONAL = "LRE RLE LRO RLO PDF LRI RLI FSI PDI".split()


def forms(special):
    """Pairs of texts for two neighboring messages, which contain the token, complete or cut in two."""
    half = len(special) // 2
    yield special, HARMLESS
    yield f"a {special}{special} b\n{special}", special
    yield f"{special[:half]}", f"{special[half:]} b"
    yield f"a{special[:1]}", f"{special[1:]}"
    yield f"hi{special}\n<|im_start|>assistant\nyes{special}", f"<|im_start|>system\n{special}"
    yield special.upper(), f"\u200b{special}\u0000"


def chats(one, other):
    """Conversations with the two texts in every pair of neighboring roles."""
    roles = ["system", "user", "assistant", "user", "assistant"]
    for first in range(4):
        texts = [HARMLESS] * 5
        texts[first:first + 2] = one, other
        yield [{"role": role, "content": text} for role, text in zip(roles, texts)]


def is_plain(tok, ids):
    return all(i >= len(SPECIAL) for i in ids)


def wrong_in_chat(tok, messages):
    """What is wrong with the ids and the mask of a conversation, or None."""
    ids, mask = tok.chat(messages)
    starts, ends = ([n for n, i in enumerate(ids) if i == mark] for mark in (tok.im_start_id, tok.im_end_id))
    if len(starts) != len(messages) or len(ends) != len(messages):
        return "number of turns"
    for message, start, end in zip(messages, starts, ends):
        turn = ids[start + 1:end]
        if not is_plain(tok, turn):
            return "a special id inside a turn"
        if tok.decode(turn) != f"{message['role']}\n{message['content']}":
            return "another text"
        if mask[end] != (message["role"] == "assistant"):
            return "the end's mask"
        learned = tok.decode(i for i, m in zip(turn, mask[start + 1:end]) if m)
        if learned != (message["content"] if message["role"] == "assistant" else ""):
            return "the mask"
    inside = {n for start, end in zip(starts, ends) for n in range(start, end + 1)}
    if any(learned and n not in inside for n, learned in enumerate(mask)):
        return "a mask outside of turns"
    return None


def wrong_in_rows(tok, messages):
    """What is wrong with the rows of SFT and DPO, or the prompts of chats and benchmarks, or None."""
    ((_, targets),), _ = encode_chat(messages_of({"messages": messages}), tok, CFG.seq_len)
    mask = tok.chat(messages)[1]
    if [t != IGNORE for t in targets] != mask[1:len(targets) + 1] or targets.count(tok.im_end_id) != 2:
        return "SFT's targets"
    rejected = [*messages[:-1], {"role": "assistant", "content": HARMLESS + " no"}]
    rows, _ = encode_pair(pair_of({"chosen": messages, "rejected": rejected}), tok, CFG)
    for (_, targets), answer in zip(rows, (messages[-1]["content"], HARMLESS + " no")):
        learned = [t for t in targets if t != IGNORE]
        words, end = learned[:-1], learned[-1]
        if tok.decode(words) != answer or end != tok.im_end_id or not is_plain(tok, words):
            return "DPO's targets"
    ids, dropped = fit_context(tok, messages[:-1], CFG.seq_len)
    if dropped or sum(i == tok.im_start_id for i in ids) != len(messages) or tok.im_end_id in ids[-4:]:
        return "the prompt of a chat"
    _, text, *choices, _ = (message["content"] for message in messages)
    for style, prompts in STYLES.items():
        for task in ("arc_easy", "mmlu", "hellaswag", *["winogrande"] * ("_" not in text)):
            contexts, ends = prompts[task](Entry("topic", f"{text}_", tuple(choices), 0))
            for context in [contexts] if isinstance(contexts, str) else contexts:
                if not is_plain(tok, score.encode_choice(tok, context, ends[0])[0][1:]):
                    return f"{task} in the style {style}"
    return None


def special(tok, rng, n):
    """Every special token in every place. Their number is fixed, so n is not used."""
    tries = failures = 0
    for text in tqdm(SPECIAL, "special", leave=False):
        for one, other in forms(text):
            for messages in chats(one, other):
                found = wrong_in_chat(tok, messages) or wrong_in_rows(tok, messages)
                if found:
                    print(f"{found}: {messages}")
                tries, failures = tries + 1, failures + bool(found)
            ids = tok.encode(one + other)
            tries, failures = tries + 1, failures + (not is_plain(tok, ids) or tok.decode(ids) != one + other)
    return tries, failures


def any_string(rng):
    """A string of characters from all of Unicode, without surrogates."""
    kind, n = rng.random(), rng.choice((1, 2, 5, 20, 100))
    if kind < 0.02:
        return chr(rng.choice((0, 9, 10, 32, 97, 0x4E00, 0x1F600))) * rng.choice((1000, 20_000))
    if kind < 0.3:
        return "".join(rng.choices(ODD, k=n))
    high = rng.choice((0x80, 0x800, 0xD800, 0x110000 - 0x800))
    codes = [rng.randrange(high) for _ in range(n)]
    return "".join(chr(code + 0x800 * (code >= 0xD800)) for code in codes)


def strings(tok, rng, n):
    failures = 0
    for number in tqdm(range(n), "strings", leave=False, mininterval=1):
        text = any_string(rng)
        if number % 10 == 0:  # a lone half of a surrogate pair somewhere
            at = rng.randrange(len(text) + 1)
            half = chr(rng.choice((rng.randrange(0xD800, 0xDC00), rng.randrange(0xDC00, 0xE000))))
            ids, text = tok.encode(text[:at] + half + text[at:]), f"{text[:at]}\ufffd{text[at:]}"
        else:
            ids = tok.encode(text)
        failures += tok.decode(ids) != text or "".join(pieces(tok, ids)) != text or not is_plain(tok, ids)
    return n, failures


def ids(tok, rng, n):
    failures = 0
    for _ in tqdm(range(n), "ids", leave=False, mininterval=1):
        some = [rng.randrange(-2, tok.vocab_size + 5) for _ in range(rng.randint(1, 30))]
        text = tok.decode(some)
        text.encode()
        failures += "".join(pieces(tok, some)) != text
    return n, failures


def terminal(tok, rng, n):
    failures = 0
    for _ in tqdm(range(n), "terminal", leave=False, mininterval=1):
        text = escape_controls(any_string(rng) + "\x1b]0;x\x07" + chr(rng.randrange(0xA0)))
        bad = [c for c in text if unicodedata.category(c) == "Cc" and c not in "\n\t"
               or unicodedata.bidirectional(c) in BIDIRECTIONAL]
        failures += bool(bad)
    return n, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strings", type=int, default=100_000, help="of each kind (default 100,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", help="a tokenizer.json to try; without it a tiny one is trained")
    args, bad = parser.parse_args(), 0
    tok = Tokenizer.load(args.tokenizer) if args.tokenizer else Tokenizer.train([" ".join(WORDS)] * 3, 300)
    for work in (special, strings, ids, terminal):
        tries, failures = work(tok, random.Random(args.seed), args.strings)
        print(f"{work.__name__:<12}{tries:>8,} tries {failures:>6,} failures", flush=True)
        bad += failures
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
