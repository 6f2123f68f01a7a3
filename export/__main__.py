"""
python -m export: take a model elsewhere, and see how much memory it needs.

A checkpoint is a Hugging Face folder, which transformers and vLLM open as it is. Other engines need files of
their own:

    python -m export out/demo/dpo --format=gguf --quant=q8_0     llama.cpp       out/demo/dpo/model-q8_0.gguf
    python -m export out/demo/dpo --format=onnx --quant=int8     ONNX Runtime    out/demo/dpo/onnx/...
    python -m export out/demo/dpo --format=web                   a browser       out/demo/dpo/web/index.html

Training needs float32 weights, because one step changes them only slightly. Generating does not: every weight
is read once per token, so half or a quarter of the bytes also takes less time. Fewer bits cost some accuracy.
For 8 bits on a CPU use llama.cpp with q8_0, the first command.
Beside a GGUF file comes a Modelfile, with which Ollama runs it: ollama create NAME -f out/demo/dpo/Modelfile

    python -m export out/demo/dpo --format=hf --out=FOLDER       a folder to share, in 16 bits
    python -m export --memory config/smol_135m.py                how much memory weights, cache, training need
"""

import argparse
from pathlib import Path

import plumbing  # noqa: F401  # isort: skip  # before torch: it sets how threads wait

import config
from config import Config, UserError
from export import folder as hf_folder
from export import gguf_file, onnx_file, web
from plumbing import checkpoint
from plumbing.processes import command

QUANTS = {"gguf": gguf_file.QUANTS, "onnx": tuple(onnx_file.FILES), "web": web.QUANTS,
          "hf": tuple(hf_folder.QUANTS)}  # the first is the default

# ---------------------------------------------------------------------------------------------------------
# memory


def n_linear(cfg: Config) -> int:
    """Weights of the linear layers in the blocks: 106,168,320 of SmolLM-135M's 134,515,008."""
    attention = 2 * cfg.d_model**2 + 2 * cfg.d_model * cfg.n_kv_head * cfg.head_dim
    return cfg.n_layer * (attention + 3 * cfg.d_model * cfg.d_ff)


