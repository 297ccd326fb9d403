"""A small Hub on 127.0.0.1, in memory, that the real huggingface_hub client talks to in the tests.

It serves models, and datasets as if they were models. Tests read `hub.requests` (all requests) and `hub.repos` (what
was uploaded), and set `hub.upload_mode` and `hub.faults` (what goes wrong, and when).

Upload modes, as on the real Hub for *.safetensors (small text is always regular, *.parquet never): "regular" (inside
the commit), "lfs" (the client needs HF_HUB_DISABLE_XET=1), "xet" (the real hf_xet, into a folder instead of a server).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.support.hub_state import FaultKind, File, Hub, RefusalError, Reply, Repo, Request


TOKENS = {"hf_alice": "alice", "hf_bob": "bob"}


@contextmanager
def run_hub() -> Iterator[Hub]:
    """Yields a Hub that serves within the context, on a free port of 127.0.0.1 (`hub.endpoint`)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    with tempfile.TemporaryDirectory(prefix="xet-") as folder:
        hub = server.hub = Hub(Path(folder))  # type: ignore[attr-defined]
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        hub.storage = f"http://localhost:{server.server_port}/_storage"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


ROUTES: list[tuple[re.Pattern[str], Callable[..., Reply]]] = []


def route(pattern: str) -> Callable[[Callable[..., Reply]], Callable[..., Reply]]:
    """Registers the answer to `METHOD /path`; paths are matched undecoded, since a revision may hold a slash (%2F)."""

    def register(answer: Callable[..., Reply]) -> Callable[..., Reply]:
        ROUTES.append((re.compile(pattern.replace("REPO", "([^/]+/[^/]+?)") + "$"), answer))
        return answer

    return register


class Handler(BaseHTTPRequestHandler):
    """Reads a request, lets the route answer it, lets a fault spoil it, logs it."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Logs nothing on stderr."""

    def handle_request(self) -> None:
        self.hub: Hub = self.server.hub  # type: ignore[attr-defined]
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.body = self.read_body()
        fault = self.hub.take_fault(f"{self.command} {self.path}")
        reply: Reply | None = None
        if isinstance(fault, int):
            reply = RefusalError(fault, f"{fault} for the test").reply
        elif fault != "drop":
            if fault == "race":
                self.hub.commit_in_between()
            reply = self.answer(url.path)
        if fault == "lose_reply":
            reply = None
        host, status = self.headers.get("Host", ""), None if reply is None else reply[0]
        self.hub.requests.append(Request(self.command, self.path, host, self.token, self.body, status))
        if reply is None:
            self.close_connection = True
        else:
            self.send_reply(reply, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, path: str) -> Reply:
        path = path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/")  # one namespace
        try:
            for pattern, answer in ROUTES:
                if match := pattern.match(f"{self.command} {path}"):
                    with self.hub.lock:
                        return answer(self, *[unquote(group) if group else group for group in match.groups()])
            raise RefusalError(404, f"no such route: {self.command} {path}")
        except RefusalError as refusal:
            return refusal.reply

    def send_reply(self, reply: Reply, fault: FaultKind | None) -> None:
        status, headers, content = reply
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **headers}
        if fault == "truncate":
            content = content[: len(content) // 2]
        elif fault == "alter" and content:
            at = len(content) * 3 // 4
            content = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if fault == "stall":
            time.sleep(self.hub.stall_seconds)
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if fault == "cut_body" else content)
        self.close_connection |= fault in ("cut_body", "stall")

    def user(self) -> str | None:
        """Returns the user who asks; None is anonymous."""
        if self.token is not None and self.token not in TOKENS:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return TOKENS.get(self.token or "")

    def known_user(self) -> str:
        user = self.user()
        if user is None:
            raise RefusalError(401, "Invalid username or password.")
        return user

    def repo(self, repo_id: str, *, write: bool = False) -> Repo:
        """Returns a repo if the user may see it; another user's private repo is reported as missing."""
        user, repo = self.user(), self.hub.repos.get(repo_id)
        if repo is None or (repo.private and user != repo.owner):
            if user is None:
                raise RefusalError(401, "Invalid username or password.", code="RepoNotFound")
            raise RefusalError(404, "Repository not found", code="RepoNotFound")
        if write and self.known_user() != repo.owner:
            raise RefusalError(403, "You don't have the required permissions to perform this action")
        return repo

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


# Users, cards, repos


@route("GET /api/whoami-v2")
def whoami(request: Handler) -> Reply:
    name = request.known_user()
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
    return 200, {}, {"type": "user", "id": name, "name": name, "fullname": name, "orgs": [], "auth": auth}


@route("POST /api/validate-yaml")
def validate_yaml(request: Handler) -> Reply:
    try:
        valid = isinstance(card_data(request.json()["content"]), dict)
    except yaml.YAMLError:
        valid = False
    errors = [] if valid else [{"message": "the metadata of README.md must be a YAML mapping"}]
    return 200 if valid else 400, {}, {"errors": errors, "warnings": []}


def card_data(card: str) -> Any:
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, flags=re.DOTALL)
    return yaml.safe_load(match[1]) if match else {}


