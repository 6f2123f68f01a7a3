"""
config: every setting of every stage, in one frozen dataclass.

A preset is a Python file that builds one `config = Config(...)`; the command line changes fields of it:

    python train.py config/demo.py --lr=1e-3 --max_steps=200

Nothing else configures this project: no environment variables, no second default elsewhere. A wrong name
or an impossible combination is told at once, with everything else that is wrong, before any work begins.

    python train.py --help                          lists the fields                       next: tokenizer.py
"""

import dataclasses
import difflib
import inspect
import os
import re
import runpy
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.checks import types_of, wrong_types, wrong_values


class UserError(ValueError):
    """A mistake that the user can mend: one sentence with the value and the way out. Scripts exit with 2."""


@dataclass(frozen=True)
class Config:
    """All settings. The defaults are SmolLM-135M's; Hugging Face's name of a field stands in [brackets]."""

    # the model
    vocab_size: int = 49152  # ids that the tokenizer knows [vocab_size]
    n_layer: int = 30  # decoder blocks [num_hidden_layers]
    n_head: int = 9  # query heads [num_attention_heads]
    n_kv_head: int = 3  # key/value heads, each shared by n_head / n_kv_head query heads [num_key_value_heads]
    d_model: int = 576  # width of the residual stream [hidden_size]
    d_ff: int = 1536  # width inside the feed-forward layer [intermediate_size]
    seq_len: int = 2048  # positions in a row, and the longest context [max_position_embeddings]
    rope_theta: float = 10000.0  # base of the rotary wavelengths [rope_theta]
    norm_eps: float = 1e-5  # added inside the root of RMSNorm [rms_norm_eps]
    tie_embeddings: bool = True  # the output head is the embedding matrix [tie_word_embeddings]
    init_std: float = 0.0416  # standard deviation of fresh weights; about 1 / sqrt(d_model)
    doc_mask: bool = False  # True: documents that share a row do not see each other

    # the run
    out_dir: str = "out/smol_135m"  # tokenizer, token shards and checkpoints are written below this folder
    seed: int = 8  # of the fresh weights and the printed samples
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "bfloat16"  # of matrix products in training (bfloat16: autocast); weights stay float32
    compile: bool = False  # torch.compile the model: faster steps after a minute of compiling
    init_from: str | None = None  # start from this checkpoint; its shape and tokenizer are used

    # the data
    data: tuple = (("builtin", 1.0),)  # (source, weight) or (source, weight, first step); see sources.py
    fractions: bool = False  # sft.py, dpo.py: the numbers in `data` are the share of a source that is used
    data_seed: int = 42  # of the built-in corpus and of the order of rows
    tokenizer: str | None = None  # folder of a finished tokenizer; None: train one, kept in out_dir/tokenizer
    tokenizer_bytes: int = 100_000_000  # text that a new tokenizer is trained on, drawn from `data` by weight
    filters: tuple = ()  # data.py: (source, step, step ...): which steps of curate.py its texts must pass
    classifier: str | None = None  # file of weights for the step `educational`; see classifier.py
    val_fraction: float = 0.0005  # share of the documents that is kept out of training
    on_bad: str = "stop"  # at a bad record: stop, or skip it (and stop when over 1% are bad)
    shard: str = "1/1"  # data.py: the part of the work that this machine does, 3/64 is the third of 64

    train_on_prompts: bool = False  # sft.py: learn the questions, too, as SmolLM-Instruct v0.1 did

    # the loop
    max_steps: int = 0  # optimizer steps; 0: as many as `epochs` need
    epochs: float = 1.0  # passes over all rows of all sources, when max_steps is 0
    batch: int = 512  # rows a step, all devices together
    micro_batch: int = 8  # rows in one forward pass of one device
    optimizer: str = "adamw"  # adamw, or muon (for the matrices inside the blocks, adamw for the rest)
    lr: float = 3e-3  # peak learning rate
    schedule: str = "wsd"  # wsd (warm-up, stable, decay by 1 - sqrt) or cosine
    warmup_steps: int = 0  # steps of linear warm-up; 0: warmup_ratio decides
    warmup_ratio: float = 0.0  # warm-up as a share of the run, when warmup_steps is 0
    decay_steps: int | None = None  # wsd: length of the final decay; None: the last fifth of the run
    beta1: float = 0.9  # AdamW's average of the gradient
    beta2: float = 0.95  # AdamW's average of its square
    weight_decay: float = 0.01  # on every parameter, as in SmolLM
    grad_clip: float = 1.0  # largest norm of the whole gradient
    eval_every: int = 2000  # steps between validations; 0: only at the end
    eval_batches: int = 4  # batches of `batch` rows in one validation
    save_every: int = 2000  # steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 3  # how many of the newest stay on disk; 0: all
    sample_every: int = 2000  # steps between printed samples; 0: none

    # preferences
    dpo_beta: float = 0.05  # how much the model may move away from the reference: less for a larger beta
    dpo_max_length: int = 1024  # ids of a prompt and an answer together
    dpo_max_prompt_length: int = 512  # where these are too many, the prompt keeps its last so many

    def __post_init__(self) -> None:
        problems = wrong_types(self) or wrong_values(self)
        if problems:
            raise UserError("\n  - ".join(["this config cannot work:", *problems]))

    @property
    def head_dim(self) -> int:
        """Width of one attention head, D."""
        return self.d_model // self.n_head

    @property
    def n_params(self) -> int:
        """Trainable numbers: 134,515,008 for SmolLM-135M."""
        attention = 2 * self.d_model**2 + 2 * self.d_model * self.n_kv_head * self.head_dim
        block = attention + 3 * self.d_model * self.d_ff + 2 * self.d_model
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return embeddings + self.n_layer * block + self.d_model

    @property
    def tokens_per_step(self) -> int:
        """Targets in one optimizer step."""
        return self.batch * self.seq_len

    @property
    def mixtures(self) -> list[tuple[int, dict[str, float]]]:
        """[(first step, {source: weight})] by step: one mixture, or more when it changes on the way."""
        mixtures: dict[int, dict[str, float]] = {}
        for source, weight, *start in self.data:
            mixtures.setdefault(start[0] if start else 0, {})[source] = weight
        return sorted(mixtures.items())

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source once, in the order of `data`."""
        return tuple(dict.fromkeys(entry[0] for entry in self.data))

    def micro_steps(self, world: int) -> int:
        """Forward passes that each of `world` devices makes in a step. Raises UserError if that is uneven."""
        if self.batch % (self.micro_batch * world):
            raise UserError(f"batch={self.batch} must be a multiple of micro_batch={self.micro_batch} times "
                            f"{world} devices: change --batch or --micro_batch")
        return self.batch // (self.micro_batch * world)


def load(argv: list[str]) -> Config:
    """["config/demo.py", "--lr=1e-3"] -> Config: a preset, then changes as --field=value or --field value.

    Raises UserError, with everything that is wrong at once: unknown preset or fields, types, combinations.
    """
    changes, presets, problems, words = {}, [], [], list(argv)
    while words:
        name, equals, text = words.pop(0).partition("=")
        if not name.startswith("--"):
            presets.append(name + equals + text)
        elif name[2:] not in Config.__dataclass_fields__:
            problems.append(f"there is no config field {name[2:]!r}." + suggestion(name[2:]))
        elif not equals and (not words or words[0].startswith("--")):
            problems.append(f"{name} needs a value: {name}=...")
        else:
            try:
                changes[name[2:]] = parse(name[2:], text if equals else words.pop(0))
            except UserError as error:
                problems.append(str(error))
    if len(presets) != 1:
        problems.append(f"name one preset, not {len(presets)} (there are {', '.join(known_presets())}), "
                        "then changes like --lr=1e-3")
        raise UserError("\n".join(problems))
    try:
        config = dataclasses.replace(load_preset(presets[0]), **changes)
    except UserError as error:
        raise UserError("\n".join([*problems, str(error)])) from None
    if problems:
        raise UserError("\n".join(problems))
    return config


def load_preset(path: Path | str) -> Config:
    """The Config that the Python file at `path` calls `config`."""
    if not Path(path).is_file():
        raise UserError(f"there is no preset {path!r}: there are {', '.join(known_presets())}")
    try:
        config = runpy.run_path(str(path)).get("config")
    except UserError:
        raise
    except Exception as error:  # a preset is a program, and may be wrong in every way
        if name := re.search(r"unexpected keyword argument '(\w+)'", str(error)):  # a misspelt field
            raise UserError(f"{path}: there is no config field {name[1]!r}." + suggestion(name[1])) from None
        raise UserError(f"{path} is not Python that works: {type(error).__name__}: {error}") from None
    if not isinstance(config, Config):
        raise UserError(f"{path} is not a preset: it must contain a line like config = Config(...)")
    return config


def parse(name: str, text: str) -> Any:
    """The text of a command-line value as the type of its field: ("lr", "1e-3") -> 0.001."""
    allowed = types_of(Config, name)
    try:
        if types.NoneType in allowed and text == "None":
            return None
        if allowed[0] is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return {"data": parse_data, "filters": parse_filters}.get(name, allowed[0])(text)
    except (ValueError, KeyError):
        wanted = {bool: "True or False", int: "a whole number", float: "a number",
                  "data": "like builtin or name:0.7,other:0.3", "filters": "like builtin:c4+dedup,name:dedup"}
        raise UserError(f"--{name}={text} must be {wanted.get(name) or wanted[allowed[0]]}") from None


def parse_data(text: str) -> tuple:
    """"a:0.7,b:0.3" -> (("a", 0.7), ("b", 0.3)); "a" -> (("a", 1.0),); "a:1,b:1@500" changes at step 500."""
    if os.path.exists(text):  # a path may hold commas and colons
        return ((text, 1.0),)
    entries = []
    for part in text.split(","):
        match = re.fullmatch(r"(.+):([0-9.eE+-]+)(?:@(\d+))?", part)
        weight_and_step = (float(match[2]), *([int(match[3])] if match[3] else [])) if match else (1.0,)
        entries.append((match[1] if match else part, *weight_and_step))
    return tuple(entries)


def parse_filters(text: str) -> tuple:
    """"a:c4+dedup,b:educational" -> (("a", "c4", "dedup"), ("b", "educational")); "" and "()" -> ()."""
    entries = [re.fullmatch(r"(.+):([\w+]+)", part) for part in text.split(",") if text not in ("", "()")]
    if None in entries:
        raise ValueError
    return tuple((entry[1], *entry[2].split("+")) for entry in entries)


def suggestion(name: str) -> str:
    near = difflib.get_close_matches(name, Config.__dataclass_fields__, n=1, cutoff=0.5)
    return f" Did you mean --{near[0]}?" if near else " --help lists them all."


def known_presets() -> list[str]:
    here = Path(__file__).parent
    where = here.name if Path.cwd() == here.parent else here.as_posix()
    return sorted(f"{where}/{file.name}" for file in here.glob("*.py")
                  if file.stem not in ("__init__", "checks"))


def field_help(config: Config) -> str:
    """One line a field: its name, its value in `config`, and its comment in the source of Config."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    return "\n".join(f"  --{f.name}={getattr(config, f.name)}".ljust(34) + f"  {comments[f.name]}"
                     for f in dataclasses.fields(config))


def open_streams() -> None:
    """What a terminal cannot show is shown as "?", and a stream that was closed goes nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def command(main: Callable[[list[str]], None], own_help: bool = False) -> None:
    """Run a script's main(argv): --help prints its docstring and the fields, mistakes exit with code 2."""
    argv = sys.argv[1:]
    open_streams()
    try:
        if {"--help", "-h"} & set(argv) and not own_help:
            presets = [word for word in argv if not word.startswith("-")][:1]
            print(sys.modules["__main__"].__doc__.strip(), "\n\nfields, with their values:\n")
            print(field_help(load_preset(presets[0]) if presets else Config()))
        else:
            main(argv)
    except BrokenPipeError:  # nobody reads any more, as behind `| head`
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        sys.exit(141)
    except (UserError, OSError) as error:  # OSError: a full disk, a folder that may not be written to
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if "allocate" not in str(error):  # words of torch, on any device, and of numpy
            raise
        print(f"error: there is not enough memory: {str(error).splitlines()[0]}\n"
              "lower --micro_batch, or take a smaller model", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
