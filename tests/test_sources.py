"""corpus/sources.py: texts from files, folders, the hub and Software Heritage, and what is bad in them."""

import gzip
import json
import os
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import children
import pyarrow
import pytest
from pyarrow import parquet

from config import Config, UserError
from corpus import hub, sources
from corpus.conversations import messages_of
from corpus.hub import HUB, Hub, fetch
from corpus.sources import Documents, describe, is_builtin

CFG = Config()
SKIP = replace(CFG, on_bad="skip")


def jsonl(path, lines):
    path.write_bytes(
        b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)
    )
    return str(path)


def texts(n, first=0):
    return [{"text": f"text {i}"} for i in range(first, first + n)]


@pytest.fixture
def folder(tmp_path):
    """Four files, one of each kind, with text 0 to text 6."""
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "a.txt").write_text("text 0")
    jsonl(tmp_path / "d" / "b.jsonl", texts(2, 1))
    with gzip.open(tmp_path / "d" / "c.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in texts(2, 3)))
    parquet.write_table(pyarrow.table({"text": ["text 5", "text 6"]}), tmp_path / "d" / "sub" / "d.parquet")
    (tmp_path / "d" / "notes.md").write_text("not read")
    return str(tmp_path / "d")


def test_a_folder_is_all_its_files_in_order(folder):
    assert list(Documents(folder, CFG)) == [f"text {i}" for i in range(7)]


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_parts_together_are_exactly_the_source(folder, tmp_path, n):
    """Files if there are enough of them (4), otherwise single records."""
    for source in (folder, jsonl(tmp_path / "one.jsonl", texts(11))):
        parts = [list(Documents(source, replace(CFG, part=f"{k}/{n}"))) for k in range(1, n + 1)]
        assert sorted(sum(parts, [])) == sorted(Documents(source, CFG)) and all(parts[:4])


@pytest.mark.parametrize("part", ["1/1", "2/2"])
def test_reading_resumes_after_any_record(folder, part):
    cfg = replace(CFG, part=part)
    everything = list(Documents(folder, cfg))
    for read in range(len(everything) + 1):
        state = {"read": read, "bad": 0, "left_out": {}, "notes": {}, "files": []}
        assert list(Documents(folder, cfg, state)) == everything[read:]


BAD = [
    (b'{"text": "cut\n', "malformed JSON"),
    (b"[1, 2]\n", "not a JSON object"),
    (b"5\n", "not a JSON object"),
    ({"words": "x"}, "no field 'text'"),
    ({"text": 5}, "field 'text' is not text"),
    ({"text": " \n"}, "empty document"),
    (b'{"text": "\xff\xfe"}\n', "invalid UTF-8"),
    (b'{"text": "' + b"x" * (50 * 2**20) + b'"}\n', "longer than 16 MB"),
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=str)
def test_a_bad_record_is_reported_with_file_and_line_or_counted(tmp_path, line, reason):
    source = jsonl(tmp_path / "bad.jsonl", [*texts(2), line, *texts(200)])
    with pytest.raises(UserError) as error:
        list(Documents(source, CFG))
    assert f"{source} line 3: {reason}" in str(error.value) and "--on_bad=skip" in str(error.value)
    documents = Documents(source, SKIP)
    assert len(list(documents)) == 202 and documents.left_out == {reason: 1}


def test_more_than_one_bad_record_in_a_hundred_stops_the_reading(tmp_path):
    source = jsonl(tmp_path / "bad.jsonl", [*texts(97), b"{\n", b"{\n"])
    with pytest.raises(UserError, match="2 of 99 records are bad up to the end, more than --max_bad=0.01"):
        list(Documents(source, SKIP))
    documents = Documents(source, replace(SKIP, max_bad=0.03))  # the way on that the message names
    assert len(list(documents)) == 97 and documents.left_out == {"malformed JSON": 2}


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "cut.parquet"])
def test_a_file_that_was_cut_off_is_reported(tmp_path, name):
    path = tmp_path / name
    if name.endswith("gz"):
        path.write_bytes(
            gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in texts(3000)))[:-50]
        )
    else:
        parquet.write_table(pyarrow.table({"text": ["a", "b"]}), path)
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="truncated or corrupt"):
        list(Documents(str(path), CFG))


