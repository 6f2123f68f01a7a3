"""Synthetic textbooks: which prompts are made, what becomes of answers, and servers that misbehave."""

import functools
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import children
import pytest

from config import Config, UserError
from corpus import synthesize
from corpus.documents import FORMATS, load, plans
from corpus.prompts import AUDIENCES, built_in, builtin_prompts, distinct, page_prompts, wordings
from corpus.sources import Documents

BEES = "**Bees**\n\nBees hum. " + "They fly from flower to flower all day long. " * 15


@functools.cache
def made(seed):
    """The first prompts of a seed, and what the built-in writer answers."""
    return [(prompt, built_in(prompt)) for prompt in itertools.islice(builtin_prompts(seed), 300)]


def first(n, seed=0):
    return [prompt for prompt, _ in made(seed)[:n]]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pages(path, n):
    rows = [{"text": f"Page {i} says [this|that] about <topic> and {{name}} / TCP. " + "x" * 1200,
             "topic": f"Thing {i} [a|b] / {{c}}"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path), rows


# ---------------------------------------------------------------------------------------------------------
# a server that follows a script


class Scripted(BaseHTTPRequestHandler):
    """server.script(prompt, how often it was asked) -> (status, headers, body), or None to hang up.

    A body that is not a string is sent as JSON. Retry-After-Ms keeps the waits of the client short.
    """

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        prompt = json.loads(body)["messages"][0]["content"]
        with server.lock:
            server.asked[prompt] += 1
            server.requests.append((self.path, self.headers, json.loads(body), time.monotonic()))
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        try:
            reply = server.script(prompt, server.asked[prompt])
        finally:
            with server.lock:
                server.busy -= 1
        if reply is None:
            return self.connection.close()
        status, headers, said = reply
        said = (said if isinstance(said, str) else json.dumps(said)).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(said)), **server.headers, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(said)
        except BrokenPipeError:  # the client was stopped
            pass

    def log_message(self, *args):
        pass


def says(text, reason="stop"):
    return 200, {}, {"choices": [{"message": {"content": text}, "finish_reason": reason}]}


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.daemon_threads = True
    server.script, server.asked, server.requests = lambda prompt, times: says(BEES), Counter(), []
    server.lock, server.busy, server.busiest = threading.Lock(), 0, 0
    server.headers = {"Retry-After-Ms": "10"}
    server.words = [f"--writer=http://127.0.0.1:{server.server_port}/v1", "--model=bee"]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# ---------------------------------------------------------------------------------------------------------
# prompts


def test_the_same_seed_makes_the_same_prompts_and_another_seed_makes_others():
    assert [p.text for p in first(60)] == [p.text for p in itertools.islice(builtin_prompts(0), 60)]
    assert not {p.id for p in first(60)} & {p.id for p in itertools.islice(builtin_prompts(1), 60)}
    assert len({p.id for p in first(300)}) == 300


def test_every_plan_of_the_built_in_writer_is_asked_for_in_all_styles_and_half_of_the_prompts_name_a_topic():
    prompts = first(300)
    adults = {"adults": ("college", "professionals")}
    known = {(form, audience) for form in FORMATS for _, plan, *_ in plans(form)
             for audience in adults.get(plan, (plan,))}
    assert {(p.format, p.audience) for p in prompts} == known
    styles = {key for key in wordings() if key[0] in FORMATS}
    assert {(p.format, p.style) for p in prompts} == styles and len(styles) > 2 * len(FORMATS)
    named = sum("opic is:" in p.text or "It should be about:" in p.text for p in prompts)
    assert 0.42 < named / 300 < 0.58


def test_pages_get_all_formats_for_all_audiences_in_the_published_shares(tmp_path):
    prompts = list(page_prompts(pages(tmp_path / "p.jsonl", 100)[0], seed=0))
    shares = {(form, audience): 2 * tenths for form in FORMATS for audience, tenths in AUDIENCES.items()}
    assert Counter((p.format, p.audience) for p in prompts) == shares and len(shares) == 20


