"""
plumbing/shards.py: documents are tokenized into shards, files of 16-bit ids, with a manifest that says what
is there.

A shard is closed after SHARD_TOKENS tokens, and the manifest then records how far the source has been read.
So an interrupted run resumes after the last complete shard, and writes the same bytes as one that was not
interrupted.

A source of which only some tokens are needed is read up to a stop. The manifest lists all stops: a larger
budget continues after the last one, and a smaller one finds its own again.

    shards  00000  00001  00002 | 00003  00004 |         stops: 150,000,000 tokens after 3 shards, then
                                                                250,000,000 after 5
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import Config, UserError
from corpus.hub import Hub
from corpus.sources import (
    READING,
    Documents,
    account,
    changed_code,
    code_digest,
    describe,
    is_builtin,
    locate,
)
from plumbing import disk
from tokenizer import Tokenizer, code_note, load_or_train

SHARD_TOKENS = 2**26  # a shard is closed after so many tokens: 128 MiB
BATCH_CHARACTERS = 2_000_000  # of text that is tokenized at a time
SHARD = {"file": str, "tokens": int, "documents": int, "bytes": int}  # the form of manifests, for read_json
MANIFEST = {"tokenizer": str, "complete": bool, "shards": [{"train": SHARD, "val": SHARD}],
            "reader": {"source": str, "read": int, "bad": int, "left_out": {}, "notes": {}}}
NEW = {"stops": [{"tokens": int, "shards": int}], "reader": {"files": [int]}}  # older ones lack these
MARGIN = 1.02  # of what a run draws: the last ids of a shard do not fill a row


def shard_folder(source: str, cfg: Config, tok: Tokenizer) -> Path:
    """The folder of a source's shards. Its name hashes all they depend on, so stale ones are never read."""
    recipe = json.dumps([describe(source, cfg), tok.digest(), cfg.val_fraction], sort_keys=True)
    name = re.sub(r"[^\w.-]+", "_", source)[-60:]
    return Path(cfg.out_dir) / "data" / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:10]}"


def budget_of(source: str, cfg: Config) -> int:
    """How many tokens of a source a run needs; 0: all of it.

    data_tokens times the source's share of the mixture. With data_tokens=0, what max_steps will draw and 2%
    more; but all of a built-in source, which takes seconds, and all where nobody knows what will be drawn.
    """
    unknown = not cfg.max_steps or cfg.max_seconds or is_builtin(source)
    if not cfg.data_tokens and unknown:
        return 0
    total = cfg.data_tokens or MARGIN * cfg.max_steps * cfg.tokens_per_step
    least = 1 if cfg.data_tokens else cfg.tokens_per_step  # a small share of a short run still needs a row
    return math.ceil(max(least, cfg.share_of(source) * total))


def part_of(source: str, cfg: Config) -> int:
    """How many of them this machine prepares; 0: all of its part."""
    return math.ceil(budget_of(source, cfg) / int(cfg.part.split("/")[1]))


def is_enough(stop: dict, budget: int) -> bool:
    """Whether a stop of a manifest has the tokens of a budget. A stop at 0 tokens has all of the source."""
    return not stop["tokens"] or 0 < budget <= stop["tokens"]


def is_ready(manifest: dict, budget: int) -> bool:
    """Whether a part has the tokens of its budget, up to a stop."""
    return any(is_enough(stop, budget) for stop in manifest["stops"])


def shards_of(manifests: list[dict], budget: int) -> list[list[dict]]:
    """The shards of all parts that a run with this budget reads, in groups: up to the first stop, from there
    to the next, ..."""
    groups: dict[int, list[dict]] = {}
    budget = math.ceil(budget / len(manifests))
    for manifest in manifests:
        first = 0
        for number, stop in enumerate(manifest["stops"]):
            groups.setdefault(number, []).extend(manifest["shards"][first:stop["shards"]])
            first = stop["shards"]
            if is_enough(stop, budget):
                break
    return list(groups.values())


def text_batches(documents: Documents, characters: int) -> Iterator[tuple[list[tuple[str, str]], dict]]:
    """Batches of (split, text), about so many characters each, with the reader's state after it."""
    texts, size = [], 0
    for text in documents:
        texts += documents.split(text)
        size += len(text)
        if size >= characters:
            yield texts, documents.state()
            texts, size = [], 0
    yield texts, documents.state()


