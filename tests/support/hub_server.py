"""A loopback server that speaks the Hub's HTTP API, for tests with the real `huggingface_hub` client.

It is strict where the Hub is: a write needs a token, an LFS object must have the announced hash and size, a commit is
applied whole or not at all, must name objects that were uploaded, must build on the head that it says it builds on,
and must change something. Storage is a second host name (`localhost`), reached by signed addresses and without the
token, as on the Hub. The Xet protocol is not spoken: clients set HF_HUB_DISABLE_XET=1.

    with HubServer() as hub:
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo("user/name", repo_type="dataset")
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml


TREE_PAGE = 10  # entries; small, so that clients must follow the pages
MAX_REGULAR_BYTES = 10_000_000
LFS_SUFFIXES = (".parquet", ".safetensors", ".bin", ".png", ".arrow")
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()

Intercept = Callable[[str, str], "int | str | None"]


class Refused(Exception):
    """What is raised this way becomes the answer to the client."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass(frozen=True)
class Blob:
    """A file in a tree: its content's key (sha256 for LFS, git's blob hash otherwise) and size in bytes."""

    oid: str
    size: int
    lfs: bool


@dataclass
class Commit:
    oid: str
    title: str
    tree: dict[str, Blob]


@dataclass
class Repo:
    kind: str
    name: str
    private: bool
    commits: list[Commit]
    contents: dict[str, bytes] = field(default_factory=dict)
    uploaded: set[str] = field(default_factory=set)

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def at(self, revision: str) -> Commit:
        if revision == "main":
            return self.head
        for commit in self.commits:
            if commit.oid == revision:
                return commit
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed is no error of the server
            super().handle_error(request, client_address)