@route("POST /api/repos/create")
def create_repo(request: Handler) -> Reply:
    user, asked = request.known_user(), request.json()
    repo_id = f"{asked.get('organization') or user}/{asked['name']}"
    if not repo_id.startswith(f"{user}/"):
        raise RefusalError(403, f"You don't have the rights to create a model under the namespace of {repo_id}")
    url = f"{request.hub.endpoint}/{repo_id}"
    if repo_id in request.hub.repos:
        raise RefusalError(409, "You already created this model repo", url=url)
    request.hub.repos[repo_id] = Repo(repo_id, private=asked.get("visibility") == "private")
    return 200, {}, {"url": url, "name": repo_id, "id": repo_id}


@route("DELETE /api/repos/delete")
def delete_repo(request: Handler) -> Reply:
    asked = request.json()
    repo = request.repo(f"{asked.get('organization') or request.known_user()}/{asked['name']}", write=True)
    del request.hub.repos[repo.id]
    return 200, {}, {}


# What a repo holds


@route("GET /api/models/REPO(?:/revision/([^/]+))?")
def model_info(request: Handler, repo_id: str, revision: str | None) -> Reply:
    repo = request.repo(repo_id)
    commit = repo.commit(revision or "main")
    card = card_data(commit.files["README.md"].data.decode()) if "README.md" in commit.files else {}
    files = [{"rfilename": path} for path in sorted(commit.files)]
    info = {"id": repo.id, "sha": commit.oid, "private": repo.private, "gated": False, "downloads": 0, "likes": 0}
    return 200, {}, {**info, "tags": card.get("tags") or [], "cardData": card or None, "siblings": files}


@route("GET /api/models/REPO/tree/([^/]+)(?:/(.+))?")
def tree(request: Handler, repo_id: str, revision: str, folder: str | None) -> Reply:
    prefix, recursive = f"{folder}/" if folder else "", request.query.get("recursive", [""])[0].lower() == "true"
    entries: dict[str, dict[str, Any]] = {}
    for path, file in sorted(request.repo(repo_id).commit(revision).files.items()):
        if not path.startswith(prefix):
            continue
        slashes = [at for at, letter in enumerate(path) if letter == "/" and at > len(prefix)]
        for parent in [path[:at] for at in slashes[: None if recursive else 1]]:
            entries[parent] = {"type": "directory", "path": parent, "oid": "0" * 40, "size": 0}
        if recursive or not slashes:
            entries[path] = {"type": "file", "path": path, "oid": file.git_oid, "size": file.size}
            if file.sha256 is not None:
                entries[path]["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
            if file.xet_hash is not None:
                entries[path]["xetHash"] = file.xet_hash
    if folder and not entries:
        raise RefusalError(404, f"{folder} does not exist on {revision}", code="EntryNotFound")
    return 200, {}, list(entries.values())


@route("(?:GET|HEAD) /REPO/resolve/([^/]+)/(.+)")
def resolve(request: Handler, repo_id: str, revision: str, path: str) -> Reply:
    """Returns a file, or a redirect to the storage host."""
    commit = request.repo(repo_id).commit(revision)
    if path not in commit.files:
        status, headers, body = RefusalError(404, f"Entry not found: {path}", code="EntryNotFound").reply
        return status, {**headers, "X-Repo-Commit": commit.oid}, body
    file, headers = commit.files[path], {"X-Repo-Commit": commit.oid}
    if file.sha256 is None:
        return content_reply(request, file.data, {**headers, "ETag": f'"{file.git_oid}"'})
    headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
    headers["Location"] = f"{request.hub.storage}/{file.sha256}"
    if file.xet_hash is not None:
        token_url = f"{request.hub.endpoint}/api/models/{repo_id}/xet-read-token/{commit.oid}"
        headers |= {"X-Xet-Hash": file.xet_hash, "Link": f'<{token_url}>; rel="xet-auth"'}
    return 302, headers, b""


def content_reply(request: Handler, data: bytes, headers: dict[str, str]) -> Reply:
    """Returns the data, or the range that a client requests to resume a download."""
    if request.command == "HEAD":
        return 200, {**headers, "Content-Length": str(len(data))}, b""
    if match := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range") or ""):
        start = int(match[1])
        return 206, {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}, data[start:]
    return 200, headers, data


# Uploads


@route("POST /api/models/REPO/preupload/([^/]+)")
def preupload(request: Handler, repo_id: str, revision: str) -> Reply:
    files = request.repo(repo_id, write="create_pr" not in request.query).commit(revision).files
    answers = []
    for path in [asked["path"] for asked in request.json()["files"]]:
        large = request.hub.upload_mode != "regular" and path.endswith(".safetensors")
        large |= path.endswith(".parquet")  # which the Hub never takes as text
        known = {"oid": files[path].sha256 or files[path].git_oid} if path in files else {}
        answers.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **known})
    return 200, {}, {"files": answers}