def prefetch(items: Iterable) -> Iterator:
    """The items of an iterator, while a thread already makes the next one."""
    items = iter(items)
    item = next(items, None)  # the first one here: Ctrl-C does not reach a thread
    with ThreadPoolExecutor(1) as thread:
        while item is not None:
            coming = thread.submit(next, items, None)
            yield item
            item = coming.result()


def write_shard(batches: Iterator, folder: Path, name: str, tok: Tokenizer, bar: tqdm,
                enough: int = SHARD_TOKENS) -> tuple[dict, dict, bool]:
    """Write a train_ and a val_ file from the next batches of texts, until there are enough tokens to train
    on: (what is in them, the reader's state, whether that was all). The library encodes on all cores."""
    shard: dict[str, dict] = {split: {"file": f"{split}_{name}.bin", "tokens": 0, "documents": 0, "bytes": 0}
                              for split in ("train", "val")}
    temporary = {split: folder / f"{shard[split]['file']}.tmp" for split in shard}
    complete, state = True, {}  # the reader's state after the last batch that was written
    with disk.writable(folder):
        with open(temporary["train"], "wb") as train, open(temporary["val"], "wb") as val:
            for texts, state in batches:  # noqa: B007
                encoded = tok.rust.encode_batch_fast([text for _, text in texts], add_special_tokens=False)
                for (split, text), encoding in zip(texts, encoded, strict=True):
                    size = len(text.encode())
                    ids = np.array([*encoding.ids, tok.eos_id], np.uint16)
                    (train if split == "train" else val).write(ids.tobytes())
                    shard[split]["tokens"] += len(ids)
                    shard[split]["documents"] += 1
                    shard[split]["bytes"] += size
                    bar.update(len(ids) if split == "train" else 0)
                if shard["train"]["tokens"] >= enough:
                    complete = False
                    break
        for split in shard:
            disk.replace(temporary[split], folder / shard[split]["file"])
    return shard, state, complete


def tokens_in(manifest: dict) -> int:
    """How many tokens to train on its shards have."""
    return sum(shard["train"]["tokens"] for shard in manifest["shards"])


