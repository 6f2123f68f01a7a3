"""
tokenizer.py: text <-> token ids, and conversations as token ids.

    "Once upon a time"  ->  [1118, 1036, 274, 641]  ->  "Once upon a time"        (ids of pretrained/demo)

A model reads numbers: the ids of tokens, which are pieces of text. The simplest pieces are the bytes of
UTF-8, but then a page is thousands of positions long. Byte pair encoding (BPE) shortens it: find the pair of
neighbors that occurs most often in the training text, give it an id of its own, write that id wherever the
pair occurs, and repeat until the vocabulary is full:

    h u g    h u g s    p u g    p u n    b u g      (u, g) occurs most often: it becomes "ug"
    h ug     h ug s     p ug     p u n    b ug       (h, ug) occurs twice: it becomes "hug"
    hug      hug s      p ug     p u n    b ug       ...

Ids 0 to 16 are special tokens, then come the 256 bytes, then the merged pairs in the order in which they were
found. Special tokens mark what is not text: the end of a document, the turns of a conversation. Only code
places them. A "<|im_end|>" typed by a user is encoded as ordinary characters; otherwise any user could end
the user's turn and speak as the assistant.

    python tokenizer.py config/demo.py               writes out/demo/tokenizer/                  next: data.py
"""

import hashlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tqdm import tqdm

import config
from config import Config, UserError
from corpus.files import encodable
from corpus.sources import (
    READING,
    Documents,
    account,
    changed_code,
    code_digest,
    content_of,
    recipe_of,
)
from plumbing import disk
from plumbing.processes import command

# SmolLM's list as published. Only the first three are used here; the others mark code in its training data.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>",
           "<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>",
           "<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<jupyter_script>",
           "<empty_output>"]
FIRST_MERGE = len(SPECIAL) + 256  # the id of the first merged pair

# ---------------------------------------------------------------------------------------------------------
# byte pair encoding

# Text is cut into words first, and pairs never cross a cut: "In 42, it's" -> In| |4|2|,| it|'s. So no token
# covers "dog." or "the dog". Each digit is a word of its own: every number is spelled with the same ten
# tokens, and the model can learn to add digit by digit. The split also writes each byte as a visible
# character: a space becomes "Ġ".
SPLIT = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])


