"""
tokenizer.py: text <-> numbers, and conversations as numbers.

    "Once upon a time"  ->  [6403, 1980, 253, 655]  ->  "Once upon a time"

The numbers (ids) are those of byte-level BPE (bpe.py): ids 0-16 are SmolLM's special tokens, then come the
256 bytes, then the merged pairs in the order in which they were found. Special tokens mark what is not text:
the end of a document, the turns of a conversation. Only code places them. "<|im_end|>" typed by a user is
encoded as ordinary characters, or any user could end the user's turn and speak as somebody else.

    python tokenizer.py config/demo.py [--backend=rust]     writes out/demo/tokenizer/         next: data.py
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import tokenizers
from tqdm import tqdm

import bpe
from plumbing import checkpoint
import config
from config import Config, UserError
from config.checks import AT_MOST
from corpus.sources import Documents
from plumbing.hf_config import chat_template

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>",
           "<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>",
           "<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<jupyter_script>",
           "<empty_output>"]
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (  # SmolLM's own, in Jinja, for other programs that read the folder; Tokenizer.chat is ours
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # SmolLM2's, if there is none
SMOLLM2_TEMPLATE = CHAT_TEMPLATE.replace("{{'<|im_start|>'", (
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}{{'<|im_start|>'"))
DEFAULT_SYSTEM = {CHAT_TEMPLATE: None, SMOLLM2_TEMPLATE: SYSTEM}  # of each template that Tokenizer.chat knows


def byte_level_bpe(merges: list[tuple[int, int]]) -> tokenizers.Tokenizer:
    """A tokenizer of the Rust library `tokenizers`, of SmolLM's structure, from the merges of bpe.train."""
    tokens = SPECIAL + sorted(bpe.byte_characters())
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    pairs = [(tokens[left], tokens[right]) for left, right in merges]
    return dressed(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, pairs))


