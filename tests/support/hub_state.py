"""The state of the tests' Hub: repos, objects of the storage host, received requests, and faults to come."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal


UploadMode = Literal["regular", "lfs", "xet"]
FaultKind = int | Literal["drop", "lose_reply", "cut_body", "truncate", "alter", "stall", "race"]
Reply = tuple[int, dict[str, str], Any]  # status, headers, JSON or bytes


@dataclass(frozen=True)
class Fault:
    """A fault in the next requests of a kind.

    Attributes:
        request: Regular expression for `METHOD /path`.
        kind: A status to answer with, the request not handled; or
            "drop": the connection is closed, the request not handled;
            "lose_reply": handled, then closed before any answer; "cut_body": closed in mid-body;
            "truncate": half a body that claims to be whole; "alter": a body of the right length with one byte wrong;
            "stall": handled, but the body comes too late;
            "race": handled, but another commit lands on every main branch just before.
        times: Number of requests that it hits.
    """

    request: str
    kind: FaultKind
    times: int = 1


@dataclass(frozen=True)
class Request:
    """A request, and the status of the answer (None if there was none)."""

    method: str
    path: str
    host: str
    token: str | None
    body: bytes
    status: int | None

    def json_lines(self) -> list[dict[str, Any]]:
        """Returns the lines of a commit."""
        return [json.loads(line) for line in self.body.splitlines() if line.strip()]


@dataclass(frozen=True)
class File:
    """A file in a commit: its data if it is regular, else the sha256 of its data and its Xet hash."""

    git_oid: str
    size: int
    data: bytes = b""
    sha256: str | None = None
    xet_hash: str | None = None

    @classmethod
    def regular(cls, data: bytes) -> File:
        return cls(hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), len(data), data)

    @classmethod
    def large(cls, sha256: str, size: int, xet_hash: str | None) -> File:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return cls(cls.regular(pointer.encode()).git_oid, size, sha256=sha256, xet_hash=xet_hash)


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    author: str
    files: dict[str, File]


class Repo:
    """A model's history: branches (pull requests among them) and tags name commits."""

    def __init__(self, repo_id: str, *, private: bool) -> None:
        self.id, self.owner, self.private = repo_id, repo_id.split("/")[0], private
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.commits: dict[str, Commit] = {}
        self.add_commit("main", {".gitattributes": File.regular(b"*.safetensors filter=lfs\n")}, "initial", self.owner)

    def add_commit(self, branch: str, files: dict[str, File], title: str, author: str) -> Commit:
        parent = self.branches.get(branch)
        name = f"{self.id} {branch} {len(self.commits)} {time.time_ns()}"
        commit = Commit(hashlib.sha1(name.encode()).hexdigest(), parent, title, author, files)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit

    def commit(self, revision: str = "main") -> Commit:
        """Returns the commit that a branch, a tag or a full oid names."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise RefusalError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str = "main") -> list[Commit]:
        """Returns a revision's commits, newest first, without the initial one, which the Hub makes."""
        commits = [self.commit(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits[:-1]

    def files(self, revision: str = "main") -> set[str]:
        """Returns the names of a revision's files, without the one that the Hub makes."""
        return set(self.commit(revision).files) - {".gitattributes"}


class RefusalError(Exception):
    """An error answer of the Hub; its code tells the client the kind."""

    def __init__(self, status: int, message: str, *, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply: Reply = (status, headers, {"error": message, **body})


class Hub:
    """The state that the handlers share."""

    def __init__(self, folder: Path) -> None:
        self.upload_mode: UploadMode = "regular"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # sha256 -> content: the storage host
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.stall_seconds = 2.5  # more than the client's HF_HUB_DOWNLOAD_TIMEOUT
        self.xet_folder = folder
        self.lock = threading.RLock()
        self.endpoint = self.storage = ""  # URLs of the Hub and of its storage host

    def reset(self, upload_mode: UploadMode = "regular") -> None:
        """Forgets everything."""
        self.upload_mode = upload_mode
        for state in (self.repos, self.objects, self.requests, self.faults):
            state.clear()

    def add_repo(self, repo_id: str, folder: Path, *, private: bool = True) -> Repo:
        """Adds a repo with a folder's files in one commit, without a client; not for Xet."""
        repo = self.repos[repo_id] = Repo(repo_id, private=private)
        files = {path.name: File.regular(path.read_bytes()) for path in folder.iterdir() if path.is_file()}
        if self.upload_mode == "lfs":
            for name in [name for name in files if name.endswith(".safetensors")]:
                data = files[name].data
                sha256 = hashlib.sha256(data).hexdigest()
                self.objects[sha256] = data
                files[name] = File.large(sha256, len(data), None)
        repo.add_commit("main", files, "files", repo.owner)
        return repo

    def received(self, pattern: str) -> list[Request]:
        """Returns the requests with a `METHOD /path` that begins with a match of the pattern."""
        return [request for request in self.requests if re.match(pattern, f"{request.method} {request.path}")]

    def take_fault(self, request: str) -> FaultKind | None:
        """Returns the fault of a request, `METHOD /path`, if it has one."""
        with self.lock:
            for index, fault in enumerate(self.faults):
                if re.match(fault.request, request):
                    left = [replace(fault, times=fault.times - 1)] if fault.times > 1 else []
                    self.faults[index : index + 1] = left
                    return fault.kind
        return None

    def commit_in_between(self) -> None:
        """Commits to each main branch, as somebody else."""
        for repo in self.repos.values():
            repo.add_commit("main", {**repo.commit().files, "race.txt": File.regular(b"")}, "race", repo.owner)

    def uploaded_file(self, sha256: str, size: int) -> File:
        """Returns a large file that was uploaded by LFS or Xet before the commit that names it."""
        if sha256 in self.objects:
            return File.large(sha256, len(self.objects[sha256]), None)
        xet_hash = self.xet_hash(sha256)
        if xet_hash is None:
            raise RefusalError(400, f"object {sha256} was not uploaded")
        return File.large(sha256, size, xet_hash)

    def xet_hash(self, sha256: str) -> str | None:
        """Returns a file's Xet hash from the shards that hf_xet wrote beside its content; None if it is in none.

        A shard is a header of 48 bytes, then for each file an entry (hash, flags, number of segments), its segments,
        and if the flags say so verifications and the sha256, all in records of 48 bytes; a hash of ones ends the list.
        """
        for path in self.xet_folder.rglob("*.mdb"):
            shard, at = path.read_bytes(), 48
            while shard[at : at + 32] != b"\xff" * 32 and at + 48 <= len(shard):
                file_hash, (flags, segments) = shard[at : at + 32], struct.unpack_from("<2I", shard, at + 32)
                at += 48 + 48 * segments * (2 if flags & 1 << 31 else 1)
                if flags & 1 << 30:
                    if _hash_text(shard[at : at + 32]) == sha256:
                        return _hash_text(file_hash)
                    at += 48
        return None


def _hash_text(hash_bytes: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", hash_bytes))
