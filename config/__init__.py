"""
config: which settings does every stage have?

All of them are fields of one frozen dataclass. A preset is a Python file that builds one
`config = Config(...)`; the command line changes fields of it:

    python train.py config/demo.py --lr=1e-3 --max_steps=200
    python train.py config/demo.py --help                       lists the fields with their values

Nothing else configures this project: no environment variables and no second default elsewhere. A misspelled
name or an impossible combination is reported before any work begins, together with every other problem.
"""

import dataclasses
import difflib
import inspect
import math
import os
import re
import runpy
import traceback
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


class UserError(Exception):
    """A user's mistake: one sentence with the offending value and how to fix it. Scripts exit with code 2."""


@dataclass(frozen=True)
class Config:
    """All settings. The defaults are SmolLM-135M's; [brackets] hold Hugging Face's name of a field."""

    # The model. A checkpoint keeps all fields of this block, and those that you add: docs/hacking.md.
    vocab_size: int = 49152  # token ids that the model distinguishes [vocab_size]
    n_layer: int = 30  # decoder blocks [num_hidden_layers]
    n_head: int = 9  # query heads [num_attention_heads]
    n_kv_head: int = 3  # key/value heads, each shared by n_head / n_kv_head query heads [num_key_value_heads]
    d_model: int = 576  # width of the residual stream [hidden_size]
    d_ff: int = 1536  # width inside the feed-forward layer [intermediate_size]
    seq_len: int = 2048  # positions per row, and the longest context [max_position_embeddings]
    rope_theta: float = 10000.0  # base of the rotary wavelengths [rope_theta]
    norm_eps: float = 1e-5  # added inside the root of RMSNorm [rms_norm_eps]
    tie_embeddings: bool = True  # the output head is the embedding matrix [tie_word_embeddings]
    init_std: float = 0.0416  # standard deviation of fresh weights; SmolLM's sizes use 1 / sqrt(d_model)
    doc_mask: bool = False  # True: documents that share a row do not attend to each other

    # the run
    out_dir: str = "out/smol_135m"  # folder for the tokenizer, the token shards and the checkpoints
    seed: int = 8  # of the fresh weights and the printed samples
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    dtype: Literal["auto", "bfloat16", "float32"] = "bfloat16"  # of matrix products; auto: what is fast here
    compile: bool = False  # torch.compile the model: faster steps after a minute of compiling
    init_from: str | None = None  # start from this checkpoint, with its shape and its tokenizer

    # The data. In pretraining the numbers in `data` are weights: the shares of the sources in what the model
    # reads, which add up to 1. Presets for sft.py and dpo.py set `fractions`: there 0.5 means half of a
    # source, used once per epoch, so these numbers need not add up to anything.
    data: tuple = (("builtin", 1.0),)  # (source, weight) or (source, weight, first step): corpus/sources.py
    fractions: bool = False  # True: the numbers in `data` are fractions of the sources, not weights
    data_seed: int = 42  # of the built-in corpus and of the order of rows
    data_tokens: int = 0  # to prepare, of all sources together; 0: what max_steps draws plus 2%, or else all
    tokenizer: str | None = None  # folder of a finished tokenizer; None: train one, kept in out_dir/tokenizer
    tokenizer_bytes: int = 100_000_000  # text that a new tokenizer is trained on, drawn from `data` by weight
    val_fraction: float = 0.0005  # share of the documents that is kept out of training
    on_bad: Literal["stop", "skip"] = "stop"  # what to do at a bad record
    max_bad: float = 0.01  # on_bad=skip stops when a larger share is bad; one is always allowed
    ignore: str = ""  # columns of chats and pairs, or keys of messages, to leave out knowingly: weight,notes
    documents: bool = False  # sft.py: rows with only a text are documents, to be learned whole
    part: str = "1/1"  # data.py: this machine's part of the work; 3/64 is the third of 64
    train_on_prompts: bool = False  # sft.py: questions are targets too, as in SmolLM-Instruct v0.1

    # the loop
    max_steps: int = 0  # optimizer steps; 0: as many as `epochs` need
    max_seconds: float = 0.0  # stop after this time; the schedule follows the clock, as if it had max_steps
    epochs: float = 1.0  # passes over all rows of all sources, when max_steps is 0
    batch: int = 512  # rows per step, on all devices together
    micro_batch: int = 8  # rows per forward pass, on one device
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for matrices in blocks, adamw for the rest
    lr: float = 3e-3  # peak learning rate
    schedule: Literal["wsd", "cosine"] = "wsd"  # wsd: warm-up, stable, decay by 1 - sqrt
    warmup_steps: int = 0  # steps of linear warm-up; 0: warmup_ratio decides
    warmup_ratio: float = 0.0  # warm-up as a share of the run, when warmup_steps is 0
    decay_steps: int | None = None  # wsd: length of the final decay; None: the last two fifths of the run
    beta1: float = 0.9  # AdamW: how much of the average gradient is kept from step to step
    beta2: float = 0.95  # AdamW: the same for the average squared gradient
    weight_decay: float = 0.01  # on every parameter, as in SmolLM
    grad_clip: float = 1.0  # the norm of the complete gradient is clipped to this
    eval_every: int = 2000  # steps between validations; 0: only at the end
    eval_batches: int = 4  # batches of `batch` rows per validation
    save_every: int = 2000  # steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 3  # how many of the newest checkpoints are kept; 0: all
    sample_every: int = 2000  # steps between printed samples; 0: none

    # preferences
    dpo_beta: float = 0.05  # penalty for moving away from the reference model; a larger value keeps it closer
    dpo_max_length: int = 1024  # token ids of a prompt and an answer together
    dpo_max_prompt_length: int = 512  # in pairs longer than that, the prompt keeps its last ids, this many

    def __post_init__(self) -> None:
        problems = wrong_types(self) or wrong_values(self)
        if problems:
            raise UserError("\n  - ".join(["this config cannot work:", *problems]))
        for name in self.__dataclass_fields__:  # lr=1 means lr=1.0
            if types_of(self, name) == (float,):
                object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def head_dim(self) -> int:
        """Width of one attention head, D."""
        return self.d_model // self.n_head

    @property
    def n_params(self) -> int:
        """Trainable numbers of a Llama of this shape: 134,515,008 for SmolLM-135M."""
        attention = 2 * self.d_model**2 + 2 * self.d_model * self.n_kv_head * self.head_dim
        block = attention + 3 * self.d_model * self.d_ff + 2 * self.d_model
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return embeddings + self.n_layer * block + self.d_model

    @property
    def flops_per_token(self) -> int:
        """Operations to train on a token: 6 per parameter, one product and one sum forward and two of each
        backward; and in attention 6 n_layer d_model T (half of the scores are masked). PaLM, appendix B."""
        return 6 * self.n_params + 6 * self.n_layer * self.d_model * self.seq_len

    @property
    def tokens_per_step(self) -> int:
        """Positions per optimizer step."""
        return self.batch * self.seq_len

    @property
    def length(self) -> str:
        """How long a run is: "880 steps"."""
        return f"{self.max_seconds:g} seconds" if self.max_seconds else f"{self.max_steps:,} steps"

    @property
    def warmup(self) -> int:
        """Steps of linear warm-up in a run of max_steps. A ratio leaves at least one step for the peak, and
        makes no warm-up of a single step: its learning rate would be 0."""
        from_ratio = min(math.ceil(self.warmup_ratio * self.max_steps), max(self.max_steps - 1, 0))
        return self.warmup_steps or (from_ratio if from_ratio > 1 else 0)

    @property
    def decay(self) -> int:
        """Steps of wsd's final decay in a run of max_steps. Other schedules have no part of that name: 0."""
        if self.schedule != "wsd":
            return 0
        return 2 * self.max_steps // 5 if self.decay_steps is None else self.decay_steps

    @property
    def mixtures(self) -> list[tuple[int, dict[str, float]]]:
        """[(first step, {source: weight})] by step: one mixture, or several when it changes in a run."""
        mixtures: dict[int, dict[str, float]] = {}
        for source, weight, *start in self.data:
            mixtures.setdefault(start[0] if start else 0, {})[source] = weight
        return sorted(mixtures.items())

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source once, in the order of `data`."""
        return tuple(dict.fromkeys(entry[0] for entry in self.data))

    def share_of(self, source: str) -> float:
        """The share of a run's rows that come from a source; its largest weight if nobody knows max_steps."""
        weights = [mixture.get(source, 0) for _, mixture in self.mixtures]
        if not self.max_steps:
            return max(weights)
        starts = [min(start, self.max_steps) for start, _ in self.mixtures]
        lengths = [end - start for start, end in zip(starts, [*starts[1:], self.max_steps])]
        return sum(weight * length for weight, length in zip(weights, lengths)) / self.max_steps

    def micro_steps(self, world: int) -> int:
        """Forward passes of each of `world` devices per step. Raises UserError if the rows do not divide."""
        if self.batch % (self.micro_batch * world):
            raise UserError(f"batch={self.batch} must be a multiple of micro_batch={self.micro_batch} times "
                            f"{world} devices: change --batch or --micro_batch")
        return self.batch // (self.micro_batch * world)