def splitting(bpe_model: tokenizers.models.Model) -> tokenizers.Tokenizer:
    """A tokenizer of the Rust library with SmolLM's split before a BPE model."""
    rust = tokenizers.Tokenizer(bpe_model)
    split = [tokenizers.pre_tokenizers.Digits(individual_digits=True),
             tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    rust.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(split)
    return rust


def dressed(bpe_model: tokenizers.models.Model) -> tokenizers.Tokenizer:
    """The whole of SmolLM's tokenizer around a BPE model: the split, the decoder and the special tokens."""
    rust = splitting(bpe_model)
    rust.decoder = tokenizers.decoders.ByteLevel()
    rust.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return rust


def train_with_rust(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """The same merges from the library's own trainer. It must not know the special tokens while it reads:
    it would cut them out of the texts, where they are ordinary words."""
    rust = splitting(tokenizers.models.BPE())
    rust.train_from_iterator(map(bpe.clean, texts), tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=sys.stderr.isatty(),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return dressed(rust.model)


def read(file: Path) -> tokenizers.Tokenizer:
    """A tokenizer.json. Raises UserError where it is damaged, or would encode otherwise than SmolLM's."""
    try:
        text = file.read_text(encoding="utf-8")
        for key, value in json.loads(text)["model"].items():  # one more setting, and other ids come out
            if value and key not in ("type", "vocab", "merges"):
                raise ValueError(f"its model has {key}={str(value)[:80]}")
        rust = tokenizers.Tokenizer.from_str(text)
        vocab, added = rust.get_vocab(), rust.get_added_tokens_decoder().values()
        if (largest := max(vocab.values(), default=0)) >= AT_MOST["vocab_size"]:
            raise ValueError(f"the id {largest} is not below {AT_MOST['vocab_size']}")
        if len(set(vocab.values())) < len(vocab):
            raise ValueError("two of its tokens have the same id")
        strange = set("".join(vocab.keys() - {token.content for token in added})) - set(bpe.byte_characters())
        if strange:
            raise ValueError(f"its tokens hold {min(strange)!r}, which stands for no byte")
        rust.no_truncation()  # transformers writes down what it was last asked for
        rust.no_padding()
        if not rust.num_special_tokens_to_add(is_pair=False):
            rust.post_processor = None  # transformers 5 writes one that adds nothing
        ours, theirs = (json.loads(each.to_str()) for each in (byte_level_bpe([]), rust))
        same = all(theirs[key] == ours[key] for key in ("normalizer", "pre_tokenizer", "post_processor"))
        special = {token.content for token in added if token.special}
        if not same or len(special) < len(added) or not special.issuperset(SPECIAL[:3]):
            raise ValueError("its split or special tokens differ")
        return rust
    except OSError:
        raise UserError(f"there is no tokenizer at {file}: train one with tokenizer.py") from None
    except Exception as error:  # the library raises plain Exception for a file that is not a tokenizer
        raise UserError(f"{file} is not a tokenizer like SmolLM's: {error}") from None


def recognised(template: str | None) -> str:
    """A template as it stands in DEFAULT_SYSTEM, if it is one of those; SmolLM's for None; or as it is."""
    if template is None:
        return CHAT_TEMPLATE
    plain = template.replace("\\n", "\n").removesuffix("\n")  # \n in a string of Jinja's is a new line
    return plain if plain in DEFAULT_SYSTEM else template


# ---------------------------------------------------------------------------------------------------------
# the tokenizer


class Tokenizer:
    """Encodes ordinary text, decodes ids, and writes conversations with their special tokens.

    The work at speed is done by the library `tokenizers`; encode_slowly shows what it does.
    """

    def __init__(self, rust: tokenizers.Tokenizer, template: str = CHAT_TEMPLATE) -> None:
        self.template = template
        rust.encode_special_tokens = True  # a typed "<|im_end|>" is text; the file does not keep this
        self.rust = rust
        self.vocab_size = max(rust.get_vocab().values()) + 1
        self.tokens = [rust.id_to_token(i) or "" for i in range(self.vocab_size)]
        self.eos_id, self.im_start_id, self.im_end_id = map(rust.token_to_id, SPECIAL[:3])
        byte_of = {character: bytes([byte]) for byte, character in enumerate(bpe.byte_characters())}
        special = {added.content for added in rust.get_added_tokens_decoder().values()}
        self.token_bytes = [token.encode() if token in special else b"".join(map(byte_of.__getitem__, token))
                            for token in self.tokens]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, backend: str = "python") -> "Tokenizer":
        """Learn merges from an iterable of texts until there are vocab_size ids, or no pair is left.

        Raises UserError for a vocab_size under 273: 17 special tokens and 256 bytes are always there.
        """
        if vocab_size < len(SPECIAL) + 256:
            raise UserError(f"vocab_size={vocab_size} must be at least {len(SPECIAL) + 256}: "
                            f"{len(SPECIAL)} special tokens and 256 bytes")
        if backend == "rust":
            return cls(train_with_rust(texts, vocab_size))
        return cls(byte_level_bpe(bpe.train(bpe.count_words(texts), vocab_size, len(SPECIAL))))

    @classmethod
    def load(cls, folder: Path | str) -> "Tokenizer":
        """Open a folder with a tokenizer.json, or the file itself: our own, or that of a released SmolLM.

        The released file lacks 21 byte values that its training text never showed (control characters, bytes
        that no UTF-8 text contains); it drops them, so with it not every string comes back. Ours has all 256.
        """
        file = Path(folder) / "tokenizer.json" if Path(folder).is_dir() else Path(folder)
        return cls(read(file), recognised(chat_template(file.parent)))

    def save(self, folder: Path | str, model_max_length: int = 2048, stop_id: int = 0) -> None:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json as Hugging Face reads them.

        stop_id: what ends the words of the model beside it, 0 <|endoftext|>, or 2 <|im_end|> of a chat model.
        """
        special = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[0], "unk_token": SPECIAL[0]}
        if stop_id:
            special |= {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[2]}
        settings = {**special, "additional_special_tokens": SPECIAL[1:], "add_prefix_space": False,
                    "chat_template": self.template, "clean_up_tokenization_spaces": False,
                    "model_max_length": model_max_length, "tokenizer_class": "PreTrainedTokenizerFast"}
        checkpoint.write(Path(folder) / "tokenizer.json", self.rust.to_str(pretty=True))
        checkpoint.write_json(Path(folder) / "tokenizer_config.json", settings)
        checkpoint.write_json(Path(folder) / "special_tokens_map.json", special)

    def digest(self) -> str:
        """A short fingerprint of the vocabulary: token shards are kept under it."""
        return hashlib.sha256("\n".join(self.tokens).encode()).hexdigest()[:12]

    def encode(self, text: str) -> list[int]:
        """Text -> ids. Nothing in the text is ever taken for a special token."""
        return self.rust.encode(bpe.clean(text)).ids

    def encode_slowly(self, text: str) -> list[int]:
        """What encode does, in Python: see bpe.encode."""
        merges = json.loads(self.rust.to_str())["model"]["merges"]
        tokens = bpe.encode(text, {tuple(pair): rank for rank, pair in enumerate(merges)})
        return [i for i in map(self.rust.token_to_id, tokens) if i is not None]

    def decode(self, ids: Iterable[int]) -> str:
        """ids -> text. Bytes that are no valid UTF-8 become U+FFFD, ids beyond the vocabulary nothing."""
        known = (self.token_bytes[i] for i in ids if 0 <= i < self.vocab_size)
        return b"".join(known).decode("utf-8", "replace")

    def complete(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """messages, behind the system message with which SmolLM2's template begins where there is none."""
        if self.template not in DEFAULT_SYSTEM:
            raise UserError("the chat template of this checkpoint is neither SmolLM's nor SmolLM2's, and no "
                            f"other is known here: {self.template[:60]!r}... Continue text with --prompt, or "
                            "delete the template from its folder (chat_template.jinja, or chat_template in "
                            "tokenizer_config.json) and teach the model SmolLM's with sft.py")
        system = DEFAULT_SYSTEM[self.template]
        if not system or not messages or messages[0].get("role") == "system":
            return messages
        return [{"role": "system", "content": system}, *messages]

    def chat(self, messages: list[dict[str, str]],
             add_generation_prompt: bool = False) -> tuple[list[int], list[bool]]:
        """[{"role": "user", "content": "hi"}, ...] -> (ids, mask): the chat template with its special tokens.

        <|im_start|>user⏎hi<|im_end|>⏎<|im_start|>assistant⏎Hello!<|im_end|>⏎
                                                            ^^^^^^^^^^^^^^^^
        mask is True where the assistant speaks: its words, and the end of them. add_generation_prompt appends
        <|im_start|>assistant⏎, where a model continues; without it a model does not know that it is its turn.
        SmolLM2's template begins with a system message of its own where there is none.
        Raises UserError for another role, content that is not text, or a template of neither model.
        """
        ids, mask, newline = [], [], self.encode("\n")
        for message in self.complete(messages):
            role, content = message.get("role"), message.get("content")
            if role not in ROLES or not isinstance(content, str):
                raise UserError(f"a message must have a role ({', '.join(ROLES)}) and a text as content, "
                                f"not {str(message)[:200]}")
            turn = self.rust.encode(bpe.clean(f"{role}\n{content}"))  # at once: a split may span the break
            answer = role == "assistant"
            ids += [self.im_start_id, *turn.ids, self.im_end_id, *newline]
            mask += [False, *(answer and start > len(role) for start, _ in turn.offsets), answer]
            mask += [False] * len(newline)
        if add_generation_prompt:
            ids += [self.im_start_id, *self.encode("assistant\n")]
            mask += [False] * (len(ids) - len(mask))
        return ids, mask


# ---------------------------------------------------------------------------------------------------------
# the tokenizer of a run


def sample_of(cfg: Config) -> Iterator[str]:
    """Texts to train a tokenizer on: a source's weight of cfg.tokenizer_bytes, whatever its shard."""
    for source, weight in cfg.mixtures[0][1].items():
        left = weight * cfg.tokenizer_bytes
        with tqdm(total=int(left), unit="B", unit_scale=True, desc=source, disable=None) as bar:
            for text in Documents(source, replace(cfg, shard="1/1")):
                yield text
                size = len(text.encode("utf-8", "replace"))
                bar.update(size)
                left -= size
                if left <= 0:
                    break
        if left == weight * cfg.tokenizer_bytes:
            raise UserError(f"there is no text in {source}")


def is_ready(cfg: Config) -> bool:
    """Whether of_run needs no training."""
    return bool(cfg.tokenizer or cfg.init_from) or (Path(cfg.out_dir) / "tokenizer" / "recipe.json").exists()


def of_run(cfg: Config, backend: str = "python") -> Tokenizer:
    """A run's tokenizer: cfg.tokenizer, that of cfg.init_from, or out_dir/tokenizer, trained if missing."""
    if cfg.tokenizer or cfg.init_from:
        return Tokenizer.load(cfg.tokenizer or checkpoint.find(cfg.init_from))
    folder = Path(cfg.out_dir) / "tokenizer"
    recipe = {"sources": list(cfg.sources), "vocab_size": cfg.vocab_size}
    if (folder / "recipe.json").exists():
        made_for = checkpoint.read_json(folder / "recipe.json")
        if made_for != recipe:
            raise UserError(f"the tokenizer in {folder} was trained for {made_for}, not for {recipe}: delete "
                            "the folder, choose another --out_dir, or keep it with "
                            f"--tokenizer={folder.as_posix()}")
        return Tokenizer.load(folder)
    print(f"training a tokenizer of {cfg.vocab_size:,} ids on {', '.join(cfg.sources)}")
    tok = Tokenizer.train(sample_of(cfg), cfg.vocab_size, backend)
    tok.save(folder, cfg.seq_len)
    checkpoint.write_json(folder / "recipe.json", recipe)  # last: its presence says that the rest is whole
    print(f"{folder}: {tok.vocab_size:,} ids")
    return tok


def main(argv: list[str]) -> None:
    backends = [word for word in argv if word.startswith("--backend")]
    if backends and backends[-1] not in ("--backend=rust", "--backend=python"):
        raise UserError(f"{backends[-1]}: there are --backend=python and --backend=rust")
    cfg = config.load([word for word in argv if word not in backends])
    tok = of_run(cfg, backends[-1].partition("=")[2] if backends else "python")
    text = "Once upon a time, 2 + 2 was 4."
    print(f"{text!r} -> {[tok.decode([i]) for i in tok.encode(text)]}")


if __name__ == "__main__":
    config.command(main)