def byte_characters() -> list[str]:
    """The visible character of each of the 256 bytes, as in GPT-2, since vocabulary files hold text, not
    bytes.

    Printable Latin-1 characters represent themselves; the remaining bytes use the characters from 256 on.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]


BYTES = sorted(byte_characters())  # in the order of their ids, as in SmolLM: by character, not by byte value
BYTE_IDS = {character: len(SPECIAL) + i for i, character in enumerate(BYTES)}


def split(text: str) -> list[str]:
    """Text -> its words: "In 42, it's" -> ["In", "Ġ", "4", "2", ",", "Ġit", "'s"]."""
    return [word for word, _ in SPLIT.pre_tokenize_str(encodable(text))]


def merge(word: list, pair: tuple, new: int | str) -> list:
    """Write `new` for every occurrence of pair, left to right: ([5, 5, 5, 6], (5, 5), 9) -> [9, 5, 6]."""
    merged, i = [], 0
    while i < len(word):
        if word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]:
            merged.append(new)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def train_bpe_slowly(texts: Iterable[str], vocab_size: int) -> list[tuple[int, int]]:
    """The merges [(left id, right id), ...]; the k-th one creates id FIRST_MERGE + k. This is the whole
    algorithm.

    Among equally frequent pairs the one with the smaller ids wins.
    """
    words = [[BYTE_IDS[character] for character in word] for text in texts for word in split(text)]
    merges: list[tuple[int, int]] = []
    while FIRST_MERGE + len(merges) < vocab_size:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [merge(word, best, FIRST_MERGE + len(merges)) for word in words]
        merges.append(best)
    return merges


def train_bpe(texts: Iterable[str], vocab_size: int) -> list[tuple[int, int]]:
    """The same merges, fast enough for 49,152 ids. (At a first reading go on at encode_bpe.)

    Each distinct word is stored once, with its frequency. A merge changes only the words that contain the
    pair: `where` remembers which words these are, and a heap keeps the most frequent pair on top. A count in
    the heap may be out of date, but only too high: a merge lowers the counts of the pairs it breaks, and
    pairs with the new id are pushed with their true count. So when the top of the heap is out of date, it
    goes back with its lower count.
    """
    occurrences = Counter(word for text in texts for word in split(text))
    words = [[BYTE_IDS[character] for character in word] for word in occurrences]
    frequency = list(occurrences.values())
    pair_counts: dict[tuple, int] = defaultdict(int)
    where: dict[tuple, list] = defaultdict(list)
    for index, word in enumerate(words):
        for pair, count in Counter(zip(word, word[1:])).items():
            pair_counts[pair] += frequency[index] * count
            where[pair].append(index)
    heap = sorted((-count, pair) for pair, count in pair_counts.items())
    merges: list[tuple[int, int]] = []
    with tqdm(total=vocab_size - FIRST_MERGE, desc="merges", leave=False, disable=None) as bar:
        while heap and FIRST_MERGE + len(merges) < vocab_size:
            count, pair = heapq.heappop(heap)
            if -count != pair_counts[pair]:
                if pair_counts[pair] > 0:
                    heapq.heappush(heap, (-pair_counts[pair], pair))
                continue
            new, pushed = FIRST_MERGE + len(merges), set()
            merges.append(pair)
            for index in dict.fromkeys(where.pop(pair)):  # each word once, even if it was noted twice
                words[index], changed = merge_and_count(words[index], pair, new)
                for neighbors, difference in changed.items():
                    pair_counts[neighbors] += difference * frequency[index]
                    if new in neighbors:
                        where[neighbors].append(index)
                        pushed.add(neighbors)
            for neighbors in pushed:
                heapq.heappush(heap, (-pair_counts[neighbors], neighbors))
            bar.update()
    return merges


def merge_and_count(word: list[int], pair: tuple[int, int], new: int) -> tuple[list[int], Counter]:
    """merge(word, pair, new), and how it changes the counts of pairs: only next to where it merges.

    A word may be very long, such as DNA or an image in base64. So the pair is searched for by list.index, and
    what lies between two occurrences is copied as a whole.
    """
    places, place = [], -2
    try:
        while True:
            place = word.index(pair[0], place + 2)
            while word[place + 1] != pair[1]:
                place = word.index(pair[0], place + 1)
            places.append(place)
    except (ValueError, IndexError):  # no further occurrence
        pass
    merged, end = [], 0
    for place in places:
        merged += word[end:place]
        merged.append(new)
        end = place + 2
    merged += word[end:]
    n_old, n_new = len(word) - 1, len(merged) - 1  # pairs
    old = {i for place in places for i in (place - 1, place, place + 1) if 0 <= i < n_old}
    now = {i for n, place in enumerate(places) for i in (place - n - 1, place - n) if 0 <= i < n_new}
    changed = Counter((merged[i], merged[i + 1]) for i in now)
    changed.subtract((word[i], word[i + 1]) for i in old)
    return merged, changed


def encode_bpe(text: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Text -> tokens, as visible characters: in each word join the pair that was merged first, again and
    again.

    ranks: {(left token, right token): its position among the merges}. With (u, g) at 0 and (h, ug) at 1:

        h u g s  ->  h ug s  ->  hug s

    This repeats the order of training, so a word gets the tokens that it had there; what training never saw
    ends as smaller pieces. Tokenizer.encode uses the library instead, which does the same faster.
    """
    tokens = []
    for word in split(text):
        parts = list(word)
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:]), key=lambda pair: ranks.get(pair, len(ranks)))
            if pair not in ranks:
                break
            parts = merge(parts, pair, pair[0] + pair[1])
        tokens += parts
    return tokens


# ---------------------------------------------------------------------------------------------------------
# the tokenizer

# At a first reading go on at `encode`, below; files and templates are for other programs.

