"""
export.py: take a model elsewhere, and what it weighs.

A checkpoint is a Hugging Face folder, which transformers and vLLM open as it is. Two engines want files of
their own:

    python export.py out/demo/dpo --format=gguf --quant=q8_0     llama.cpp       out/demo/dpo/model-q8_0.gguf
    python export.py out/demo/dpo --format=onnx --quant=int8     ONNX Runtime    out/demo/dpo/onnx/...

Training needs weights in float32, since a step moves them by tiny amounts. Running a model does not: to write
one token every weight is read once, so half or a quarter of the bytes is also less time. Fewer bits cost a
little accuracy, and save only where they are used:

    python export.py --memory config/smol_135m.py                what weights, cache and training take
"""

import argparse
from pathlib import Path

from plumbing import checkpoint
import config
from export import gguf_file
from config import Config, UserError

QUANTS = {"gguf": gguf_file.QUANTS, "onnx": ("fp32", "fp16", "int8", "q4")}  # the first is the default

# ---------------------------------------------------------------------------------------------------------
# memory


def n_linear(cfg: Config) -> int:
    """Weights of the linear layers in the blocks: 106,168,320 of SmolLM-135M's 134,515,008."""
    attention = 2 * cfg.d_model**2 + 2 * cfg.d_model * cfg.n_kv_head * cfg.head_dim
    return cfg.n_layer * (attention + 3 * cfg.d_model * cfg.d_ff)


def weight_bytes(cfg: Config) -> dict[str, int]:
    """{format: bytes} of a model that transformers has loaded, 8 and 4 bits through bitsandbytes.

    Only the linear layers get 8 or 4 bits. The embedding, which is the output head as well, and the norms
    keep 16: a fifth of SmolLM-135M's weights, and half of its bytes in 4 bits. Every block has D / 2 float32
    of rotary speeds: transformers counted them when SmolLM's figures were published, and the last digit of
    its 162.87 MB is theirs.
    """
    linear, rotary = n_linear(cfg), cfg.n_layer * cfg.head_dim // 2 * 4
    others = cfg.n_params - linear
    return {"fp32": 4 * cfg.n_params + rotary, "bf16": 2 * cfg.n_params + rotary,
            "int8": linear + 2 * others + rotary, "int4": linear // 2 + 2 * others + rotary}


def cache_bytes(cfg: Config, n_tokens: int) -> int:
    """Keys and values of n_tokens positions in bfloat16. Only n_kv_head heads are kept: why GQA pays."""
    return n_tokens * 2 * cfg.n_layer * cfg.n_kv_head * cfg.head_dim * 2


def training_bytes(cfg: Config) -> dict[str, int]:
    """{what: bytes} that training holds in float32 from the first step to the last; activations come on top.

    AdamW keeps two averages for every weight, Muon one for a matrix inside the blocks.
    """
    averages = 2 * cfg.n_params - (n_linear(cfg) if cfg.optimizer == "muon" else 0)
    return {"weights": 4 * cfg.n_params, "gradients": 4 * cfg.n_params, cfg.optimizer: 4 * averages}


def show_memory(cfg: Config) -> None:
    """Print the table, in MB of a million bytes."""
    cache = {"a token": cache_bytes(cfg, 1), f"{cfg.seq_len:,} tokens": cache_bytes(cfg, cfg.seq_len)}
    training = training_bytes(cfg)
    training["together"] = sum(training.values())
    print(f"{cfg.n_params:,} parameters, {n_linear(cfg):,} of them in linear layers; MB (a million bytes)")
    for title, rows in (("weights", weight_bytes(cfg)), ("key/value cache, bf16", cache),
                        ("training, fp32", training)):
        print(f"\n{title}")
        for name, size in rows.items():
            print(f"    {name:<16}" + (f"{size / 1e6:>10,.2f}" if size > 1e6 else f"{size:>10,} bytes"))


# ---------------------------------------------------------------------------------------------------------
# the command line


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for a quantisation that the format does not have."""
    parser = argparse.ArgumentParser(prog="export.py", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a step folder, a stage folder (its newest step), or a hub name")
    parser.add_argument("--format", choices=QUANTS, required=True)
    parser.add_argument("--quant", help="; ".join(f"{name}: {', '.join(quants)} (default {quants[0]})"
                                                  for name, quants in QUANTS.items()))
    parser.add_argument("--out", help="the file (gguf) or folder (onnx) to write; without it, in the folder "
                                      "of the checkpoint, or for a model of the hub in out/NAME")
    parser.add_argument("--memory", action="store_true",
                        help="print what a preset needs instead; its fields are flags, like --seq_len=8192")
    args = parser.parse_args(argv)
    args.quant = args.quant or QUANTS[args.format][0]
    if args.quant not in QUANTS[args.format]:
        raise UserError(f"--quant={args.quant} is not a quantisation of {args.format}: there are "
                        f"{', '.join(QUANTS[args.format])}")
    given = Path(args.checkpoint)
    home = given if given.is_dir() else Path("out") / given.name
    names = {"gguf": f"model-{args.quant}.gguf", "onnx": "onnx"}
    args.out = Path(args.out) if args.out else home / names[args.format]
    if args.out.suffix in (".safetensors", ".json"):
        raise UserError(f"--out={args.out} would be taken for a file of a checkpoint: choose another name")
    if args.format == "onnx" and args.out.is_file():
        raise UserError(f"--out={args.out} is a file: name a folder, like {home / names['onnx']}")
    if args.format == "gguf" and args.out.is_dir():
        raise UserError(f"--out={args.out} is a folder: name a file, like {args.out / names['gguf']}")
    return args


def main(argv: list[str]) -> None:
    if "--memory" in argv and "--help" not in argv:
        return show_memory(config.load([word for word in argv if word != "--memory"]))
    args = parse(argv)
    folder = checkpoint.find(args.checkpoint)
    try:
        if args.format == "gguf":
            gguf_file.write(folder, args.out, args.quant)
            file = args.out
        else:
            from export import onnx_model  # its packages are wanted for this format only
            file = onnx_model.write(folder, args.out, args.quant)
    except OSError as error:
        raise UserError(f"{args.out} cannot be written: {error}") from None
    for part in sorted(file.parent.glob(f"{file.name}*")):  # a large graph has its weights in a second file
        print(f"{part}: {part.stat().st_size / 1e6:,.2f} MB")


if __name__ == "__main__":
    config.command(main, own_help=True)