def write_shards(source: str, cfg: Config, tok: Tokenizer) -> dict:
    """Tokenize a source into its folder, up to its budget, resuming after the last complete shard; returns
    its manifest."""
    folder, part = shard_folder(source, cfg, tok), cfg.part.replace("/", "of")
    budget = part_of(source, cfg)
    path = folder / f"manifest_{part}.json"
    with disk.lock(folder / f"lock_{part}"):
        manifest = manifest_at(path, source, cfg, tok)
        if is_ready(manifest, budget):
            return manifest
        documents = Documents(source, cfg, state=manifest["reader"])
        characters = BATCH_CHARACTERS
        if budget:  # which is reached at the end of a batch, so a small one has small batches
            characters = min(characters, max(characters // 100, budget // 25))
        batches = prefetch(text_batches(documents, characters))
        with tqdm(desc=source, total=budget or None, initial=tokens_in(manifest), unit=" tokens",
                  unit_scale=True, disable=None) as bar:
            while not manifest["complete"] and not 0 < budget <= tokens_in(manifest):
                name = f"{part}_{len(manifest['shards']):05}"
                enough = min(SHARD_TOKENS, budget - tokens_in(manifest)) if budget else SHARD_TOKENS
                shard, state, complete = write_shard(batches, folder, name, tok, bar, enough)
                manifest["shards"].append(shard)
                manifest |= {"reader": state, "complete": complete}
                disk.write_json(path, manifest)
        documents.check_bad("where its budget ends")
        there = 0 if manifest["complete"] else tokens_in(manifest)
        manifest["stops"].append({"tokens": there, "shards": len(manifest["shards"])})
        disk.write_json(path, manifest)
    return manifest


def summary(manifest: dict, budget: int) -> str:
    """The closing table of a source, and where it stopped."""
    lines = [account(**manifest["reader"])]
    if manifest["complete"] and tokens_in(manifest) < budget:
        lines.append(f"  {tokens_in(manifest):>12,}  tokens to train on are all there are, of a budget of "
                     f"{budget:,}: the run repeats them")
    elif not manifest["complete"]:
        lines.append(f"  {tokens_in(manifest):>12,}  tokens to train on are enough for this run: the rest "
                     "was not read (--data_tokens)")
    return "\n".join(lines)


def read_manifest(path: Path) -> dict:
    """A manifest. One from before there were budgets has all of its source, or was being made."""
    manifest = disk.read_json(path, MANIFEST)
    manifest.setdefault("stops", [{"tokens": 0, "shards": len(manifest["shards"])}] * manifest["complete"])
    manifest["reader"].setdefault("files", [])
    if not disk.has_form(manifest, NEW):
        raise UserError(f"{path} is damaged: delete its folder and run data.py again")
    return manifest


def manifest_at(path: Path, source: str, cfg: Config, tok: Tokenizer) -> dict:
    """The manifest of a part, or a new one."""
    if path.exists():
        manifest = read_manifest(path)
        say_if_code_changed(manifest, path.parent)
        return manifest
    return {"source": source, **describe(source, cfg), "tokenizer": tok.digest(), "dtype": "uint16",
            "vocab_size": tok.vocab_size, "code": code_digest(*READING), "complete": False, "shards": [],
            "stops": [], "reader": Documents(source, cfg).state()}


def say_if_code_changed(manifest: dict, folder: Path) -> None:
    """A hacker who edits a reader expects other tokens."""
    if said := changed_code(manifest.get("code"), READING, folder):
        print(said)


def read_manifests(folder: Path | str, tok: Tokenizer, budget: int = 0) -> list[dict]:
    """The manifests of all parts of a source. Raises UserError if one is missing, stale, or has fewer tokens
    than its part of the budget (0: all).

    A source may have been prepared twice, as a whole and in parts. The smallest number of parts that has the
    tokens is used.
    """
    sets: dict[int, list[str]] = {}
    for path in sorted(Path(folder).glob("manifest_*.json")):
        if match := re.fullmatch(r"manifest_(\d+of(\d+))", path.stem):
            sets.setdefault(int(match[2]), []).append(match[1])
    lacks = f"there are the parts {', '.join(part for parts in sets.values() for part in parts) or 'none'}"
    for n, parts in sorted(sets.items()):
        if len(parts) != n:
            continue
        manifests = [read_manifest(Path(folder) / f"manifest_{part}.json") for part in parts]
        needed = math.ceil(budget / n)
        if stale := [each["tokenizer"] for each in manifests if each["tokenizer"] != tok.digest()]:
            raise UserError(f"the tokens in {folder} were made with another tokenizer: {stale[0]}, not "
                            f"{tok.digest()}")
        short = [(part, each) for part, each in zip(parts, manifests) if not is_ready(each, needed)]
        if not short:
            return manifests
        part, each = short[0]
        has = f"has {tokens_in(each):,} of {needed:,} tokens" if tokens_in(each) < needed else (
            "is not complete" + " (--data_tokens trains on a part of a source)" * (not budget))
        lacks = f"they are still being made: part {part} {has}" + (
            f"; each part has its own --part=i/{n}" if n > 1 else "")
    raise UserError(f"the tokens in {folder} are incomplete: {lacks}")


def prepare(cfg: Config, argv: list[str]) -> None:
    """Make what a run lacks: its tokenizer, and the tokens of built-in and local sources. For a source on the
    hub, which may take a day and a network, this raises UserError with the command that prepares it."""
    if cfg.fractions:
        raise UserError("this config is for sft.py or dpo.py: its `data` are fractions of chats or pairs")
    if cfg.part != "1/1":
        raise UserError(f"--part={cfg.part} is for data.py, whose work machines can share: leave it out")
    from_hub = [source for source in cfg.sources if isinstance(locate(source), Hub)]
    way_out = (f"prepare them with python data.py {' '.join(argv)}, or train on the built-in corpus with "
               "--data=builtin")
    trained = (Path(cfg.out_dir) / "tokenizer" / "recipe.json").exists()
    if from_hub and not (cfg.tokenizer or cfg.init_from or trained):
        raise UserError(f"there are no tokens and no tokenizer for {', '.join(from_hub)} yet: {way_out}")
    tok = load_or_train(cfg)
    if note := code_note(cfg):
        print(note)
    for source in cfg.sources:
        folder = shard_folder(source, cfg, tok)
        try:
            manifests = read_manifests(folder, tok, budget_of(source, cfg))
            say_if_code_changed(manifests[0], folder)
            for each in manifests:
                if each["reader"]["left_out"]:
                    print(summary(each, 0))
        except UserError as error:
            parts = [path for path in folder.glob("manifest_*.json") if path.name != "manifest_1of1.json"]
            if source in from_hub or parts:  # data.py --part=... has begun: its other parts are missing
                raise UserError(f"the tokens of {source} are not ready ({error}): {way_out}") from None
            print(f"preparing the tokens of {source}", flush=True)
            print(summary(write_shards(source, cfg, tok), budget_of(source, cfg)))