def sized(n_layer: int) -> Config:
    """The demo with one dial: everything that should grow with a model, from its number of layers.

    width  48 n_layer, in heads of 48 channels, and d_ff = 8/3 of it: one aspect ratio for all sizes. The loss
           depends much on the size and little on the shape (Kaplan et al. 2020, figure 5). Two query heads
           share a key/value head, or more of them where their number is odd: 9 share 3, as in SmolLM-135M
    lr     as 1 / sqrt(width). A layer's output should change equally much per step in every width, so an
           update's largest singular value must not grow (Yang, Simon, Bernstein 2023). Muon's is 0.2 lr
           sqrt(longer side): train.py
    batch  n_layer^2 rows. Good batches grow as compute^0.33 (DeepSeek LLM, 2024), the best use of compute
           has parameters grow as compute^0.5 (Hoffmann et al. 2022), and they grow as n_layer^3
    """
    demo = load_preset(Path(__file__).with_name("demo.py"))
    n_kv_head = max((n for n in range(1, n_layer) if n_layer % n == 0), default=1)
    return dataclasses.replace(
        demo, n_layer=n_layer, n_head=n_layer, n_kv_head=n_kv_head, d_model=48 * n_layer, d_ff=128 * n_layer,
        lr=demo.lr * (4 / n_layer) ** 0.5, batch=n_layer**2, micro_batch=n_layer**2)