def weight_bytes(cfg: Config) -> dict[str, int]:
    """{format: bytes} of a model that transformers has loaded; 8 and 4 bits through bitsandbytes.

    Only linear layers get 8 or 4 bits. The norms and the embedding, which is also the output head, keep 16:
    a fifth of SmolLM-135M's weights, but half of its bytes in 4 bits. Each block adds D / 2 rotary speeds in
    float32: transformers counted them when SmolLM's figures were published, and without them the last digit
    of its 162.87 MB would differ.
    """
    linear, rotary = n_linear(cfg), cfg.n_layer * cfg.head_dim // 2 * 4
    others = cfg.n_params - linear
    return {"fp32": 4 * cfg.n_params + rotary, "bf16": 2 * cfg.n_params + rotary,
            "int8": linear + 2 * others + rotary, "int4": linear // 2 + 2 * others + rotary}


def cache_bytes(cfg: Config, n_tokens: int) -> int:
    """Keys and values of n_tokens positions in bfloat16. Only n_kv_head heads have any: GQA's saving."""
    return n_tokens * 2 * cfg.n_layer * cfg.n_kv_head * cfg.head_dim * 2


def training_bytes(cfg: Config) -> dict[str, int]:
    """{what: bytes} that training holds in float32 from the first step to the last. What it needs besides
    depends on micro_batch: bench/plan.py.

    AdamW keeps two averages per weight. Muon keeps one, for the matrices inside the blocks.
    """
    averages = 2 * cfg.n_params - (n_linear(cfg) if cfg.optimizer == "muon" else 0)
    return {"weights": 4 * cfg.n_params, "gradients": 4 * cfg.n_params, cfg.optimizer: 4 * averages}


def must_be_llama(cfg: Config, flag: str) -> None:
    """Raise UserError for a model that has more than a Llama."""
    if own := checkpoint.own_fields(cfg):
        raise UserError(f"{flag} counts the weights of a Llama, and no Llama has {', '.join(own)}")


def show_memory(cfg: Config) -> None:
    """Print the table, in MB of a million bytes."""
    must_be_llama(cfg, "--memory")
    cache = {"per token": cache_bytes(cfg, 1), f"{cfg.seq_len:,} tokens": cache_bytes(cfg, cfg.seq_len)}
    training = training_bytes(cfg)
    training["total"] = sum(training.values())
    print(f"{cfg.n_params:,} parameters, {n_linear(cfg):,} of them in linear layers; MB (a million bytes)")
    for title, rows in (("weights", weight_bytes(cfg)), ("key/value cache, bf16", cache),
                        ("training, fp32, before activations: python -m bench plan", training)):
        print(f"\n{title}")
        for name, size in rows.items():
            print(f"    {name:<16}" + (f"{size / 1e6:>10,.2f}" if size > 1e6 else f"{size:>10,} bytes"))
    print("\n8 bits on a CPU: python -m export CHECKPOINT --format=gguf --quant=q8_0, and llama.cpp")


# ---------------------------------------------------------------------------------------------------------
# the command line


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for a quantization that the format does not have."""
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a step folder, a stage folder (its newest step), or a hub name")
    parser.add_argument("--format", choices=QUANTS, required=True)
    parser.add_argument("--quant", help="; ".join(f"{name}: {', '.join(quants)} (default {quants[0]})"
                                                  for name, quants in QUANTS.items()))
    parser.add_argument("--out", help="the file (gguf) or folder (onnx, web, hf) to write; by default in the "
                                      "checkpoint's folder, or in out/NAME for a model of the hub")
    parser.add_argument("--library", help=f"web: the folder of an installed npm package {web.PACKAGE}, to "
                                          "copy it; without it the page needs the network")
    parser.add_argument("--memory", action="store_true",
                        help="print how much memory a preset needs; its fields are flags: --seq_len=8192")
    args = parser.parse_args(argv)
    quants = QUANTS[args.format]
    args.quant = args.quant or quants[0]
    if args.quant not in quants:
        raise UserError(f"--quant={args.quant} is unknown for {args.format}: choose {', '.join(quants[:-1])} "
                        f"or {quants[-1]}")
    if args.library and args.format != "web":
        raise UserError(f"--library={args.library} has no meaning with --format={args.format}: leave it out")
    given = Path(args.checkpoint)
    home = given if given.is_dir() else Path("out") / given.name
    names = {"gguf": f"model-{args.quant}.gguf", "onnx": "onnx", "web": "web",
             "hf": args.quant}
    args.out = Path(args.out) if args.out else home / names[args.format]
    if args.out.suffix in (".safetensors", ".json"):
        raise UserError(f"--out={args.out} looks like a file of a checkpoint: choose another name")
    if args.format in ("onnx", "web") and args.out.is_file():
        raise UserError(f"--out={args.out} is a file: name a folder, like {home / names[args.format]}")
    if args.format == "hf" and args.out.exists():
        raise UserError(f"--out={args.out} exists already: name a new folder")
    if args.format == "gguf" and args.out.is_dir():
        raise UserError(f"--out={args.out} is a folder: name a file, like {args.out / names['gguf']}")
    return args


def main(argv: list[str]) -> None:
    if "--memory" in argv and not {"--help", "-h"} & set(argv):
        show_memory(config.load([word for word in argv if word != "--memory"]))
        return
    args = parse_args(argv)
    folder = checkpoint.find(args.checkpoint)
    if args.format == "gguf":
        gguf_file.write(folder, args.out, args.quant)
        file = args.out
        print(f"for Ollama: ollama create NAME -f {file.with_name('Modelfile')}")
    elif args.format == "onnx":
        file = onnx_file.write(folder, args.out, args.quant)
    elif args.format == "web":
        file = web.write(args.checkpoint, args.out, args.quant, args.library)
        size = sum(path.stat().st_size for path in file.parent.rglob("*") if path.is_file())
        print(f"{file.parent}: {size / 1e6:,.2f} MB\npython -m http.server --directory {file.parent}"
              "    and open http://localhost:8000")
        return
    else:
        file = hf_folder.write(folder, args.out, args.quant) / "model"
    for part in sorted(file.parent.glob(f"{file.name}*")):  # a large graph has its weights in a second file
        print(f"{part}: {part.stat().st_size / 1e6:,.2f} MB")


if __name__ == "__main__":
    command(main, own_help=True)