class HubServer:
    """The server and its repositories.

    Attributes:
        endpoint: what clients take as HF_ENDPOINT.
        token: the one token that may read and write everything under `user/`.
        repos: by (type, "user/name").
        requests: "METHOD path" of every request, in order.
        intercept: called with (method, path) before each request; returns a status to answer with, "drop" to cut the
            connection, "lose" to act and then cut the connection before the answer, or None.
        refused: "status METHOD path: reason" of every request that was answered with an error.
    """

    def __init__(self) -> None:
        self.token = f"hf_{secrets.token_hex(17)}"
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[str] = []
        self.refused: list[str] = []
        self.intercept: Intercept = lambda method, path: None
        self.lock = threading.Lock()
        self._secret = secrets.token_hex(8)
        self._http = _Http(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"
        self.storage = f"http://localhost:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def env(self) -> dict[str, str]:
        """What a client process needs in its environment to use this server."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }

    def url(self, kind: str, name: str) -> str:
        return f"{self.endpoint}/{_web_path(kind, name)}"

    def count(self, start: str) -> int:
        """Return how many requests began with `start`, such as "PUT /storage"."""
        return sum(request.startswith(start) for request in self.requests)

    def files(self, kind: str, name: str) -> dict[str, bytes]:
        """Return the files of the head commit."""
        repo = self.repos[kind, name]
        return {path: repo.contents[blob.oid] for path, blob in repo.head.tree.items()}

    # Each of the following answers one endpoint: it returns a JSON value, or raises Refused.

    def create(self, payload: dict, authorized: bool) -> dict:
        _require(authorized)
        kind, user = payload.get("type", "model"), payload.get("organization") or "user"
        name = f"{user}/{payload['name']}"
        if user != "user":
            raise Refused(403, f"You don't have the rights to create a {kind} under the namespace {user!r}")
        if (kind, name) in self.repos:
            raise Refused(409, f"You already created this {kind} repo", url=self.url(kind, name))
        repo = Repo(kind, name, payload.get("visibility") == "private", [])
        attributes = _store(repo, GIT_ATTRIBUTES)
        repo.commits.append(_commit("initial commit", {".gitattributes": attributes}, ""))
        self.repos[kind, name] = repo
        return {"url": self.url(kind, name)}

    def validate_yaml(self, payload: dict) -> dict:
        head = re.match(r"---\n(.*?)\n---\n", payload["content"], re.DOTALL)
        metadata = yaml.safe_load(head.group(1)) if head else {}
        if not isinstance(metadata, dict):
            raise Refused(400, "the metadata is not a mapping")
        for language in metadata.get("language", []):
            if not isinstance(language, str) or not re.fullmatch(r"[a-z]{2,3}", language):
                raise Refused(400, f'"language" must only contain ISO 639 codes, not {language!r}')
        return {"warnings": []}

    def preupload(self, repo: Repo, revision: str, payload: dict) -> dict:
        tree = repo.at(revision).tree
        files = []
        for file in payload["files"]:
            base64.b64decode(file["sample"], validate=True)
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > MAX_REGULAR_BYTES
            old = tree.get(file["path"])
            mode = "lfs" if lfs else "regular"
            files.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": old.oid if old else None}
            )
        return {"files": files}

    def lfs_batch(self, repo: Repo, payload: dict) -> dict:
        if payload["operation"] != "upload" or payload.get("hash_algo") != "sha256":
            raise Refused(422, "only uploads by sha256")
        objects = []
        for item in payload["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in repo.uploaded:
                key = f"{repo.kind}/{repo.name}/{item['oid']}/{item['size']}"
                entry["actions"] = {
                    "upload": {"href": f"{self.storage}/storage/{key}?signature={self.sign(key)}"},
                    "verify": {"href": f"{self.url(repo.kind, repo.name)}.git/info/lfs/verify"},
                }
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def lfs_verify(self, repo: Repo, payload: dict) -> dict:
        if payload["oid"] not in repo.uploaded or len(repo.contents[payload["oid"]]) != payload["size"]:
            raise Refused(404, f"object {payload['oid']} of {payload['size']} bytes was not uploaded")
        return {}

    def storage_put(self, key: str, signature: str, body: bytes) -> dict:
        if signature != self.sign(key):
            raise Refused(403, "SignatureDoesNotMatch")
        kind, user, name, oid, size = key.split("/")
        if len(body) != int(size):
            raise Refused(400, f"EntityTooSmall: announced {size} bytes, got {len(body)}")
        if sha256(body).hexdigest() != oid:
            raise Refused(400, "BadDigest: the content does not have the announced sha256")
        repo = self.repos[kind, f"{user}/{name}"]
        repo.contents[oid] = body
        repo.uploaded.add(oid)
        return {}

    def commit(self, repo: Repo, revision: str, lines: list[dict]) -> dict:
        if revision != "main":
            raise Refused(404, f"no branch {revision}", "RevisionNotFound")
        if not lines or lines[0]["key"] != "header":
            raise Refused(400, "the first line of a commit must be its header")
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.head.oid):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        tree, seen = dict(repo.head.tree), set()
        regular: list[bytes] = []
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            path = value["path"]
            if path in seen or path.startswith("/") or ".." in path.split("/"):
                raise Refused(400, f"{path}: twice in one commit, or no path inside the repository")
            seen.add(path)
            if key == "file":
                content = base64.b64decode(value["content"], validate=True)
                if len(content) > MAX_REGULAR_BYTES or path.endswith(LFS_SUFFIXES):
                    raise Refused(400, f"{path}: must be uploaded as an LFS file")
                regular.append(content)
                tree[path] = _blob(content)
            elif key == "lfsFile":
                oid, size = value["oid"], value["size"]
                if value["algo"] != "sha256" or oid not in repo.uploaded or len(repo.contents[oid]) != size:
                    raise Refused(400, f"{path}: LFS object {oid} of {size} bytes was not uploaded")
                tree[path] = Blob(oid, size, lfs=True)
            elif key == "deletedFile":
                if path not in tree:
                    raise Refused(404, f"{path}: A file with this name doesn't exist", "EntryNotFound")
                del tree[path]
            else:
                raise Refused(400, f"unknown operation {key!r}")
        if tree == repo.head.tree:
            raise Refused(409, "nothing to commit: this tree is already the head")
        for content in regular:
            _store(repo, content)
        repo.commits.append(_commit(header["summary"], tree, repo.head.oid))
        url = f"{self.url(repo.kind, repo.name)}/commit/{repo.head.oid}"
        return {"success": True, "commitOid": repo.head.oid, "commitUrl": url}

    def info(self, repo: Repo, revision: str) -> dict:
        commit = repo.at(revision)
        return {
            "_id": sha1(repo.name.encode()).hexdigest()[:24],
            "id": repo.name,
            "modelId": repo.name,
            "author": repo.name.split("/")[0],
            "sha": commit.oid,
            "private": repo.private,
            "disabled": False,
            "gated": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": path} for path in sorted(commit.tree)],
        }

    def tree(self, repo: Repo, revision: str, folder: str, recursive: bool) -> list[dict]:
        entries = {}
        start = f"{folder}/" if folder else ""
        tree = repo.at(revision).tree
        for path, blob in tree.items():
            if path.startswith(start):
                parts = path[len(start) :].split("/")
                for depth in range(1, len(parts)):
                    entries[start + "/".join(parts[:depth])] = None
                entries[path] = blob
        if folder and not entries:
            raise Refused(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        if not recursive:
            entries = {path: blob for path, blob in entries.items() if "/" not in path[len(start) :]}
        return [_entry(path, blob) for path, blob in sorted(entries.items())]

    def paths_info(self, repo: Repo, revision: str, paths: list[str]) -> list[dict]:
        tree = repo.at(revision).tree
        found = []
        for path in paths:
            if path in tree:
                found.append(_entry(path, tree[path]))
            elif any(name.startswith(f"{path}/") for name in tree):
                found.append(_entry(path, None))
        return found

    def sign(self, key: str) -> str:
        return sha256(f"{self._secret}{key}".encode()).hexdigest()


def _web_path(kind: str, name: str) -> str:
    return name if kind == "model" else f"{kind}s/{name}"


def _require(authorized: bool) -> None:
    if not authorized:
        raise Refused(401, "Invalid username or password.")


def _blob(content: bytes) -> Blob:
    return Blob(sha1(b"blob %d\0" % len(content) + content).hexdigest(), len(content), lfs=False)


def _store(repo: Repo, content: bytes) -> Blob:
    blob = _blob(content)
    repo.contents[blob.oid] = content
    return blob


def _commit(title: str, tree: dict[str, Blob], parent: str) -> Commit:
    text = json.dumps([parent, title, sorted((path, blob.oid) for path, blob in tree.items())])
    return Commit(sha1(text.encode()).hexdigest(), title, tree)


def _entry(path: str, blob: Blob | None) -> dict:
    if blob is None:
        return {"type": "directory", "oid": sha1(path.encode()).hexdigest(), "size": 0, "path": path}
    entry = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
    if blob.lfs:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{blob.oid}\nsize {blob.size}\n".encode()
        entry["oid"] = _blob(pointer).oid
        entry["lfs"] = {"oid": blob.oid, "size": blob.size, "pointerSize": len(pointer)}
    return entry


_REPO = r"(?P<name>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>model|dataset)s/{_REPO}"
_WEB = rf"/(?:(?P<plural>datasets)/)?{_REPO}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    def do_HEAD(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def _handle(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        path = unquote(url.path)
        hub.requests.append(f"{self.command} {path}")
        fault = hub.intercept(self.command, path)
        if fault == "drop":
            self.close_connection = True
            return
        body = self._body()
        try:
            if isinstance(fault, int):
                raise Refused(fault, "fault on request")
            with hub.lock:
                answer = self._route(path, {key: values[-1] for key, values in parse_qs(url.query).items()}, body)
        except Refused as refused:
            hub.refused.append(f"{refused.status} {self.command} {path}: {refused.message}")
            headers = {"X-Error-Message": refused.message}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            body = {"error": refused.message, "errors": [{"message": refused.message}], **refused.body}
            answer = (refused.status, headers, json.dumps(body).encode())
        if fault == "lose":
            self.close_connection = True
            return
        self._send(*answer)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _authorized(self) -> bool:
        authorization = self.headers.get("Authorization")
        if authorization not in (None, f"Bearer {self.hub.token}"):
            raise Refused(401, "Invalid credentials in Authorization header")
        return authorization is not None

    def _repo(self, kind: str, name: str, *, write: bool = False) -> Repo:
        authorized = self._authorized()
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and not authorized):
            # As on the Hub: who may not read a repository is not told that it exists.
            raise Refused(404 if authorized else 401, "Repository not found", "RepoNotFound")
        if write:
            _require(authorized)
        return repo

    def _route(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        hub = self.hub
        if path.startswith("/storage/"):
            return self._storage(path.removeprefix("/storage/"), query, body)
        if path == "/api/repos/create":
            return _json(hub.create(json.loads(body), self._authorized()))
        if path == "/api/validate-yaml":
            return _json(hub.validate_yaml(json.loads(body)))
        if match := re.fullmatch(rf"{_API}/preupload/(?P<rev>.+)", path):
            return _json(
                hub.preupload(self._repo(match["kind"], match["name"], write=True), match["rev"], json.loads(body))
            )
        if match := re.fullmatch(rf"{_API}/commit/(?P<rev>.+)", path):
            lines = [json.loads(line) for line in body.splitlines() if line]
            return _json(hub.commit(self._repo(match["kind"], match["name"], write=True), match["rev"], lines))
        if match := re.fullmatch(rf"{_WEB}\.git/info/lfs/(?P<what>objects/batch|verify)", path):
            repo = self._repo(_kind(match), match["name"], write=True)
            answer = hub.lfs_batch if match["what"] == "objects/batch" else hub.lfs_verify
            return _json(answer(repo, json.loads(body)))
        if match := re.fullmatch(rf"{_API}/tree/(?P<rev>[^/]+)/?(?P<folder>.*)", path):
            repo = self._repo(match["kind"], match["name"])
            entries = hub.tree(repo, match["rev"], match["folder"], query.get("recursive", "").lower() == "true")
            return self._page(entries, path, query)
        if match := re.fullmatch(rf"{_API}/paths-info/(?P<rev>.+)", path):
            paths = parse_qs(body.decode())["paths"]
            return _json(hub.paths_info(self._repo(match["kind"], match["name"]), match["rev"], paths))
        if match := re.fullmatch(rf"{_API}(?:/revision/(?P<rev>.+))?", path):
            return _json(hub.info(self._repo(match["kind"], match["name"]), match["rev"] or "main"))
        if match := re.fullmatch(rf"{_WEB}/resolve/(?P<rev>[^/]+)/(?P<file>.+)", path):
            return self._resolve(self._repo(_kind(match), match["name"]), match["rev"], match["file"])
        raise Refused(404, f"{path}: not spoken here", "EntryNotFound")

    def _page(self, entries: list[dict], path: str, query: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        start = int(query.get("cursor", 0))
        headers = {}
        if start + TREE_PAGE < len(entries):
            rest = "&".join(f"{key}={value}" for key, value in query.items() if key != "cursor")
            link = f"{self.hub.endpoint}{quote(path)}?{rest}&cursor={start + TREE_PAGE}"
            headers["Link"] = f'<{link}>; rel="next"'
        return _json(entries[start : start + TREE_PAGE], headers)

    def _resolve(self, repo: Repo, revision: str, file: str) -> tuple[int, dict[str, str], bytes]:
        commit = repo.at(revision)
        blob = commit.tree.get(file)
        if blob is None:
            raise Refused(404, f"{file}: not in {revision}", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"'}
        if not blob.lfs:
            return self._content(repo.contents[blob.oid], headers)
        key = f"{repo.kind}/{repo.name}/{blob.oid}/{blob.size}"
        headers |= {
            "X-Linked-Etag": f'"{blob.oid}"',
            "X-Linked-Size": str(blob.size),
            "Location": f"{self.hub.storage}/storage/{key}?signature={self.hub.sign(key)}",
        }
        return 302, headers, b""

    def _storage(self, key: str, query: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        if "Authorization" in self.headers:
            raise Refused(400, "InvalidArgument: only one way of authorization; the token must not reach the storage")
        if self.command == "PUT":
            return _json(self.hub.storage_put(key, query.get("signature", ""), body))
        if query.get("signature") != self.hub.sign(key):
            raise Refused(403, "SignatureDoesNotMatch")
        kind, user, name, oid, _ = key.split("/")
        return self._content(self.hub.repos[kind, f"{user}/{name}"].contents[oid], {"ETag": f'"{oid}"'})

    def _content(self, content: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        """Answer with the bytes, or with the range of them that is asked for."""
        headers |= {"Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not match or match.groups() == ("", ""):
            return 200, headers, content
        first, last = match.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= len(content) or start >= stop:
            raise Refused(416, f"range {match[0]} of {len(content)} bytes")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return 206, headers, content[start:stop]


def _kind(match: re.Match[str]) -> str:
    return "dataset" if match["plural"] else "model"


def _json(value: object, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode()