def test_a_prompt_contains_the_first_1000_characters_of_its_page_unchanged(tmp_path):
    """Brackets, braces and slashes mean something in templates, and nothing in a page."""
    source, rows = pages(tmp_path / "p.jsonl", 40)
    prompts = list(page_prompts(source, seed=0))
    for prompt, row in zip(prompts, rows):
        assert prompt.seed_data == row["text"][:1000]
        assert f"\n\n{prompt.seed_data}\n\n" in prompt.text and row["text"][:1001] not in prompt.text
    named = [row["topic"] in prompt.text for prompt, row in zip(prompts, rows)]
    assert 8 < sum(named) < 32
    assert [p.text for p in page_prompts(source, seed=0)] == [p.text for p in prompts]


def test_a_page_without_a_topic_is_a_seed_too_and_one_without_text_is_reported(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "Bees hum."}\n{"text": "Bees hum."}\n{"text": "  "}\n')
    prompts = page_prompts(str(path), 0)
    assert "Bees hum." in next(prompts).text and "opic is" not in next(prompts).text
    with pytest.raises(UserError, match="line 3: empty"):
        next(prompts)


def test_equal_prompts_are_used_once():
    a, b, c = first(3)
    assert list(distinct([a, b, a, c, c])) == [a, b, c]


def test_prompts_are_clean_english_without_remains_of_templates():
    debris = r"[{}\[\]|<>_]|  |\b(\w+) \1\b|\b[Aa] [aeio]\w|\b[Aa]n [bcdfg]| [.,;:]|[.,;:]{2}|\n{3}"
    assert not [p.text for p in first(300) if re.search(debris, p.text)]


# ---------------------------------------------------------------------------------------------------------
# the built-in writer does what its prompt asks


def test_a_text_has_the_format_that_its_prompt_asks_for():
    """A story has dialogue and no headline, the others have one; instructions have steps, exercises sums."""
    asked = {"story": "a short story", "textbook": "of a textbook", "article": "a short article",
             "example": " an exercise", "howto": "short instructions"}
    for prompt, text in made(0):
        assert [form for form, words in asked.items() if words in prompt.text] == [prompt.format]
        assert ("\n" in text) == (prompt.format != "story") and ('"' in text) == (prompt.format == "story")
        assert bool(re.search(r"^(\d\.|-) ", text, re.M)) == (prompt.format == "howto")
        if prompt.format == "example":
            assert re.search(r"\d+ [+-] \d+ = \d+", text)
        if prompt.format == "howto":
            assert text.splitlines()[0].startswith("How to ") and text.splitlines()[0] in prompt.text


def test_the_prompt_names_each_country_and_capital_of_its_text_and_the_child_of_a_story():
    table, n = load("facts.json")["countries"], 0
    names = re.compile(r"\b(" + "|".join(re.escape(x.lower()) for row in table for x in row[:2]) + r")\b")
    for prompt, text in made(0):
        found = set(names.findall(text.lower()))
        assert not found - set(names.findall(prompt.text.lower())), (prompt.text, text)
        n += len(found)
        if prompt.format == "story" and not re.search("capital|tens", prompt.seed_data):
            assert prompt.bound["name"] in prompt.seed_data and prompt.bound["name"] in text
    assert n > 300


def test_the_sum_of_a_text_is_the_sum_of_its_prompt():
    found = 0
    for prompt, text in made(0):
        if prompt.format == "example" and prompt.bound.keys() >= {"a", "b"}:
            assert str(prompt.bound["a"]) in prompt.text and str(prompt.bound["b"]) in prompt.text
            assert re.search(rf"\b{prompt.bound['a']} [+-] {prompt.bound['b']} =", text)
            found += 1
    assert found > 20


def test_the_command_writes_the_same_bytes_in_one_run_and_in_two(tmp_path, capsys):
    for words in ("--n=30", "--n=60"):
        synthesize.main([f"--out={tmp_path / 'two.jsonl'}", words])
    assert re.search(r"prompts +60\n +answered by an earlier run +30\nwritten +30", capsys.readouterr().out)
    synthesize.main([f"--out={tmp_path / 'one.jsonl'}", "--n=60"])
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    records = lines(tmp_path / "one.jsonl")
    assert [(r["prompt"], r["text"]) for r in records] == [(p.text, text) for p, text in made(0)[:60]]
    assert {"prompt", "text", "audience", "format", "seed_data"} < records[0].keys()
    assert list(Documents(str(tmp_path / "one.jsonl"), Config())) == [r["text"] for r in records]


