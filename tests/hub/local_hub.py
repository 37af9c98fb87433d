"""A Hub on this machine: enough of its HTTP interface for the unmodified ``huggingface_hub`` client, and its faults on request.

Repositories with commits, branches and tags; tokens; private and gated repositories; large files apart from the others, behind a
redirect.  ``hub.faults`` makes chosen requests fail: an error status, a connection reset in the middle of a body, a body cut
short, a byte flipped, an answer lost after the work was done, or anything before them.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".pt", ".png")
FIRST_FILES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


@dataclass
class Commit:
    sha: str
    files: dict[str, bytes]
    title: str
    author: str


@dataclass
class Repository:
    name: str
    private: bool
    gated: bool = False
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        sha = self.refs.get(revision, revision)
        return next((commit for commit in self.commits if commit.sha == sha), None)

    def commit(self, files: dict[str, bytes], title: str, author: str) -> Commit:
        parent = self.commits[-1].sha if self.commits else ""
        content = json.dumps([parent, title, {name: sha256(data) for name, data in sorted(files.items())}])
        self.commits.append(Commit(hashlib.sha1(content.encode()).hexdigest(), files, title, author))
        self.refs["main"] = self.head.sha
        return self.head


@dataclass
class Fault:
    """What happens to the next ``times`` requests whose "METHOD path" matches: see :meth:`LocalHub.fail`."""

    pattern: str
    kind: str
    times: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    action: Callable[[], object] | None = None


class LocalHub:
    """``with LocalHub() as hub``: serves at ``hub.url`` until the block ends; ``hub.requests`` is what was asked of it."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.users: dict[str, str] = {}  # token -> who
        self.requests: list[str] = []
        self.tokens: list[str] = []  # that came with them
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    def __enter__(self) -> "LocalHub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.store = (
            f"http://localhost:{self.server.server_port}"  # large files: another host, which gets no token
        )
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def user(self, name: str) -> str:
        """A new user's token."""
        token = "hf_" + hashlib.sha256(name.encode()).hexdigest()[:34]
        self.users[token] = name
        return token

    def add(self, name: str, files: dict[str, bytes], *, private=False, gated=False) -> Repository:
        """A repository that is there already, with one commit of these files."""
        repository = self.repositories[name] = Repository(name, private, gated)
        repository.commit(dict(files), "first", name.split("/")[0])
        return repository

    def fail(
        self, pattern: str, kind: str = "status", *, times=1, status=500, headers=None, action=None
    ) -> None:
        """Have the next ``times`` requests like ``pattern`` fail.

        ``kind``: "status" answers with ``status``; "reset" and "cut" break the connection in the middle of the body; "flip" changes
        one byte of the body; "lost" does what was asked and then breaks the connection; "first" calls ``action``, then goes on.
        """
        self.faults.append(Fault(pattern, kind, times, status, headers or {}, action))

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None

    def asked(self, pattern: str) -> int:
        """How many requests there were like ``pattern``."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)


class Handler(BaseHTTPRequestHandler):
    """One connection; ``hub`` is set by LocalHub."""

    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _any(self):
        body = self._body()
        request = f"{self.command} {unquote(self.path)}"
        with self.hub.lock:
            self.hub.requests.append(request)
            self.hub.tokens.append(self.headers.get("Authorization", ""))
        self.fault = self.hub.fault(request)
        if self.fault and self.fault.kind == "first":
            self.fault.action()
        if self.fault and self.fault.kind == "status":
            self._json(self.fault.status, {"error": "asked to fail"}, self.fault.headers)
            return
        with self.hub.lock:
            self._answer(body)

    do_GET = do_HEAD = do_POST = do_PUT = _any

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    # what is asked for

    def _answer(self, body: bytes) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        name = r"(?P<name>[^/]+/[^/]+?)"
        routes = [
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", rf"/api/models/{name}/preupload/(?P<revision>.+)", self._preupload),
            ("POST", rf"/api/models/{name}/commit/(?P<revision>.+)", self._commit),
            ("POST", rf"/{name}\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/large/(?P<oid>\w+)", self._put),
            ("GET", r"/large/(?P<oid>\w+)", self._large),
            ("HEAD", r"/large/(?P<oid>\w+)", self._large),
            ("GET", rf"/api/models/{name}/tree/(?P<revision>.+)", self._tree),
            ("GET", rf"/api/models/{name}(/revision/(?P<revision>.+))?", self._info),
            ("GET", rf"/{name}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._resolve),
            ("HEAD", rf"/{name}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._resolve),
        ]
        for method, pattern, act in routes:
            if method == self.command and (found := re.fullmatch(pattern, path)):
                act(body=body, query=query, **{k: v for k, v in found.groupdict().items() if v})
                return
        self._error(404, "", f"no such route: {self.command} {path}")

    def _create(self, body, **_):
        asked = json.loads(body)
        user = self._user()
        if user is None:
            return self._error(401, "", "Invalid username or password.")
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if owner != user:
            return self._error(403, "", f"no rights in the namespace {owner!r}")
        if name in self.hub.repositories:
            return self._json(409, {"error": "You already created this model repo", "url": self._url(name)})
        private = asked.get("visibility", "private" if asked.get("private") else "public") == "private"
        self.hub.add(name, FIRST_FILES, private=private)
        return self._json(200, {"url": self._url(name), "name": name})

    def _validate(self, body, **_):
        """What the Hub holds a card's metadata to, as far as its documentation says it."""
        import yaml

        found = re.match(r"\s*---\n(.*?)\n---", json.loads(body)["content"], re.DOTALL)
        if not found:
            return self._json(200, {"warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        errors = [{"message": message} for message in metadata_errors(yaml.safe_load(found[1]))]
        return self._json(400 if errors else 200, {"warnings": [], "errors": errors})

    def _whoami(self, **_):
        if (user := self._user()) is None:
            return self._error(401, "", "Invalid username or password.")
        return self._json(200, {"name": user, "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def _preupload(self, name, body, **_):
        if (repository := self._writable(name)) is None:
            return
        there = repository.head.files
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": oid(file["path"], there[file["path"]]) if file["path"] in there else None,
            }
            for file in json.loads(body)["files"]
        ]
        self._json(200, {"files": files})

    def _batch(self, name, body, **_):
        if self._writable(name) is None:
            return
        objects = []
        for entry in json.loads(body)["objects"]:
            there = entry["oid"] in self.hub.large
            actions = {"upload": {"href": f"{self.hub.url}/large/{entry['oid']}", "header": {}}}
            objects.append(entry | ({} if there else {"actions": actions}))
        self._json(200, {"transfer": "basic", "objects": objects})

    def _put(self, oid, body, **_):
        if sha256(body) != oid:
            return self._error(400, "", "the content is not what its name says")
        self.hub.large[oid] = body
        return self._json(200, {})

    def _commit(self, name, body, **_):
        if (repository := self._writable(name)) is None:
            return None
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repository.head.sha):
            return self._error(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(repository.head.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.hub.large:
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                return self._error(400, "", f"cannot do {line['key']} of {value['path']}")
        made = repository.commit(files, header["summary"], self._user() or "")
        return self._json(200, {"commitUrl": f"{self._url(name)}/commit/{made.sha}", "commitOid": made.sha})

    def _info(self, name, query, revision="main", **_):
        if (found := self._readable(name, revision)) is None:
            return
        repository, commit = found
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if query.get("blobs"):
            siblings = [
                {"rfilename": path, **described(path, commit.files[path])} for path in sorted(commit.files)
            ]
        self._json(
            200,
            {
                "id": name,
                "modelId": name,
                "sha": commit.sha,
                "private": repository.private,
                "siblings": siblings,
                "tags": [],
            },
        )

    def _tree(self, name, revision, **_):
        if (found := self._readable(name, revision)) is None:
            return
        files = [
            {"type": "file", "path": path, "oid": git_sha1(data), **tree_entry(path, data)}
            for path, data in sorted(found[1].files.items())
        ]
        self._json(200, files)

    def _resolve(self, name, revision, file, **_):
        if (found := self._readable(name, revision)) is None:
            return None
        repository, commit = found
        if repository.gated and self._user() is None:
            return self._error(403, "GatedRepo", f"Access to model {name} is restricted.")
        headers = {"X-Repo-Commit": commit.sha}
        if file not in commit.files:
            return self._error(404, "EntryNotFound", "Entry not found", headers)
        data = commit.files[file]
        if not file.endswith(LARGE):
            return self._content(data, headers | {"ETag": f'"{git_sha1(data)}"'})
        self.hub.large[sha256(data)] = data
        headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        return self._json(302, {}, headers | {"Location": f"{self.hub.store}/large/{sha256(data)}?of={file}"})

    def _large(self, oid, **_):
        if oid not in self.hub.large:
            return self._error(404, "", "no such object")
        return self._content(self.hub.large[oid], {"ETag": f'"{oid}"'})

    # who may

    def _user(self) -> str | None:
        return self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _readable(self, name: str, revision: str) -> tuple[Repository, Commit] | None:
        repository = self.hub.repositories.get(name)
        if "Authorization" in self.headers and self._user() is None:
            return self._error(401, "", "Invalid credentials in Authorization header")
        if repository is None or (repository.private and self._user() != name.split("/")[0]):
            return self._error(401 if self._user() is None else 404, "RepoNotFound", "Repository not found")
        if (commit := repository.at(revision)) is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    def _writable(self, name: str) -> Repository | None:
        if (found := self._readable(name, "main")) is None:
            return None
        if self._user() != name.split("/")[0]:
            return self._error(403, "", "you need the write permission here")
        return found[0]

    # the answer

    def _url(self, name: str) -> str:
        return f"{self.hub.url}/{name}"

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        codes = {"X-Error-Code": code} if code else {}
        self._json(status, {"error": message}, {**codes, "X-Error-Message": message, **(headers or {})})

    def _json(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        self._send(
            status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}
        )

    def _content(self, data: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and 0 < (start := int(asked[1])) < len(data):
            span = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            self._send(206, data[start:], headers | span)
        else:
            self._send(200, data, headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        kind = self.fault.kind if self.fault else ""
        if kind == "lost":
            return self._break()
        if kind == "flip" and data:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if kind in ("reset", "cut"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            return self._break(reset=kind == "reset")
        self.wfile.write(data)
        return None

    def _break(self, reset: bool = True) -> None:
        self.close_connection = True
        if reset:  # no goodbye: the other side gets a reset, at once
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def oid(path: str, data: bytes) -> str:
    return sha256(data) if path.endswith(LARGE) else git_sha1(data)


def described(path: str, data: bytes) -> dict[str, object]:
    """A file as the list of a repository's files gives it."""
    large = (
        {"lfs": {"size": len(data), "sha256": sha256(data), "pointerSize": 134}}
        if path.endswith(LARGE)
        else {}
    )
    return {"size": len(data), "blobId": git_sha1(data), **large}


def tree_entry(path: str, data: bytes) -> dict[str, object]:
    large = (
        {"lfs": {"size": len(data), "oid": sha256(data), "pointerSize": 134}} if path.endswith(LARGE) else {}
    )
    return {"size": len(data), **large}


RELATIONS = {"adapter", "merge", "quantized", "finetune"}
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "gemma", "other", "llama3.2", "unknown"}  # those that tests use


def metadata_errors(data: object) -> list[str]:
    """What is wrong with a card's metadata, a line each."""
    if not isinstance(data, dict):
        return ["the metadata is no mapping"]
    text = lambda value: isinstance(value, str) and 0 < len(value) <= 200
    listed = lambda key: (
        data.get(key) if isinstance(data.get(key), list) else [data[key]] if key in data else []
    )
    name = r"[\w.-]+/[\w.-]+"
    wrong = []
    if data.get("license", "other") not in LICENSES:  # the Hub takes a card without one
        wrong.append(f'"license" must be one of the known ones, got {data["license"]!r}')
    if data.get("base_model_relation", "adapter") not in RELATIONS:
        wrong.append(f'"base_model_relation" must be one of {sorted(RELATIONS)}')
    wrong += [
        f'"base_model" {m!r} is no model id' for m in listed("base_model") if not re.fullmatch(name, str(m))
    ]
    wrong += [
        f'"language" {code!r} is no code'
        for code in listed("language")
        if not re.fullmatch("[a-z]{2,3}", str(code))
    ]
    wrong += [f'"tags" {tag!r}' for tag in listed("tags") if not text(tag)]
    wrong += [f'"{key}" is empty' for key in data if data[key] in (None, "", [], {})]
    for number, model in enumerate(data.get("model-index", [])):
        here = f"model-index[{number}]"
        wrong += [] if text(model.get("name")) else [f"{here}.name"]
        for result in model.get("results") or [{}]:
            needed = {
                "task.type": ("task", "type"),
                "dataset.type": ("dataset", "type"),
                "dataset.name": ("dataset", "name"),
            }
            wrong += [
                f"{here}.{key} is required"
                for key, (a, b) in needed.items()
                if not text(result.get(a, {}).get(b))
            ]
            for metric in result.get("metrics") or [{}]:
                value = metric.get("value")
                sound = (
                    text(metric.get("type")) and isinstance(value, int | float) and abs(value) < float("inf")
                )
                wrong += (
                    [] if sound else [f"{here}: the metric {metric!r:.80} wants a type and a finite value"]
                )
    return wrong
