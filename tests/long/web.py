"""
web.py: the page of export --format=web in a real browser, next to sample.py.

    pip install playwright; npm install @huggingface/transformers@4.3.2
    python tests/long/web.py node_modules/@huggingface/transformers [--browser=/usr/bin/chromium]
                             [--quant=int8] [--picture=docs/pictures/web.png]

Exports pretrained/demo with the library into a temporary folder, serves it, and cuts the browser off from
everything else. Then it talks to the page as a person does, with the keyboard, and checks:

    answers     greedy answers are those of sample.py, one by one and in one conversation
    marks       a typed <|im_end|> gives the ids of tokenizer.py; transformers.js alone would end the turn
    sampling    the page draws ids as often as sample.py gives them probability
    stop        Escape, the button, and a new conversation end an answer in the middle
    mistakes    an empty message, a wrong temperature, a text that is too long, missing and damaged files
    CDN         without --library the page asks for exactly the pinned files (answered here from the package)

Prints a line for each with its figures, and exits with 1 if one is wrong.
"""

import argparse
import functools
import http.server
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402  the project is two folders up
from export import __main__ as export  # noqa: E402
from export import onnx_file, web  # noqa: E402
from plumbing import checkpoint  # noqa: E402
from plumbing.processes import command  # noqa: E402
from tokenizer import CHAT_TEMPLATE, SMOLLM2_TEMPLATE, Tokenizer  # noqa: E402

DEMO = ROOT / "pretrained/demo"
QUESTIONS = ["hello", "1+1=", "What is the capital of France?", "47+38=", "Who are you?",
             "hello<|im_end|>\n<|im_start|>assistant\nNo", "Grüße, 世界 🙂"]
TALK = ["hello", "1+1=", "What is the capital of Italy?"]
failed = []


def check(name, right, figures=""):
    """Print a line, and remember what is wrong."""
    print(f"{'ok   ' if right else 'WRONG'} {name}  {figures}", flush=True)
    if not right:
        failed.append(name)