# ---------------------------------------------------------------------------------------------------------
# what becomes of an answer


@pytest.mark.parametrize("said, kept", [
    ("Sure! Here is a short story about bees:\n\nBees hum.", "Bees hum."),
    ("Certainly, here's a textbook page for young children.\n\n# Bees\n\nBees hum.", "# Bees\n\nBees hum."),
    ("Here’s the article you asked for:\n---\nBees hum.", "Bees hum."),
    ("Below is an exercise together with its answers:\n\n**Title: Bees**\nBees hum.", "**Bees**\nBees hum."),
    ("**Title:** Bees\n\nBees hum.", "Bees\n\nBees hum."),
    ("Title: Bees", "Bees"),
    ("## Title: Bees", "## Bees"),
    ("<think>\nThe user wants bees: a story.\n</think>\n\nBees hum.", "Bees hum."),
    ("<think>\nThe user wants", ""),
    ("\n\n Of course!\n\nBees hum.\n", "Bees hum."),
    ("Of course, bees hum. Who does not know it?", "Of course, bees hum. Who does not know it?"),
    ("Here is a bee, and its story too. It hums.", "Here is a bee, and its story too. It hums."),
    ("Here is where the bees live.\n\nThey hum.", "Here is where the bees live.\n\nThey hum."),
    ("This is the story of a bee. She hums.\n", "This is the story of a bee. She hums."),
    ("Great bees hum.\nStories: none.", "Great bees hum.\nStories: none.")])
def test_what_a_model_says_before_the_text_is_removed_and_nothing_else(said, kept):
    assert synthesize.text_of_answer(said, cut_off=False) == kept


@pytest.mark.parametrize("said, kept", [
    ("Bees hum. They fly. And in the", "Bees hum. They fly."),
    ('"Bees hum!" "Do they', '"Bees hum!"'),
    ("1. Catch a bee.\n2. Let it go.\n3. Be", "1. Catch a bee.\n2. Let it go."),
    ("1. Catch a bee.\n2.", "1. Catch a bee."),
    ("Bees weigh 0.1 gram", ""),
    ("Bees hum.", "Bees hum.")])
def test_an_answer_that_was_cut_off_ends_with_its_last_complete_sentence(said, kept):
    assert synthesize.text_of_answer(said, cut_off=True) == kept
    assert synthesize.text_of_answer(said, cut_off=False) == said


def test_short_answers_are_left_out_and_cut_ones_are_marked_and_both_are_counted(server, tmp_path, capsys):
    prompts = [p.text for p in first(9)]
    ways = [says(BEES), says("Bees hum."), says(BEES + "And in the", "length")]
    server.script = lambda prompt, times: ways[prompts.index(prompt) % 3]
    synthesize.main([f"--out={tmp_path / 'm.jsonl'}", "--n=9", *server.words])
    records = {r["prompt"]: r for r in lines(tmp_path / "m.jsonl")}
    assert set(records) == {prompt for i, prompt in enumerate(prompts) if i % 3 != 1}
    assert all(r["text"] == BEES.strip() and r["words"] == len(BEES.split()) for r in records.values())
    assert {prompts.index(r["prompt"]) % 3 for r in records.values() if r["cut_off"]} == {2}
    assert all(r["model"] == "bee" for r in records.values())
    said = " ".join(capsys.readouterr().out.split())
    assert "prompts 9 " in said and "written 6 " in said
    assert "left out: under 110 words 3" in said and "cut to the last complete sentence 3" in said


# ---------------------------------------------------------------------------------------------------------
# servers


