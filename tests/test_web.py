"""export/web.py: the folder of the page holds what the page loads, whole, and nothing older."""

import hashlib
import importlib.util
import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, TINY

import config
from config import UserError
from export import __main__ as export
from export import onnx_file, web
from model import SmolLM
from plumbing import checkpoint, disk
from tokenizer import Tokenizer

pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("each_graph_is_recorded_once")


@pytest.fixture
def chat(tok, tmp_path):
    """The folder of a chat model."""
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "demo/dpo", SmolLM(config.Config(**TINY, seq_len=64)), tok.for_chat())
    return tmp_path / "demo/dpo"


@pytest.fixture
def package(tmp_path):
    """What npm installs, of the files that count: node_modules/@huggingface/transformers."""
    package = tmp_path / "node_modules/@huggingface/transformers"
    runtime = tmp_path / "node_modules/onnxruntime-web/dist"
    (package / "dist").mkdir(parents=True)
    runtime.mkdir(parents=True)
    disk.write_json(package / "package.json", {"name": "@huggingface/transformers", "version": web.VERSION})
    for file in (package / "LICENSE", package / "dist/transformers.min.js", package / "dist/other.js",
                 runtime / "ort-wasm-simd-threaded.mjs", runtime / "ort-wasm-simd-threaded.wasm"):
        file.write_text(f"this is {file.name}")
    return package


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file()}


def settings_of(folder):
    """settings.json. The model that it names must be whole: its name is a digest of its files."""
    settings = json.loads((folder / "settings.json").read_text())
    model = folder / settings["model"]
    digests = [hashlib.sha256(content).digest() for content in files(model).values()]
    assert settings["model"] == f"model-{hashlib.sha256(b''.join(digests)).hexdigest()[:12]}"
    assert (model / "onnx" / onnx_file.FILES[settings["quant"]]).is_file()
    return settings


def test_the_folder_holds_the_page_the_model_and_the_library(chat, package, capsys):
    export.main([str(chat), "--format=web", f"--library={package}"])
    out, library = chat / "web", f"library-{web.VERSION}"
    settings, found = settings_of(out), files(out)
    model = settings["model"]
    assert set(found) == {"index.html", "settings.json", *(f"{library}/{name}" for name in (
        "LICENSE", "transformers.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")),
        *(f"{model}/{name}" for name in ("config.json", "generation_config.json", "tokenizer.json",
                                         "tokenizer_config.json", "special_tokens_map.json",
                                         "onnx/model_int8.onnx"))}
    assert {settings["library"], *(settings["runtime"] + end for end in (".mjs", ".wasm"))} <= set(found)
    assert found[f"{library}/transformers.min.js"] == b"this is transformers.min.js"
    assert found["index.html"] == web.PAGE.read_bytes()
    ours = Tokenizer.load(chat)
    assert Tokenizer.load(out / model).digest() == ours.digest() and settings["stop_ids"] == [0, 2]
    assert settings["name"] == "demo/dpo"
    printed = capsys.readouterr().out
    assert f"{sum(map(len, found.values())) / 1e6:,.2f} MB" in printed
    assert f"python -m http.server --directory {out}" in printed


def test_without_a_library_the_page_names_one_version_of_each_file(chat):
    web.write(chat, chat / "web", "int8")
    settings = settings_of(chat / "web")
    cdn = "https://cdn.jsdelivr.net/npm"
    assert settings["library"] == f"{cdn}/@huggingface/transformers@{web.VERSION}/dist/transformers.min.js"
    assert settings["runtime"] == f"{cdn}/onnxruntime-web@{web.RUNTIME_VERSION}/dist/ort-wasm-simd-threaded"
    written = {path.name for path in (chat / "web").iterdir()}
    assert written == {"index.html", "settings.json", settings["model"]}


def test_the_page_is_short_and_reads_all_settings_and_no_other(chat):
    text = web.PAGE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    web.write(chat, chat / "web", "int8")
    settings = settings_of(chat / "web")
    assert set(re.findall(r"settings\.(\w+)", text)) - {"json"} == set(settings)
    for name in settings["sampling"]:
        assert name in text
    ids = set(re.findall(r'\bid="(\w+)"', text))
    assert set(re.findall(r'\$\("(\w+)"\)', text)) == ids  # each element is used, and each used one is there
    assert "http" not in text.replace("http.server", "")  # nothing is loaded past settings.json
    assert "innerHTML" not in text


def test_the_page_samples_as_sample_py_does(chat):
    """Its defaults, or what generation_config.json says."""
    web.write(chat, chat / "web", "int8")
    plain = settings_of(chat / "web")["sampling"]
    assert plain == {"max_new_tokens": 100, "temperature": 0.6, "top_k": 0, "top_p": 0.92}
    said = disk.read_json(chat / "generation_config.json") | {"temperature": 0.2, "top_k": 7}
    disk.write_json(chat / "generation_config.json", said)
    web.write(chat, chat / "web", "int8")
    assert settings_of(chat / "web")["sampling"] == plain | {"temperature": 0.2, "top_k": 7}


def test_the_chat_template_is_where_transformers_js_looks_for_it(chat):
    """transformers 5 stores it in a file of its own, which transformers.js does not read."""
    theirs = disk.read_json(chat / "tokenizer_config.json")
    template = theirs.pop("chat_template")
    disk.write_json(chat / "tokenizer_config.json", theirs)
    (chat / "chat_template.jinja").write_text(template, encoding="utf-8")
    web.write(chat, chat / "web", "int8")
    model = chat / "web" / settings_of(chat / "web")["model"]
    assert disk.read_json(model / "tokenizer_config.json")["chat_template"] == template


