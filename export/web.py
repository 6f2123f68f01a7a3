"""
export/web.py: a folder with one page, in which the browser itself runs the model.

    python -m export out/demo/dpo --format=web                  writes out/demo/dpo/web/
    python -m http.server --directory out/demo/dpo/web          then open http://localhost:8000

    model-1a2b3c4d5e6f/   the graph (onnx_file.py), config.json and the tokenizer
    library-4.3.2/        transformers.js and ONNX Runtime; without --library they come from a CDN
    settings.json         which model and library to load, how to sample, what ends an answer
    index.html            a copy of page.html

The name of the model's folder is a digest of its files. So a browser cannot mix the files of two models from
its cache, and an interrupted export changes nothing: the page loads the old model until settings.json is
replaced.
"""

import hashlib
import re
import shutil
from pathlib import Path

import sample
from config import UserError
from export import onnx_file
from plumbing import checkpoint, disk
from tokenizer import Tokenizer

PAGE = Path(__file__).with_name("page.html")
QUANTS = ("int8", "q4", "fp16", "fp32")  # int8 costs 0.3% of perplexity, q4 10% (docs/released.md)
PACKAGE, VERSION = "@huggingface/transformers", "4.3.2"  # the page was tested with this version,
RUNTIME, RUNTIME_VERSION = "onnxruntime-web", "1.31.0-dev.20260914-8d85527a0"  # which needs this one
CDN = "https://cdn.jsdelivr.net/npm"
SCRIPT = "transformers.min.js"
WASM = "ort-wasm-simd-threaded"  # .mjs and .wasm; for the CPU only, half as large as those for GPUs, too
OURS = re.compile(r"model-[0-9a-f]{12}|library-\d+\.\d+\.\d+")  # folders of an earlier export


def find_library(package: Path) -> tuple[str, list[Path]]:
    """(version, files) of an installed npm package. Raises UserError if it is another one, or incomplete."""
    about = package / "package.json"
    found = disk.read_json(about) if about.is_file() else {}
    places = [folder / "node_modules" / RUNTIME / "dist" for folder in (package, *package.resolve().parents)]
    runtime = next((place for place in places if place.is_dir()), places[-1])  # as Node looks for it
    files = [package / "LICENSE", package / "dist" / SCRIPT,
             runtime / f"{WASM}.mjs", runtime / f"{WASM}.wasm"]
    missing = [file for file in files if not file.is_file()]
    version = str(found.get("version"))
    if found.get("name") != PACKAGE or not OURS.fullmatch(f"library-{version}") or missing:
        reason = f"has no {missing[0]}" if found.get("name") == PACKAGE and missing else f"is not {PACKAGE}"
        raise UserError(f"--library={package} {reason}: npm install {PACKAGE}@{VERSION}, and name the folder "
                        f"node_modules/{PACKAGE}")
    if version != VERSION:
        print(f"(the page was tested with {PACKAGE} {VERSION}, not {version})")
    return version, files


def copy(source: Path, path: Path) -> None:
    """Copy a file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    with disk.writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, temporary)
        disk.replace(temporary, path)


def write_model(folder: Path, tok: Tokenizer, out: Path, quant: str) -> str:
    """Write the model's folder, whole or not at all. Returns its name."""
    new = out / "model.tmp"
    shutil.rmtree(new, ignore_errors=True)
    try:
        onnx_file.write(folder, new, quant)
        tok.save(new)  # with the chat template in tokenizer_config.json: transformers.js reads no other file
        files = sorted(path for path in new.rglob("*") if path.is_file())
        digest = hashlib.sha256()
        for file in files:
            with open(file, "rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        name = f"model-{digest.hexdigest()[:12]}"
        for file in files:
            copy(file, out / name / file.relative_to(new))
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return name


def write(name: Path | str, out: Path | str, quant: str, library: Path | str | None = None) -> Path:
    """Write a chat model and the page that talks to it. Returns the path of the page.

    Raises UserError for a base model, an unknown chat template, a wrong library, or another page in
    the folder.
    """
    folder, out = checkpoint.find(name), Path(out)
    page, settings = out / "index.html", out / "settings.json"
    tok = Tokenizer.load(folder)
    if not tok.is_chat:
        raise UserError(f"{folder} is a base model, which only continues text: make a chat model of it with "
                        "sft.py")
    tok.chat([])  # refuses a template other than SmolLM's and SmolLM2's, whose special tokens the page knows
    if page.exists() and not settings.exists():
        raise UserError(f"{page} is another page, and --format=web would replace it: choose another --out")
    script, runtime = f"{CDN}/{PACKAGE}@{VERSION}/dist", f"{CDN}/{RUNTIME}@{RUNTIME_VERSION}/dist"
    if library:
        version, files = find_library(Path(library))
        script = runtime = f"library-{version}"
    sampling = sample.settings_of(sample.parse_args([str(folder), "--chat"]), folder)
    model = write_model(folder, tok, out, quant)
    for file in files if library else []:
        copy(file, out / script / file.name)
    disk.write_json(settings, {
        "name": "/".join(Path(name).resolve().parts[-2:]), "model": model, "quant": quant,
        "library": f"{script}/{SCRIPT}", "runtime": f"{runtime}/{WASM}", "stop_ids": sorted(tok.stop_ids),
        "sampling": {key: sampling[key] for key in sample.DEFAULTS}})
    copy(PAGE, page)
    for old in out.iterdir():
        if OURS.fullmatch(old.name) and old.name not in (model, script):
            shutil.rmtree(old, ignore_errors=True)
    return page