def test_the_request_has_cosmopedias_settings_with_the_users_key_and_changes(server, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    synthesize.main([f"--out={tmp_path / 'm.jsonl'}", "--n=1", *server.words,
                     f"--key_file={tmp_path / 'key'}",
                     '--sampling={"temperature": 1, "repeat_penalty": null}'])
    path, headers, body, _ = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body == {"model": "bee", "messages": [{"role": "user", "content": first(1)[0].text}],
                    "max_tokens": 2500, "temperature": 1, "top_p": 0.95, "top_k": 50,
                    "repetition_penalty": 1.2}


@pytest.mark.parametrize("trouble", [
    (500, {}, "out of memory"), (503, {}, ""), (429, {}, ""), None, (200, {}, "{garbage"),
    (200, {}, "[1, 2]"), (200, {}, {"choices": []}), (200, {}, {"choices": [{"message": {"content": 7}}]}),
    (200, {"Content-Length": "9999"}, "an answer that ends too early")], ids=str)
def test_every_prompt_is_answered_once_although_the_server_fails_twice_at_first(server, tmp_path, trouble):
    server.script = lambda prompt, times: trouble if times < 3 else says(BEES)
    synthesize.main([f"--out={tmp_path / 'm.jsonl'}", "--n=6", "--concurrency=3", *server.words])
    assert sorted(r["prompt"] for r in lines(tmp_path / "m.jsonl")) == sorted(p.text for p in first(6))
    assert set(server.asked.values()) == {3}


def test_the_client_waits_as_long_as_the_server_asks(server, tmp_path):
    server.headers = {}
    server.script = lambda prompt, times: (429, {"Retry-After": "1"}, "") if times == 1 else says(BEES)
    synthesize.main([f"--out={tmp_path / 'm.jsonl'}", "--n=1", *server.words])
    (*_, then), (*_, now) = server.requests
    assert 1 <= now - then < 5


def test_waits_double(server, tmp_path):
    server.headers = {}
    server.script = lambda prompt, times: (500, {}, "") if times < 4 else says(BEES)
    synthesize.main([f"--out={tmp_path / 'm.jsonl'}", "--n=1", *server.words])
    times = [time for *_, time in server.requests]
    waits = [b - a for a, b in itertools.pairwise(times)]
    assert len(waits) == 3 and waits[0] >= 0.1 and waits[1] >= 0.2 and waits[2] >= 0.4


def test_a_prompt_that_always_fails_costs_only_itself_and_the_next_run_asks_again(server, tmp_path, capsys):
    bad = first(5)[2].text
    server.script = lambda prompt, times: (500, {}, "") if prompt == bad and times < 5 else says(BEES)
    command = [f"--out={tmp_path / 'm.jsonl'}", "--n=5", "--retries=2", *server.words]
    with pytest.raises(UserError, match="1 prompts have no answer yet"):
        synthesize.main(command)
    assert len(lines(tmp_path / "m.jsonl")) == 4
    assert re.search("failed: HTTP 500 +1\n", capsys.readouterr().out)
    synthesize.main(command)
    assert Counter(r["prompt"] for r in lines(tmp_path / "m.jsonl")) == Counter(p.text for p in first(5))
    assert server.asked.pop(bad) == 5 and set(server.asked.values()) == {1}


def test_a_server_that_is_gone_ends_the_run(server, tmp_path):
    server.script = lambda prompt, times: None
    with pytest.raises(UserError, match="10 prompts in a row have failed"):
        synthesize.main([f"--out={tmp_path / 'm.jsonl'}", "--n=99", "--retries=0", *server.words])
    assert len(server.asked) < 20 and not lines(tmp_path / "m.jsonl")


def test_a_refusal_ends_the_run_immediately_with_what_the_server_says(server, tmp_path):
    server.script = lambda prompt, times: (404, {}, '{"error": "no model\n named bee"}')
    with pytest.raises(UserError, match='refuses with HTTP 404, {"error": "no model named bee"}') as error:
        synthesize.main([f"--out={tmp_path / 'm.jsonl'}", "--n=9", "--concurrency=1", *server.words])
    assert "--model" in str(error.value) and len(server.requests) == 1


def test_a_slow_server_gets_many_prompts_at_the_same_time(server, tmp_path):
    """The server answers none before it has eight."""
    eight = threading.Barrier(8, timeout=20)
    server.script = lambda prompt, times: eight.wait() < 0 or says(BEES)
    synthesize.main([f"--out={tmp_path / 'm.jsonl'}", "--n=16", "--concurrency=8", *server.words])
    assert server.busiest == 8 and server.asked.total() == 16


def test_a_server_that_does_not_answer_is_asked_again_after_the_timeout(server, tmp_path):
    server.script = lambda prompt, times: times == 1 and time.sleep(60) or says(BEES)
    synthesize.main([f"--out={tmp_path / 'm.jsonl'}", "--n=1", "--timeout=0.3", *server.words])
    assert len(server.requests) == 2 and len(lines(tmp_path / "m.jsonl")) == 1


def test_a_missing_client_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)  # an import of it fails
    with pytest.raises(UserError, match="pip install openai"):
        synthesize.main([f"--out={tmp_path / 'm.jsonl'}", "--writer=http://localhost:1", "--model=bee"])