@route("POST /REPO.git/info/lfs/objects/batch")
def lfs_batch(request: Handler, repo_id: str) -> Reply:
    """Returns upload addresses to all who may see the repo, since they may commit to a pull request."""
    request.repo(repo_id)
    request.known_user()
    answers = []
    for asked in request.json()["objects"]:
        upload = {"upload": {"href": f"{request.hub.storage}/{asked['oid']}"}}
        known = asked["oid"] in request.hub.objects
        answers.append({"oid": asked["oid"], "size": asked["size"]} | ({} if known else {"actions": upload}))
    return 200, {"Content-Type": "application/vnd.git-lfs+json"}, {"transfer": "basic", "objects": answers}


@route("(?:PUT|GET|HEAD) /_storage/([0-9a-f]{64})")
def storage(request: Handler, sha256: str) -> Reply:
    """Stores data that fits its address. The host has another name, so clients must not send it a token."""
    if request.command == "PUT":
        if hashlib.sha256(request.body).hexdigest() != sha256:
            raise RefusalError(400, "the content is not what its address says")
        request.hub.objects[sha256] = request.body
        return 200, {}, {}
    if sha256 not in request.hub.objects:
        raise RefusalError(404, "no such object")
    return content_reply(request, request.hub.objects[sha256], {})


@route("GET /api/models/REPO/xet-(read|write)-token/([^/]+)")
def xet_token(request: Handler, repo_id: str, access: str, revision: str) -> Reply:
    request.repo(repo_id)
    if access == "write":
        request.known_user()
    url, token, expires = f"local://{request.hub.xet_folder}", "xet-token", int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
    return 200, headers, {"casUrl": url, "accessToken": token, "exp": expires}


@route("POST /api/models/REPO/commit/([^/]+)")
def commit(request: Handler, repo_id: str, revision: str) -> Reply:
    """Commits all or nothing: the branch moves only if every line of the request is right."""
    create_pr = request.query.get("create_pr") == ["1"]
    repo, user = request.repo(repo_id, write=not create_pr), request.known_user()
    parent = repo.commit(revision)
    files, header = dict(parent.files), {}
    for line in [json.loads(line) for line in request.body.splitlines() if line.strip()]:
        kind, value = line["key"], line["value"]
        if kind == "header":
            header = value
        elif kind == "file":
            files[value["path"]] = File.regular(base64.b64decode(value["content"]))
        elif kind == "lfsFile":
            files[value["path"]] = request.hub.uploaded_file(value["oid"], value["size"])
        elif kind == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise RefusalError(404, "A file with this name doesn't exist", code="EntryNotFound")
        else:
            raise RefusalError(400, f"unknown key {kind}")
    if not header.get("summary"):
        raise RefusalError(400, "a commit needs a summary")
    if header.get("parentCommit") and header["parentCommit"] != parent.oid:
        raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
    branch, answer = revision, {}
    if create_pr:
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
        branch = f"refs/pr/{number}"
        answer["pullRequestUrl"] = f"{request.hub.endpoint}/{repo_id}/discussions/{number}"
        repo.branches[branch] = parent.oid
    elif revision not in repo.branches:
        raise RefusalError(400, f"{revision} is not a branch")
    made = repo.add_commit(branch, files, header["summary"], user)
    url = f"{request.hub.endpoint}/{repo_id}/commit/{made.oid}"
    return 200, {}, {**answer, "commitOid": made.oid, "commitUrl": url}


# Branches and tags


@route("GET /api/models/REPO/refs")
def refs(request: Handler, repo_id: str) -> Reply:
    repo = request.repo(repo_id)
    answer: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "pullRequests": [], "converts": []}
    for name, oid in repo.branches.items():
        pull_request = name.startswith("refs/pr/")
        ref = {"name": name, "ref": name if pull_request else f"refs/heads/{name}", "targetCommit": oid}
        answer["pullRequests" if pull_request else "branches"].append(ref)
    for name, oid in repo.tags.items():
        answer["tags"].append({"name": name, "ref": f"refs/tags/{name}", "targetCommit": oid})
    return 200, {}, answer


@route("GET /api/models/REPO/commits/([^/]+)")
def commits(request: Handler, repo_id: str, revision: str) -> Reply:
    rest = {"authors": [], "message": "", "date": "2026-01-01T00:00:00.000Z"}
    history = request.repo(repo_id).history(revision)
    return 200, {}, [{"id": each.oid, "title": each.title, **rest} for each in history]


@route("(?:POST|DELETE) /api/models/REPO/(tag|branch)/([^/]+)")
def tag_or_branch(request: Handler, repo_id: str, kind: str, name: str) -> Reply:
    """Creates a branch (name in the path, start in the body) or a tag (the other way round)."""
    repo, asked = request.repo(repo_id, write=True), request.json()
    names = repo.tags if kind == "tag" else repo.branches
    if request.command == "DELETE":
        if names.pop(name, None) is None:
            raise RefusalError(404, f"no {kind} {name}", code="RevisionNotFound")
        return 200, {}, {}
    new, start = (asked["tag"], name) if kind == "tag" else (name, asked.get("startingPoint", "main"))
    if new in names:
        raise RefusalError(409, f"{kind} {new} exists already")
    names[new] = repo.commit(start).oid
    return 200, {}, {}