ROLES = ("system", "user", "assistant")
# The chat templates in Jinja, for other programs that open our folders. Tokenizer.chat makes the same ids,
# but never turns a typed "<|im_end|>" into a special token.
CHAT_TEMPLATE = (  # SmolLM's
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOLLM2_TEMPLATE = CHAT_TEMPLATE.replace("{{'<|im_start|>'", (  # begins with SYSTEM if there is no other
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}{{'<|im_start|>'"))


def rust_tokenizer(merges: list[tuple[int, int]]) -> tokenizers.Tokenizer:
    """A tokenizer of the Rust library `tokenizers`, built like SmolLM's, from the merges of train_bpe."""
    tokens, pairs = SPECIAL + BYTES, []
    for left, right in merges:
        pairs.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
    rust = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    rust.pre_tokenizer, rust.decoder = SPLIT, decoders.ByteLevel()
    rust.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return rust


class Tokenizer:
    """Encodes ordinary text, decodes ids, and writes conversations with their special tokens.

    eos_id, <|endoftext|>, ends a document. stop_ids are all ids that end what the accompanying model writes:
    of a base model <|endoftext|>, of a chat model also <|im_end|>.
    """

    def __init__(self, rust: tokenizers.Tokenizer, template: str = CHAT_TEMPLATE,
                 ends: tuple[int, ...] = ()) -> None:
        rust.encode_special_tokens = True  # a typed "<|im_end|>" is text; tokenizer.json does not store this
        self.rust, self.template = rust, template
        self.vocab_size = max(rust.get_vocab().values()) + 1
        self.tokens = [rust.id_to_token(i) or "" for i in range(self.vocab_size)]
        self.eos_id, self.im_start_id, self.im_end_id = map(rust.token_to_id, SPECIAL[:3])
        self.ends = ends or (self.eos_id,)  # the end ids in a model's files, the main one first
        byte_of = {character: bytes([byte]) for byte, character in enumerate(byte_characters())}
        special = {added.content for added in rust.get_added_tokens_decoder().values()}
        self.token_bytes = [token.encode() if token in special else b"".join(map(byte_of.__getitem__, token))
                            for token in self.tokens]

    @property
    def is_chat(self) -> bool:
        """Whether the accompanying model ends its turns, as chat models do."""
        return self.ends[0] != self.eos_id

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end what the accompanying model writes."""
        return frozenset((*self.ends, self.eos_id))

    def for_chat(self) -> "Tokenizer":
        """The same tokenizer for a chat model, which ends its answers with <|im_end|>."""
        return Tokenizer(self.rust, self.template, (self.im_end_id,))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn merges from texts until there are vocab_size ids, or no pair is left.

        Raises UserError for a vocab_size below 273: the special tokens and the bytes are always included.
        """
        if vocab_size < FIRST_MERGE:
            raise UserError(f"vocab_size={vocab_size} must be at least {FIRST_MERGE}: {len(SPECIAL)} special "
                            "tokens and 256 bytes")
        return cls(rust_tokenizer(train_bpe(texts, vocab_size)))

    @classmethod
    def load(cls, folder: Path | str) -> "Tokenizer":
        """Open a folder with a tokenizer.json, or the file itself: ours, or that of a released SmolLM.

        The released vocabulary lacks 21 byte values that its training text did not contain (control
        characters and bytes that never occur in UTF-8), and drops them when it encodes. Ours has all 256.
        Raises UserError for a tokenizer that would encode text differently from SmolLM's.
        """
        file = Path(folder) / "tokenizer.json" if Path(folder).is_dir() else Path(folder)
        rust = disk.read_tokenizer(file, rust_tokenizer([]), SPECIAL[:3])
        template = disk.read_template(file.parent) or CHAT_TEMPLATE
        plain = template.replace("\\n", "\n").removesuffix("\n")  # "\n" in a Jinja string is a line break
        template = plain if plain in (CHAT_TEMPLATE, SMOLLM2_TEMPLATE) else template
        return cls(rust, template, disk.read_end_ids(file.parent))

    def save(self, folder: Path | str, model_max_length: int = 2048) -> None:
        """Write the files of a tokenizer as Hugging Face reads them."""
        special = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[0], "unk_token": SPECIAL[0]}
        if self.is_chat:
            special |= {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[2]}
        settings = {**special, "additional_special_tokens": SPECIAL[1:], "add_prefix_space": False,
                    "chat_template": self.template, "clean_up_tokenization_spaces": False,
                    "model_max_length": model_max_length, "tokenizer_class": "PreTrainedTokenizerFast"}
        disk.write_text(Path(folder) / "tokenizer.json", self.rust.to_str(pretty=True))
        disk.write_json(Path(folder) / "tokenizer_config.json", settings)
        disk.write_json(Path(folder) / "special_tokens_map.json", special)

    def digest(self) -> str:
        """A short fingerprint of the vocabulary. The folder names of token shards depend on it."""
        return hashlib.sha256("\n".join(self.tokens).encode()).hexdigest()[:12]

    def encode(self, text: str) -> list[int]:
        """Text -> ids. Nothing in the text is ever taken for a special token."""
        return self.rust.encode(encodable(text)).ids

    def decode(self, ids: Iterable[int]) -> str:
        """ids -> text. Invalid UTF-8 becomes U+FFFD; ids beyond the vocabulary are skipped."""
        known = (self.token_bytes[i] for i in ids if 0 <= i < self.vocab_size)
        return b"".join(known).decode("utf-8", "replace")

    def chat(self, messages: list[dict[str, str]],
             add_generation_prompt: bool = False) -> tuple[list[int], list[bool]]:
        """[{"role": "user", "content": "hi"}, ...] -> (ids, mask): the chat template with its special tokens.

            <|im_start|>user⏎hi<|im_end|>⏎<|im_start|>assistant⏎Hello!<|im_end|>⏎
                                                                ^^^^^^^^^^^^^^^^
        mask is True where the assistant speaks: its words and the end of its turn. add_generation_prompt
        appends <|im_start|>assistant⏎, where a model continues. Without it the model does not know that it is
        its turn.

        An answer is encoded apart from what comes before it, because that is how it is generated. Encoded as
        one text, "assistant⏎    return 3" has a token "⏎   ", with which no answer can begin. So the ids of
        an answer that begins with white space differ from those of transformers' apply_chat_template.

        Raises UserError for an unknown role, content that is not text, or an unknown template.
        """
        ids: list[int] = []
        mask: list[bool] = []

        def add(new: list[int], is_target: bool = False) -> None:
            ids.extend(new)
            mask.extend([is_target] * len(new))

        for message in self.with_default_system(messages):
            role, content = message.get("role"), message.get("content")
            if role not in ROLES or not isinstance(content, str):
                raise UserError(f"a message must have a role ({', '.join(ROLES)}) and text as content, "
                                f"not {str(message)[:200]}")
            if role == "assistant":
                add([self.im_start_id, *self.encode("assistant\n")])  # as when it is asked
                add([*self.encode(content), self.im_end_id], is_target=True)
            else:
                add([self.im_start_id, *self.encode(f"{role}\n{content}"), self.im_end_id])
            add(self.encode("\n"))
        if add_generation_prompt:
            add([self.im_start_id, *self.encode("assistant\n")])
        return ids, mask

    def with_default_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """The messages, with SmolLM2's default system message in front if its template asks for one."""
        if self.template not in (CHAT_TEMPLATE, SMOLLM2_TEMPLATE):
            raise UserError("the chat template of this checkpoint is neither SmolLM's nor SmolLM2's, and no "
                            f"other is supported: {self.template[:60]!r}... Continue text with --prompt, or "
                            "delete the template from its folder (chat_template.jinja, or chat_template "
                            "in tokenizer_config.json) and teach the model SmolLM's with sft.py")
        if self.template == CHAT_TEMPLATE or not messages or messages[0].get("role") == "system":
            return messages
        return [{"role": "system", "content": SYSTEM}, *messages]


# ---------------------------------------------------------------------------------------------------------
# the tokenizer of a run: files and messages; skip the rest at a first reading


def training_texts(cfg: Config) -> Iterator[str]:
    """Texts to train on: each source's weight times cfg.tokenizer_bytes. Held-out texts are skipped."""
    for source, weight in cfg.mixtures[0][1].items():
        documents, wanted, read = Documents(source, replace(cfg, part="1/1")), weight * cfg.tokenizer_bytes, 0
        with tqdm(total=int(wanted), unit="B", unit_scale=True, desc=source, disable=None) as bar:
            for split, text in chain.from_iterable(map(documents.split, documents)):
                if split == "val":
                    continue
                yield text
                size = len(text.encode())
                read += size
                bar.update(size)
                if read >= wanted:
                    enough = f"are its share of tokenizer_bytes={cfg.tokenizer_bytes:,}; no more were needed"
                    documents.notes[enough] = documents.read
                    break
        if not read:
            raise UserError(f"there is no text in {source}")
        print(account(**documents.state()))


CODE = (*READING, "tokenizer.py")  # what makes a tokenizer of files


def recipe(cfg: Config) -> dict:
    """What a tokenizer depends on."""
    contents, weights = recipe_of(cfg), cfg.mixtures[0][1]
    return {"vocab_size": cfg.vocab_size, "tokenizer_bytes": cfg.tokenizer_bytes,
            "val_fraction": cfg.val_fraction, "weights": weights,
            "contents": {source: contents[source] for source in weights}}


def changes(before: dict, now: dict) -> list[str]:
    """How two recipes differ: ["vocab_size 512 -> 1024", "the content of mine.txt"]."""
    found = [f"{name} {before.get(name)} -> {now[name]}" for name in now
             if name != "contents" and before.get(name) != now[name]]
    old = before.get("contents", {})
    return found + [f"the content of {content_of(source)}" for source, content in now["contents"].items()
                    if old.get(source, content) != content]


def load_or_train(cfg: Config) -> Tokenizer:
    """A run's tokenizer: cfg.tokenizer, that of cfg.init_from, or out_dir/tokenizer, trained if missing."""
    if cfg.tokenizer or cfg.init_from:
        return Tokenizer.load(cfg.tokenizer or disk.find(cfg.init_from))
    folder, needed = Path(cfg.out_dir) / "tokenizer", recipe(cfg)
    if (folder / "recipe.json").exists():
        if changed := changes(disk.read_json(folder / "recipe.json"), needed):
            named = Path(cfg.sources[0]).name.partition(".")[0]
            raise UserError(f"the tokenizer in {folder} was trained for something else: "
                            f"{'; '.join(changed)} changed. Choose another --out_dir, such as "
                            f"--out_dir={Path(cfg.out_dir).as_posix()}_{named}, delete the folder to train "
                            f"it again, or keep it with --tokenizer={folder.as_posix()}")
        return Tokenizer.load(folder)
    print(f"training a tokenizer of {cfg.vocab_size:,} ids on {', '.join(cfg.mixtures[0][1])}")
    tok = Tokenizer.train(training_texts(cfg), cfg.vocab_size)
    tok.save(folder, cfg.seq_len)
    made = needed | {"code": code_digest(*CODE)}
    disk.write_json(folder / "recipe.json", made)  # last: it says that the rest is complete
    few = f", not {cfg.vocab_size:,}: the texts have no more pairs" if tok.vocab_size < cfg.vocab_size else ""
    print(f"{folder}: {tok.vocab_size:,} ids{few}")
    return tok


def code_note(cfg: Config) -> str:
    """A sentence if other code than today's made the tokenizer of a run, or ""."""
    path = Path(cfg.out_dir) / "tokenizer" / "recipe.json"
    if cfg.tokenizer or cfg.init_from or not path.exists():
        return ""
    return changed_code(disk.read_json(path).get("code"), CODE, path.parent)


def main(argv: list[str]) -> None:
    cfg = config.load(argv)
    recipe_of(cfg)  # a source that cannot be used is reported even where no text is read
    tok = load_or_train(cfg)
    if note := code_note(cfg):
        print(note)
    text = "Once upon a time, 2 + 2 was 4."
    ids = range(FIRST_MERGE, FIRST_MERGE + 10)
    print(f"ids {ids[0]} to {ids[-1]}: {[tok.decode([i]) for i in ids]}")
    print(f"{text!r} -> {[tok.decode([i]) for i in tok.encode(text)]}")


if __name__ == "__main__":
    command(main)