def hub_folder(tmp_path, config, columns, n=6):
    """A folder with the layout of a data set on the hub: one config in two files."""
    (tmp_path / config).mkdir(parents=True)
    for half in range(2):
        rows = {name: values[half * n // 2 : (half + 1) * n // 2] for name, values in columns.items()}
        parquet.write_table(pyarrow.table(rows), tmp_path / config / f"train-{half}.parquet")
    (tmp_path / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n"
        f"  - split: train\n    path: {config}/*.parquet\n---\n"
    )
    return str(tmp_path)


SCHEMAS = {
    "fineweb-edu-dedup": {
        "text": [f"t{i}" for i in range(6)],
        "id": ["x"] * 6,
        "metadata": [{"dump": "d"}] * 6,
    },
    "cosmopedia-v2": {"prompt": ["p"] * 6, "text": [f"t{i}" for i in range(6)], "token_length": [3] * 6},
    "open-web-math": {"url": ["u"] * 6, "text": [f"t{i}" for i in range(6)], "metadata": ["{}"] * 6},
    "tinystories": {"text": [f"t{i}" for i in range(6)]},
    "deepmind_mathematics": {"question": [f"b'q{i}\\n'" for i in range(6)], "answer": ["b'2\\n'"] * 6},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_data_sets_on_the_hub_are_read_in_their_own_schemas(tmp_path, name):
    path = hub_folder(tmp_path, "default", SCHEMAS[name])
    data_set = replace(HUB[name], path=path, config="default", data_files=None, revision=None)
    expected = [f"q{i}\n2" if name.startswith("deep") else f"t{i}" for i in range(6)]
    assert list(Documents(data_set, CFG)) == expected
    state = {"read": 4, "bad": 0, "left_out": {}, "notes": {}, "files": []}
    assert list(Documents(data_set, CFG, state)) == expected[4:]
    for n in (2, 3):  # two files: by file, then by record
        parts = [list(Documents(data_set, replace(CFG, part=f"{k}/{n}"))) for k in range(1, n + 1)]
        assert sorted(sum(parts, [])) == expected


class Bucket(BaseHTTPRequestHandler):
    """Serves gzip blobs like Software Heritage, and sometimes fails."""

    asked = {}

    def do_GET(self):
        name = self.path.rsplit("/", 1)[1]
        Bucket.asked[name] = Bucket.asked.get(name, 0) + 1
        if name == "blob1" and Bucket.asked[name] <= 2:
            self.send_error(503)
        elif name == "blob2" and Bucket.asked[name] == 1:
            self.connection.close()
        elif name == "blob3":
            self.send_error(404)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(gzip.compress(f"print('{name}')".encode() + b"\xff"))

    def log_message(self, *args):
        pass


def test_python_edu_is_fetched_in_order_with_retries_and_missing_blobs_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "TRIES", 4)
    monkeypatch.setattr(hub, "PAUSE", 0.01)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path = hub_folder(tmp_path, "python-edu", {"blob_id": [f"blob{i}" for i in range(6)], "score": [4.0] * 6})
    address = f"http://127.0.0.1:{server.server_port}/content/"
    documents = Documents(replace(HUB["python-edu"], path=path, software_heritage=address), CFG)
    assert list(documents) == [f"print('blob{i}')" for i in (0, 1, 2, 4, 5)]
    assert documents.left_out == {"not at Software Heritage": 1} and documents.read == 6 and not documents.bad
    assert Bucket.asked["blob1"] == 3 and Bucket.asked["blob2"] == 2
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="does not answer"):
        fetch(f"http://127.0.0.1:{server.server_port}/gone")


def test_an_unknown_source_is_answered_with_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'builtin-world'"):
        Documents("builtin-wrold", CFG)
    assert is_builtin("builtin-docs") and not is_builtin("fineweb-edu-dedup")


def test_describe_changes_when_a_file_does(folder):
    before = describe(folder, CFG)
    jsonl(Path(folder) / "b.jsonl", texts(3, 1))
    assert describe(folder, CFG) != before and json.dumps(before)
    assert describe("builtin", CFG) != describe("builtin", replace(CFG, data_seed=1))
    assert describe(Hub("a/b"), CFG) != describe(Hub("a/c"), CFG)


def test_without_a_network_one_sentence_names_both_ways_out(tmp_path):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = children.run("data.py", "config/smol_135m.py", f"--out_dir={tmp_path}", env=env)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "python data.py" in done.stderr and "--data=builtin" in done.stderr


def test_a_source_that_cannot_be_read_is_one_sentence(small, monkeypatch):
    def records(*_):
        yield "line 1", lambda: "the cat"
        raise PermissionError(13, "Permission denied", "a.jsonl")

    monkeypatch.setattr(sources, "records", records)
    texts = iter(Documents(small.sources[0], small))
    assert next(texts) == "the cat"
    with pytest.raises(UserError, match="cannot be read: .*Permission denied: 'a.jsonl'"):
        next(texts)


def test_digests_of_large_files_are_stored_and_made_again_when_a_file_changes(tmp_path, monkeypatch):
    path, store, read = tmp_path / "a.jsonl", tmp_path / "out" / "digests.json", []
    jsonl(path, texts(3))
    monkeypatch.setattr(sources.hashlib, "file_digest", lambda file, name, real=sources.hashlib.file_digest:
                        read.append(file.name) or real(file, name))
    first = sources.file_digests([path], store)
    assert not store.exists()  # a small file is read again as fast
    monkeypatch.setattr(sources, "STORED", 0)
    assert sources.file_digests([path], store) == sources.file_digests([path], store) == first
    assert len(read) == 2 and store.exists()
    stat = path.stat()
    jsonl(path, texts(3, first=5))  # as long as before
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert sources.file_digests([path], store) != first and len(read) == 3


def test_chats_of_a_data_set_that_the_list_does_not_have_are_read_with_all_columns(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello!"}]
    path = hub_folder(tmp_path, "default", {"messages": [chat] * 6, "prompt_id": ["a"] * 6})
    assert list(Documents(Hub(path), CFG, item=messages_of)) == [chat] * 6
    with pytest.raises(UserError, match="no column"):
        list(Documents(Hub(path), CFG))


def test_short_texts_of_a_small_source_are_not_cut_in_two(tmp_path):
    """A tenth of "text 3" would be its last letter."""
    documents = Documents(jsonl(tmp_path / "few.jsonl", texts(5)), replace(CFG, val_fraction=0.1))
    parts = [part for text in documents for _, part in documents.split(text)]
    assert parts == [f"text {i}" for i in range(5)]