# ---------------------------------------------------------------------------------------------------------
# what must hold in every Config; each function lists the problems it finds


def types_of(cfg: Config | type[Config], name: str) -> tuple:
    """The types that a field may hold: "decay_steps" -> (int, NoneType)."""
    hint = cfg.__dataclass_fields__[name].type
    return tuple(map(type, choices_of(name))) or typing.get_args(hint) or (hint,)


def choices_of(name: str) -> tuple:
    """The values of a field that has only a few: "schedule" -> ("wsd", "cosine"); () for all others."""
    hint = Config.__dataclass_fields__[name].type
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def wrong_types(cfg: Config) -> list[str]:
    """Values that do not have their field's type. A whole number may be given for a float."""
    problems = []
    for name in cfg.__dataclass_fields__:
        value, allowed = getattr(cfg, name), types_of(cfg, name)
        if type(value) is int and value.bit_length() > 63:
            problems.append(f"{name} is a number of {value.bit_length()} bits, and 63 is the limit")
        elif type(value) not in allowed and not (type(value) is int and float in allowed):
            wanted = " or ".join("None" if t is types.NoneType else t.__name__ for t in allowed)
            problems.append(f"{name}={value!r} must be of type {wanted}")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{name}={value!r} must be a finite number")
    return problems


POSITIVE = ("vocab_size n_layer n_head n_kv_head d_model d_ff seq_len rope_theta norm_eps init_std "
            "tokenizer_bytes epochs batch micro_batch lr grad_clip eval_batches dpo_beta dpo_max_length "
            "dpo_max_prompt_length").split()
