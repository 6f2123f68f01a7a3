"""
local_hub.py: as much of the hub as `datasets` needs to stream from it, on this machine.

    with local_hub.serve(folder) as hub:               the folder is the repository of every data set
        hub.broken.append("a.parquet")                 the next answer with this file breaks off in the middle
        children.run("data.py", ..., env=hub.env)
        hub.read                                       the files whose rows were asked for, in order
"""

import json
import re
import socket
import tempfile
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


class LocalHub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def answer(self, value, code=200):
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def entry(self, path):
        name = path.relative_to(self.server.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "oid": "d" * 40, "size": 0, "path": name}
        return {"type": "file", "oid": "b" * 40, "size": path.stat().st_size, "path": name}

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if data_set := re.fullmatch(r"/api/datasets/([\w.-]+/[\w.-]+)(/revision/\w+)?", path):
            return self.answer({"id": data_set[1], "sha": COMMIT, "private": False, "gated": False,
                                "tags": [], "siblings": [], "downloads": 0, "likes": 0, "disabled": False})
        if tree := re.fullmatch(r"/api/datasets/[\w.-]+/[\w.-]+/tree/\w+(/.*)?", path):
            folder = self.server.folder / (tree[1] or "").strip("/")
            if folder.is_dir():
                return self.answer([self.entry(found) for found in sorted(folder.iterdir())])
        file = re.fullmatch(r"/datasets/[\w.-]+/[\w.-]+/resolve/\w+/(.*)", path)
        if file and (self.server.folder / file[1]).is_file():
            return self.content(self.server.folder / file[1])
        self.answer({"error": "Entry not found"}, 404)

    do_HEAD = do_GET

    def content(self, path):
        data = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        first, last = (int(wanted[1]), int(wanted[2] or len(data) - 1)) if wanted else (0, len(data) - 1)
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", '"abc"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        if self.command == "HEAD":
            return
        has_rows = last - first > len(data) // 2  # and not only the list of columns at the end
        if has_rows:
            self.server.read.append(path.name)
        if has_rows and path.name in self.server.broken:
            self.server.broken.remove(path.name)
            self.wfile.write(data[first:(first + last) // 2])
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.wfile.write(data[first:last + 1])


@contextmanager
def serve(folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), LocalHub)
    server.folder, server.broken, server.read = Path(folder), [], []
    with tempfile.TemporaryDirectory() as home:
        server.env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": home}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
        server.server_close()