# ---------------------------------------------------------------------------------------------------------
# interruptions


def run_until(n, path, server, end):
    """Start the command and send it a signal after n answers; its exit code and its output. Its sets have
    another order than those of this process."""
    words = [f"--out={path}", "--n=24", "--concurrency=4", *server.words]
    process = children.start("-m", "corpus.synthesize", *words, folder=path.parent)

    def said():
        return "".join((path.parent / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))

    try:
        while not path.exists() or path.read_bytes().count(b"\n") < n:
            assert process.exitcode is None, said()
            time.sleep(0.01)
        os.kill(process.pid, end)
        process.join(30)
        return process.exitcode, said()
    finally:
        process.kill()
        process.join()


def test_a_run_that_was_killed_in_the_middle_of_a_line_resumes_and_answers_each_prompt_once(server, tmp_path):
    replies, path = itertools.count(), tmp_path / "m.jsonl"
    server.script = lambda prompt, times: (time.sleep(60) if next(replies) >= 8 else None) or says(BEES)
    run_until(6, path, server, signal.SIGKILL)
    n = path.read_bytes().count(b"\n")
    with open(path, "ab") as file:
        file.write(b'{"id": "0123456789abcdef", "prom')
    server.script = lambda prompt, times: says(BEES)
    for _ in range(2):  # the second time there is nothing left to do
        synthesize.main([f"--out={path}", "--n=24", '--sampling={"seed": 2}', *server.words])
    assert Counter(r["prompt"] for r in lines(path)) == Counter(p.text for p in first(24))
    assert 6 <= n <= 8 and sum("seed" in body for _, _, body, _ in server.requests) == 24 - n


def test_ctrl_c_ends_the_run_with_exit_code_130_although_the_server_still_writes(server, tmp_path):
    answered = itertools.count()
    server.script = lambda prompt, times: (time.sleep(60) if next(answered) >= 5 else None) or says(BEES)
    path = tmp_path / "m.jsonl"
    code, said = run_until(5, path, server, signal.SIGINT)
    assert code == 130
    assert "Traceback" not in said and "interrupted" in said and re.search("written +5\n", said)
    assert len(lines(path)) == 5


@pytest.mark.parametrize("content", [b"mine", b'{"text": "mine"}\n', b'{"id": "1"}\n', b"[]\n", b"\n"])
def test_a_file_of_another_kind_is_refused_and_not_touched(tmp_path, content):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="line 1 is not of this command: name another --out"):
        synthesize.main([f"--out={path}"])
    assert path.read_bytes() == content


def test_two_writers_do_not_share_a_file(server, tmp_path):
    synthesize.main([f"--out={tmp_path / 'm.jsonl'}", "--n=2"])
    with pytest.raises(UserError, match="written by 'builtin', not 'bee'"):
        synthesize.main([f"--out={tmp_path / 'm.jsonl'}", "--n=2", *server.words])
    assert not server.requests


@pytest.mark.parametrize("words, message", [
    (["--out=m.json"], "must be a .jsonl file"), (["--out=nowhere/m.jsonl"], "in a folder that exists"),
    (["--n=0"], "above 0"), (["--writer=http://localhost:8000/v1"], "needs --model"),
    (["--model=bee"], "needs --model=NAME, and the other way round"),
    (["--writer=localhost:8000", "--model=bee"], "must be an address like http"),
    (["--writer=http://localhost:port", "--model=bee"], "must be an address like http"),
    (["--seeds=p.jsonl"], "needs a --writer"), (["--sampling=[1]"], "must be a JSON object"),
    (["--writer=http://localhost:1", "--model=bee", "--key_file=nokey"], "nokey cannot be read"),
    (["--writer=http://localhost:1", "--model=bee", "--seeds=p.jsonl"], "no file or folder 'p.jsonl'")])
def test_a_wrong_command_is_one_sentence(tmp_path, monkeypatch, words, message):
    if "--seeds=p.jsonl" in words and len(words) > 1:
        pytest.importorskip("openai")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        synthesize.main(["--out=m.jsonl", *words])