SHARES = ("val_fraction", "max_bad", "warmup_ratio", "beta1", "beta2")  # at least 0 and below 1
AT_MOST = {"n_layer": 1000, "n_head": 2**16, "d_model": 2**20, "d_ff": 2**20, "seq_len": 2**24,
           "vocab_size": 2**16}  # shards store ids in 16 bits; the other limits only a damaged file exceeds


def wrong_values(cfg: Config) -> list[str]:
    """Every value and every combination that cannot work."""
    problems = [f"{name}={getattr(cfg, name)} must be above 0" for name in POSITIVE
                if getattr(cfg, name) <= 0]
    problems += [f"{name}={getattr(cfg, name)} must be at most {limit:,}" for name, limit in AT_MOST.items()
                 if getattr(cfg, name) > limit]
    problems += [f"{name}={getattr(cfg, name)} must not be negative" for name in cfg.__dataclass_fields__
                 if name not in (*POSITIVE, *SHARES) and {int, float} & {*types_of(cfg, name)}
                 and (getattr(cfg, name) or 0) < 0]
    problems += [f"{name}={getattr(cfg, name)!r} must be one of {', '.join(map(str, choices))}"
                 for name in cfg.__dataclass_fields__ if (choices := choices_of(name))
                 and getattr(cfg, name) not in choices]
    if not cfg.out_dir:
        problems.append("out_dir must name a folder")
    problems += [f"{name}={getattr(cfg, name)} must be at least 0 and below 1"
                 for name in SHARES if not 0 <= getattr(cfg, name) < 1]
    if problems:
        return problems  # the combinations below divide by these numbers
    if cfg.d_model % cfg.n_head or cfg.head_dim % 2:
        problems.append(f"d_model={cfg.d_model} must be an even multiple of n_head={cfg.n_head}: "
                        "RoPE rotates the channels of a head in pairs")
    if cfg.n_head % cfg.n_kv_head:
        problems.append(f"n_head={cfg.n_head} must be a multiple of n_kv_head={cfg.n_kv_head}")
    if cfg.batch % cfg.micro_batch:
        problems.append(f"batch={cfg.batch} must be a multiple of micro_batch={cfg.micro_batch}")
    if cfg.dpo_max_prompt_length >= cfg.dpo_max_length:
        problems.append(f"dpo_max_prompt_length={cfg.dpo_max_prompt_length} must be below "
                        f"dpo_max_length={cfg.dpo_max_length}: answers need room")
    part = re.fullmatch(r"(\d+)/(\d+)", cfg.part)
    if not part or not 1 <= int(part[1]) <= int(part[2]):
        problems.append(f"part={cfg.part!r} must be like 3/64, counted from 1")
    return problems + wrong_schedule(cfg) + wrong_data(cfg)


def wrong_schedule(cfg: Config) -> list[str]:
    """A warm-up that reaches into the decay makes the learning rate jump. Unknown while max_steps is 0."""
    given = f"warmup_steps={cfg.warmup_steps}" if cfg.warmup_steps else f"warmup_ratio={cfg.warmup_ratio}"
    if cfg.max_seconds and len(cfg.mixtures) > 1:
        return [f"max_seconds={cfg.max_seconds:g} and a mixture that begins at a step do not fit together: "
                "nobody knows when that step will be"]
    if cfg.max_steps and cfg.warmup >= cfg.max_steps:
        return [f"{given} must end before the run of max_steps={cfg.max_steps} does"]
    if cfg.max_steps and cfg.warmup + cfg.decay > cfg.max_steps:
        share = " (two fifths of the run)" if cfg.decay_steps is None else ""
        return [f"{given} and decay_steps={cfg.decay_steps}{share} are together longer than the run: "
                f"{cfg.warmup} + {cfg.decay} steps are more than max_steps={cfg.max_steps}"]
    return []