def test_the_same_export_again_changes_nothing(chat, package):
    before = files(web.write(chat, chat / "web", "int8", package).parent)
    assert files(web.write(chat, chat / "web", "int8", package).parent) == before


def test_a_new_export_leaves_nothing_of_the_old_one_and_touches_nothing_else(chat, package):
    out = chat / "web"
    web.write(chat, out, "int8", package)
    mine = ["model-mine/notes.txt", "library-of-mine/x", "notes.txt"]
    for name in mine:
        disk.write_text(out / name, "mine")
    web.write(chat, out, "q4")
    model = settings_of(out)["model"]
    expected = {"index.html", "settings.json", model, *(name.split("/")[0] for name in mine)}
    assert {path.name for path in out.iterdir()} == expected
    assert [path.name for path in (out / model / "onnx").iterdir()] == ["model_q4.onnx"]


def test_an_export_that_breaks_off_at_any_write_leaves_the_old_page_or_the_new(chat, package, monkeypatch):
    out, replace_file = chat / "web", disk.replace
    web.write(chat, out, "int8", package)
    old, seen, at = settings_of(out)["model"], set(), 0
    while True:
        left = at

        def break_off(temporary, path):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            replace_file(temporary, path)

        monkeypatch.setattr(disk, "replace", break_off)
        try:
            web.write(chat, out, "q4", package)
            break
        except KeyboardInterrupt:
            settings = settings_of(out)
            seen.add((settings["model"] == old, settings["quant"]))
            assert (out / settings["library"]).is_file() and (out / f"{settings['runtime']}.wasm").is_file()
            at += 1
        finally:
            monkeypatch.setattr(disk, "replace", replace_file)
    assert seen == {(True, "int8"), (False, "q4")} and at > 15
    assert not [path for path in out.rglob("*.tmp")]


@pytest.mark.parametrize("name, content, message", [
    ("package.json", None, "is not @huggingface/transformers"),
    ("package.json", '{"name": "left-pad", "version": "1.0.0"}', "is not @huggingface/transformers"),
    ("package.json", '{"name": "@huggingface/transformers"}', "is not @huggingface/transformers"),
    ("package.json", "{", "package.json cannot be read as JSON"),
    ("dist/transformers.min.js", None, "has no .*transformers.min.js"),
    ("../../onnxruntime-web/dist/ort-wasm-simd-threaded.wasm", None, "has no .*wasm-simd-threaded.wasm")])
def test_a_library_that_is_none_is_reported_before_anything_is_written(chat, package, name, content, message):
    (package / name).unlink()
    if content:
        (package / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        export.main([str(chat), "--format=web", f"--library={package}"])
    assert "JSON" in message or f"npm install @huggingface/transformers@{web.VERSION}" in str(error.value)
    assert not (chat / "web").exists()


def test_the_runtime_is_found_where_node_finds_it_and_another_version_is_noted(chat, package, capsys):
    """npm puts it inside the package if another version is beside it."""
    inside = package / "node_modules/onnxruntime-web/dist"
    shutil.copytree(package.parents[1] / "onnxruntime-web/dist", inside)
    (inside / "ort-wasm-simd-threaded.wasm").write_text("the one inside")
    disk.write_json(package / "package.json", {"name": "@huggingface/transformers", "version": "4.9.1"})
    web.write(chat, chat / "web", "int8", package)
    assert f"tested with @huggingface/transformers {web.VERSION}, not 4.9.1" in capsys.readouterr().out
    assert files(chat / "web")["library-4.9.1/ort-wasm-simd-threaded.wasm"] == b"the one inside"


def test_mistakes_are_one_sentence(chat, tok, tmp_path, monkeypatch):
    (chat / "x").write_text("")
    for flags, message in ((["--format=onnx", "--library=x"], "--library=x has no meaning"),
                           (["--format=web", "--quant=q8_0"], "--quant=q8_0 is unknown for web"),
                           (["--format=web", f"--out={chat}/config.json"], "looks like a file of a"),
                           (["--format=web", f"--out={chat}/x"], "x is a file: name a folder, like .*web$")):
        with pytest.raises(UserError, match=message):
            export.main([str(chat), *flags])
    checkpoint.save(tmp_path / "base", SmolLM(config.Config(**TINY, seq_len=64)), tok)
    with pytest.raises(UserError, match="is a base model, which only continues text"):
        web.write(tmp_path / "base", tmp_path / "out", "int8")
    disk.write_text(chat / "chat_template.jinja", "[INST] {{ messages[0].content }}")
    with pytest.raises(UserError, match="template of this checkpoint is neither SmolLM's nor SmolLM2's"):
        web.write(chat, tmp_path / "out", "int8")
    (chat / "chat_template.jinja").unlink()
    disk.write_text(tmp_path / "out/index.html", "my home page")
    with pytest.raises(UserError, match="index.html is another page"):
        web.write(chat, tmp_path / "out", "int8")
    assert files(tmp_path / "out") == {"index.html": b"my home page"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--format=.*pip install onnxscript"):
        web.write(chat, chat / "web", "int8")
    assert not (chat / "web").exists()


def test_the_docs_and_the_script_in_tests_long_name_the_version_that_is_pinned():
    for name in ("docs/released.md", "tests/long/web.py"):
        assert f"@huggingface/transformers@{web.VERSION}" in (ROOT / name).read_text(encoding="utf-8"), name