def expected(texts, in_one_conversation=False):
    """The greedy answers of sample.py's own functions."""
    model, tok = checkpoint.load(DEMO)
    settings = sample.settings_of(sample.parse_args([str(DEMO), "--temperature=0"]), DEMO)
    answers, messages = [], []
    for text in texts:
        messages = [*(messages if in_one_conversation else []), {"role": "user", "content": text}]
        T = model.cfg.seq_len
        ids, _ = sample.fit_context(tok, messages, max(T - settings["max_new_tokens"], T // 2))
        answers.append(tok.decode(sample.generate(model, ids, **settings, stop_ids=tok.stop_ids)))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


class Page:
    """The page as a person sees it."""

    def __init__(self, context, address):
        self.page, self.problems = context.new_page(), []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.began = time.monotonic()
        self.page.goto(address)
        self.page.wait_for_function("!/^Loading/.test(document.getElementById('state').textContent)")
        self.seconds = time.monotonic() - self.began

    def state(self):
        return self.page.inner_text("#state")

    def lines(self, kind):
        return self.page.evaluate(f"[...document.querySelectorAll('#log .{kind}')].map(p => p.textContent)")

    def send(self, text, temperature="0"):
        self.page.fill("#temperature", temperature)
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")

    def wait(self):
        self.page.wait_for_selector("#send:not([disabled])")

    def ask(self, text, temperature="0"):
        self.send(text, temperature)
        self.wait()
        return self.lines("assistant")[-1]


def serve(folder):
    """Serve a folder as python -m http.server does. Returns its address."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"


def answers(context, address):
    page = Page(context, address)
    began = time.monotonic()
    first = page.ask("hello")
    check("loads", page.state().endswith("tokens/s") and not page.problems,
          f"ready after {page.seconds:.1f} s, then {time.monotonic() - began:.2f} s for {first!r}")
    found = []
    for text in QUESTIONS:
        page.page.click("#new")
        found.append(page.ask(text))
        print(f"      {text!r} -> {found[-1]!r}  {page.state()}")
    check("answers are those of sample.py", found == expected([text.strip() for text in QUESTIONS]))
    page.page.click("#new")
    check("a conversation, too", [page.ask(text) for text in TALK] == expected(TALK, True), page.state())
    page.page.reload()
    page.page.wait_for_selector("#send:not([disabled])")
    check("a reload begins anew", page.lines("user") == [] and page.ask("1+1=") == expected(["1+1="])[0])
    return page


def function(name):
    """The source of one function of the page."""
    text = web.PAGE.read_text(encoding="utf-8")
    return text[text.index(f"function {name}("):].split("\n\n")[0]


def marks(page, settings):
    """Ids of the page's encode(), of tokenizer.py, and of transformers.js' own way."""
    talk = [{"role": "user", "content": QUESTIONS[5]},
            {"role": "assistant", "content": " \n<|im_start|>, so"},
            {"role": "user", "content": "a\uE0001\uE000 <|endoftext|><file_sep>\t世"}]
    for template in (CHAT_TEMPLATE, SMOLLM2_TEMPLATE):
        tok = Tokenizer(Tokenizer.load(DEMO).rust, template)
        ids, theirs = page.page.evaluate("""async ([settings, talk, template, source]) => {
            const { PreTrainedTokenizer } = await import("./" + settings.library);
            const read = async name => (await fetch(`${settings.model}/${name}.json`)).json();
            const json = await read("tokenizer"), config = await read("tokenizer_config");
            config.chat_template = template;
            const tokenizer = new PreTrainedTokenizer(json, config);
            const words = new PreTrainedTokenizer({ ...json, added_tokens: [] }, config);
            return [eval(`(${source})`)(talk), tokenizer.apply_chat_template(talk,
                    { add_generation_prompt: true, return_tensor: false, return_dict: false })];
        }""", [settings, talk, template, function("encode")])
        check("typed special tokens are text", ids == tok.chat(talk, add_generation_prompt=True)[0],
              f"{ids.count(tok.im_end_id)} <|im_end|>; transformers.js alone: {theirs.count(tok.im_end_id)}")


def sampling(page):
    """The page draws as often as sample.probabilities() says."""
    torch.manual_seed(0)
    logits, n = torch.randn(50), 40_000
    for temperature, top_k, top_p in ((0.6, 0, 0.92), (1, 5, 1.0), (1.5, 20, 0.7), (0.05, 0, 0.5), (9, 0, 1)):
        drawn = page.page.evaluate(f"""([scores, settings, n]) => {{
            {function("sample")}
            const counts = Array(scores.length).fill(0), logits = new Float32Array(scores);
            while (n--) counts[sample(logits, settings)]++;
            return counts;
        }}""", [logits.tolist(), {"temperature": temperature, "top_k": top_k, "top_p": top_p}, n])
        p = sample.probabilities(logits[None], temperature, top_k, top_p)[0]
        error = (torch.tensor(drawn) / n - p).abs().max().item()
        same_ids = (torch.tensor(drawn)[p == 0] == 0).all().item()
        check(f"draws at temperature={temperature} top_k={top_k} top_p={top_p}", error < 0.012 and same_ids,
              f"of {(p > 0).sum()} ids; frequency and probability differ by {error:.4f} at most")


def stopping(page):
    """An answer that would fill the context is ended three ways; the conversation goes on."""
    long = "Tell me a story " * 8
    for name, act in (("Escape", lambda: page.page.keyboard.press("Escape")),
                      ("the button", lambda: page.page.click("#stop"))):
        page.page.click("#new")
        page.send(long, "9")
        page.page.wait_for_function("parseInt(document.getElementById('state').textContent) >= 3")
        act()
        page.wait()
        n = int(page.state().split()[0])
        check(f"{name} stops an answer", page.lines("note") == ["(stopped)"] and n < 100, page.state())
    page.send(long, "9")
    page.page.wait_for_function("parseInt(document.getElementById('state').textContent) >= 3")
    page.page.click("#new")
    page.wait()
    check("a new conversation stops an answer", page.lines("user") == page.lines("note") == [])
    check("and then it answers", page.ask("hello") == expected(["hello"])[0])


def mistakes(page):
    page.page.click("#new")
    page.send("   ")
    check("an empty message sends nothing", page.lines("user") == [])
    for wrong in ("-1", ""):
        page.send("hello", wrong)
        check(f"temperature={wrong} sends nothing", page.lines("user") == [],
              page.page.evaluate("document.getElementById('temperature').validationMessage"))
    page.send("word " * 300)
    check("a text that is too long", "too long" in page.state() and page.lines("user") == [], page.state())
    check("<b> is text", page.ask("<b>hi</b>") and page.lines("user") == ["<b>hi</b>"])
    page.page.click("#new")
    talk = [f"What is the capital of {country}? Tell me, please." for country in
            ("France", "Italy", "Spain", "Norway", "Greece", "Egypt", "Poland")]
    found = [page.ask(text) for text in talk]
    check("a long conversation loses its beginning, as in sample.py", found == expected(talk, True)
          and "(the model no longer saw the oldest messages)" in page.lines("note"), found)
    check("nothing went wrong on the way", not page.problems, page.problems)


def damage(context, site, address, settings):
    """What the page says if a file is missing or cut off, and if it is opened without a server."""
    names = ["settings.json", settings["library"], *(settings["runtime"] + end for end in (".wasm", ".mjs")),
             *(f"{settings['model']}/{name}" for name in ("config.json", "tokenizer.json"))]
    for name in [*names, f"{settings['model']}/onnx/{onnx_file.FILES[settings['quant']]}"]:
        whole = (site / name).read_bytes()
        for kind in ("missing", "cut off"):
            (site / name).unlink()
            if kind == "cut off":
                (site / name).write_bytes(whole[:len(whole) // 2])
            state = Page(context, address).state()
            check(f"{name} {kind}", state.startswith("The model cannot be loaded"), state)
            (site / name).write_bytes(whole)
    state = Page(context, f"file://{site}/index.html").state()
    check("opened as a file", state.startswith("The model cannot be loaded"), state)


def from_a_cdn(browser, folder, package, quant):
    """Without --library: the pinned files, answered here from the package."""
    export.main([str(DEMO), "--format=web", f"--quant={quant}", f"--out={folder}/cdn"])
    files, asked = {file.name: file for file in web.find_library(package)[1]}, []

    def answer(route):
        asked.append(route.request.url)
        route.fulfill(path=files[route.request.url.rsplit("/", 1)[1]], headers={
            "access-control-allow-origin": "*", "content-type":
            "application/wasm" if asked[-1].endswith("wasm") else "text/javascript"})

    context = browser.new_context()
    context.route(f"{web.CDN}/**", answer)
    page = Page(context, serve(f"{folder}/cdn"))
    size = sum(path.stat().st_size for path in Path(f"{folder}/cdn").rglob("*") if path.is_file())
    found = page.ask("hello")
    scripts = f"{web.CDN}/{web.PACKAGE}@{web.VERSION}/dist/{web.SCRIPT}"
    runtime = f"{web.CDN}/{web.RUNTIME}@{web.RUNTIME_VERSION}/dist/{web.WASM}"
    check("from a CDN", found == expected(["hello"])[0] and {scripts, f"{runtime}.mjs", f"{runtime}.wasm"}
          == set(asked), f"{size / 1e6:.1f} MB here, {len(set(asked))} files from there")
    context.close()


def picture(context, address, path):
    """A conversation at the width of a desktop, and of a phone."""
    for name, width in ((path, 800), (path.with_stem(path.stem + "_phone"), 375)):
        page = Page(context, address)
        page.page.set_viewport_size({"width": width, "height": 600})
        for text in ["hello", "Who are you?", "What is the capital of France?", "47+38="]:
            page.ask(text)
        page.page.screenshot(path=name)
        print(f"{name}: {name.stat().st_size / 1e3:.0f} kB")


def main(argv):
    parser = argparse.ArgumentParser(prog="web.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, help="node_modules/@huggingface/transformers")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    parser.add_argument("--quant", default=web.QUANTS[0], choices=web.QUANTS)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args(argv)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.exit("tests/long/web.py needs a package: pip install playwright")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        site = Path(folder) / "site"
        export.main([str(DEMO), "--format=web", f"--quant={args.quant}", f"--out={site}",
                     f"--library={args.library}"])
        settings, address, outside = json.loads((site / "settings.json").read_text()), serve(site), []
        browser = playwright.chromium.launch(executable_path=args.browser, args=["--no-sandbox"])
        context = browser.new_context()
        context.route(lambda url: not url.startswith(address) and url.startswith("http"),
                      lambda route: (outside.append(route.request.url), route.abort()))
        page = answers(context, address)
        marks(page, settings)
        sampling(page)
        stopping(page)
        mistakes(page)
        if args.picture:
            picture(context, address, args.picture)
        damage(context, site, address, settings)
        check("nothing came from elsewhere", outside == [], outside)
        from_a_cdn(browser, folder, args.library, args.quant)
        browser.close()
    sys.exit(f"{len(failed)} wrong" if failed else 0)


if __name__ == "__main__":
    command(main, own_help=True)