def wrong_data(cfg: Config) -> list[str]:
    """What is wrong with `data`: its form, its weights, its first steps."""
    for entry in cfg.data:
        form = [type(value) for value in entry] if isinstance(entry, tuple) else []
        if form not in ([str, float], [str, int], [str, float, int], [str, int, int]) or not entry[0]:
            return [f"data entry {entry!r} must be (source, weight) or (source, weight, first step)"]
    if sum(len(weights) for _, weights in cfg.mixtures) < len(cfg.data):
        return ["data names a source twice in one mixture: add the two weights"]
    problems = [f"weight {entry[1]} of {entry[0]!r} must be a multiple of 1/1000, above 0 and at most 1"
                for entry in cfg.data
                if not 0 < entry[1] <= 1 or abs(entry[1] * 1000 - round(entry[1] * 1000)) > 1e-9]
    for start, weights in cfg.mixtures:
        total = sum(weights.values())
        if abs(total - 1) > 1e-9 and not cfg.fractions:
            problems.append(f"the weights of the mixture from step {start} add up to {total:g}, not 1")
    if not cfg.data or cfg.mixtures[0][0] != 0:
        problems.append("data must have a mixture that starts at step 0")
    return problems


# ---------------------------------------------------------------------------------------------------------
# the command line


def load(argv: list[str]) -> Config:
    """["config/demo.py", "--lr=1e-3"] -> Config: a preset, then changes as --field=value or --field value.

    Raises UserError that lists every problem: unknown preset or fields, wrong types, impossible combinations.
    """
    changes, presets, problems, words = {}, [], [], list(argv)
    while words:
        name, equals, text = words.pop(0).partition("=")
        if not name.startswith("--"):
            presets.append(name + equals + text)
            if name.startswith("-"):
                problems.append(f"{name} begins with one dash: it must have two")
        elif name[2:] not in Config.__dataclass_fields__:
            problems.append(no_field(name[2:]))
        elif not equals and (not words or words[0].startswith("--")):
            problems.append(f"{name} needs a value: {name}=...")
        else:
            try:
                changes[name[2:]] = parse(name[2:], text if equals else words.pop(0))
            except UserError as error:
                problems.append(str(error))
    if len(presets) != 1:
        named = f"one preset, not {len(presets)}" if presets else "a preset"
        problems.append(f"name {named}: {where_to_begin()}")
    else:
        try:
            config = dataclasses.replace(load_preset(presets[0]), **changes)
            if changes.get("epochs", 1) != 1 and config.max_steps:
                problems.append(f"epochs={config.epochs:g} has no effect beside max_steps="
                                f"{config.max_steps}: add --max_steps=0")
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return config


def parse(name: str, text: str) -> Any:
    """The text of a command-line value as the type of its field: ("lr", "1e-3") -> 0.001."""
    allowed = types_of(Config, name)
    try:
        if types.NoneType in allowed and text == "None":
            return None
        if allowed[0] is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return parse_data(text) if name == "data" else allowed[0](text)
    except (ValueError, KeyError):  # float("fast"), {...}["perhaps"]
        wanted = {bool: "True or False", int: "a whole number", float: "a number",
                  tuple: "like builtin or name:0.7,other:0.3"}
        raise UserError(f"--{name}={text} must be {wanted[allowed[0]]}") from None


def parse_data(text: str) -> tuple:
    """"a:0.7,b:0.3" -> (("a", 0.7), ("b", 0.3)); "a" -> (("a", 1.0),); "a:1,b:1@500" changes at step 500."""
    if os.path.exists(text):  # a path may contain commas and colons
        return ((text, 1.0),)
    weighted = r"(.+?):([0-9.eE+-]+)(?:@(\d+))?(?:,|$)"
    entries = text.split(",")
    if re.fullmatch(f"(?:{weighted})+", text):  # if all have a weight, names may contain commas, too
        entries = [match[0].rstrip(",") for match in re.finditer(weighted, text)]
    matches = [(entry, re.fullmatch(weighted, entry)) for entry in entries]
    return tuple((match[1], float(match[2]), *([int(match[3])] if match[3] else [])) if match
                 else (entry, 1.0) for entry, match in matches)


def load_preset(path: Path | str) -> Config:
    """The Config that the Python file at `path` calls `config`."""
    if not Path(path).is_file():
        presets = {Path(preset).stem: preset for preset in known_presets()}
        near = difflib.get_close_matches(Path(path).stem, presets, n=1)
        hint = f"did you mean {presets[near[0]]}?" if near else where_to_begin()
        raise UserError(f"there is no preset {str(path)!r}: {hint}")
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:  # a preset is a program, so any exception is possible
        raise UserError(diagnosis(error, path)) from None
    if not isinstance(config, Config):
        raise UserError(f"{path} is not a preset: it must contain a line like config = Config(...)")
    return config


def diagnosis(error: Exception, path: Path | str) -> str:
    """Where and why a preset failed: "config/mine.py, line 3: NameError: name 'x' is not defined"."""
    presets = {os.path.realpath(preset) for preset in (path, *known_presets())}  # one may import another
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)
              if os.path.realpath(frame.filename) in presets]
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) and error.lineno:
        places, reason = [(error.filename, error.lineno)], f"{type(error).__name__}: {error.msg}"
    elif found := re.search(r"unexpected keyword argument '(\w+)'", reason):
        reason = no_field(found[1])
    return f"{places[-1][0]}, line {places[-1][1]}: {reason}" if places else f"{path}: {reason}"


FOREIGN_NAMES = {"dataset": "data", "data_path": "data", "train_data": "data", "learning_rate": "lr",
                 "batch_size": "batch", "max_iters": "max_steps", "beta": "dpo_beta",
                 "num_train_epochs": "epochs", "block_size": "seq_len", "context_length": "seq_len",
                 "dim": "d_model", "n_embd": "d_model", "num_layers": "n_layer", "num_heads": "n_head"}


def comments() -> dict[str, str]:
    """{field: its comment in the source of Config}."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))


def no_field(name: str) -> str:
    """The error for a field that does not exist, with the one that was probably meant."""
    hugging_face = {note.split("[")[1][:-1]: field for field, note in comments().items() if "[" in note}
    near = difflib.get_close_matches(name, Config.__dataclass_fields__, n=1, cutoff=0.5)
    meant = (FOREIGN_NAMES | hugging_face).get(name) or "".join(near)
    hint = f"Did you mean --{meant}?" if meant else "--help lists them all."
    return f"there is no config field {name!r}. {hint}"


def known_presets() -> list[str]:
    here = Path(__file__).parent
    where = here.name if Path.cwd() == here.parent else here.as_posix()
    files = sorted(here.glob("*.py"), key=lambda file: ("demo" not in file.stem, file.stem))  # the demo first
    return [f"{where}/{file.name}" for file in files if file.stem != "__init__"]


def where_to_begin() -> str:
    first, *others = known_presets()
    return f"begin with {first}; the others are {', '.join(others)}"


def field_help(config: Config) -> str:
    """One line per field: its name, its value in `config`, its choices, its comment in Config's source."""
    notes = {name: f"{' | '.join(map(str, choices))}: {note}" if (choices := choices_of(name)) else note
             for name, note in comments().items()}
    return "\n".join(f"  --{f.name}={getattr(config, f.name)}".ljust(34) + f"  {notes[f.name]}"
                     for f in dataclasses.fields(config))
