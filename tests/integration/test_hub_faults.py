"""Faults between a client and the Hub: a push lands whole or not at all, a pull is right or says what happened.

Afterwards the same call, without a fault, ends well: nothing is left behind that spoils it.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from robustness_tokens.hub.adapter_folder import ADAPTER_FILES
from robustness_tokens.report.writing import REPORT_FILE
from tests.support.hub_client import ClientError, HubClient
from tests.support.hub_state import Fault, Hub


ADAPTER = "alice/adapter"
FILES = set(ADAPTER_FILES) - {REPORT_FILE}
STATUSES = (429, 500, 503)
BROKEN = ("drop", "lose_reply", "cut_body")
FOREVER = 1000

# Of the package, of the Hub, of the connection; huggingface_hub makes a RuntimeError of an upload that failed.
ERRORS = {"ValueError", "OSError", "HTTPError", "RuntimeError"}


def outcome(client: HubClient, task: str, **kwargs: Any) -> Any:
    """Returns the result of a task; None if it failed with an error of these kinds and a message."""
    try:
        return client(task, **kwargs)
    except ClientError as exc:
        error = exc
    assert ERRORS & set(error.classes), error
    assert error.message.strip()
    return None


# Push


@pytest.fixture
def push_arguments(hub: Hub, base_folders: dict[str, Path], adapter_folder: Path) -> dict[str, Any]:
    hub.upload_mode = "lfs"
    hub.add_repo("alice/base", base_folders["dinov2"])
    return {"folder": str(adapter_folder), "repo_id": ADAPTER, "base_model_id": "alice/base", "xet": False}


PUSH_REQUESTS = {
    "base": "GET /api/models/alice/base",
    "create": "POST /api/repos/create",
    "visibility": "GET /api/models/alice/adapter",
    "files": "HEAD /alice/adapter/resolve/",
    "yaml": "POST /api/validate-yaml",
    "preupload": "POST .*/preupload/",
    "batch": "POST .*/lfs/objects/batch",
    "put": "PUT /_storage/",
    "commit": "POST .*/commit/",
}


def test_these_are_the_requests_of_a_push(hub: Hub, client: HubClient, push_arguments: dict[str, Any]) -> None:
    client("push", **push_arguments)
    known = [hub.received(pattern) for pattern in PUSH_REQUESTS.values()]
    assert all(known)
    assert [request for request in hub.requests if not any(request in requests for requests in known)] == []


FAST_PUSHES = {("put", 503), ("commit", 503)} | {(name, "lose_reply") for name in PUSH_REQUESTS}
PUSHES = [
    pytest.param(name, kind, times, marks=() if (name, kind) in FAST_PUSHES and times == 1 else pytest.mark.slow)
    for name in PUSH_REQUESTS
    for kind in (*STATUSES, *BROKEN)
    for times in (1, FOREVER)
]


@pytest.mark.parametrize(("name", "kind", "times"), PUSHES)
def test_push(hub: Hub, client: HubClient, push_arguments: dict[str, Any], name: str, kind: Any, times: int) -> None:
    hub.faults.append(Fault(PUSH_REQUESTS[name], kind, times))
    pushed = outcome(client, "push", **push_arguments)
    hub.faults.clear()
    landed = hub.repos[ADAPTER].history() if ADAPTER in hub.repos else []
    assert len(landed) == 1 or (pushed is None and not landed)
    again = client("push", **push_arguments)  # makes no commit if what landed is what it would push
    repo = hub.repos[ADAPTER]
    assert [commit.oid for commit in repo.history()] == [again["oid"]]
    assert pushed is None or again["oid"] == pushed["oid"]
    assert (repo.files(), repo.private) == (FILES, True)
    assert repo.commit().files["model.safetensors"].sha256 in hub.objects


def test_a_commit_in_between_is_not_overwritten(hub: Hub, client: HubClient, push_arguments: dict[str, Any]) -> None:
    hub.faults.append(Fault(PUSH_REQUESTS["commit"], "race"))
    with pytest.raises(ClientError, match="A commit has happened since"):
        client("push", **push_arguments)
    repo = hub.repos[ADAPTER]
    assert repo.files() == {"race.txt"}
    client("push", **push_arguments)
    assert repo.files() == FILES | {"race.txt"}
    assert len(repo.history()) == 2


def test_a_card_that_came_altered_is_not_pushed_back(
    hub: Hub, client: HubClient, push_arguments: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text("# Mine\n\nWords of a person.\n")
    repo = hub.add_repo(ADAPTER, tmp_path)
    hub.faults.append(Fault("GET /alice/adapter/resolve/.*README", "alter"))
    with pytest.raises(ClientError, match=r"nothing was pushed.*README\.md came damaged"):
        client("push", **push_arguments)
    assert len(repo.history()) == 1
    client("push", **push_arguments)
    assert b"Words of a person." in repo.commit().files["README.md"].data


# Pull


PULL_REQUESTS = {
    "info": "GET /api/models/alice/adapter",
    "head": "HEAD /alice/adapter/resolve/",
    "config": "GET /alice/adapter/resolve/.*/config.json",
    "redirect": "GET /alice/adapter/resolve/.*/model.safetensors",
    "storage": "GET /_storage/",
}
FAST_PULLS = {("config", "cut_body"), ("config", "truncate"), ("config", "alter")} | {
    ("storage", kind) for kind in (503, "drop", "cut_body", "truncate", "alter", "stall")
}
PULLS = [
    pytest.param(name, kind, times, marks=() if (name, kind) in FAST_PULLS and times == 1 else pytest.mark.slow)
    for name in PULL_REQUESTS
    for kind in (*STATUSES, *BROKEN, "truncate", "alter", "stall")
    for times in (1, FOREVER)
]


@pytest.fixture
def adapter(hub: Hub, adapter_folder: Path) -> Path:
    hub.upload_mode = "lfs"
    hub.add_repo(ADAPTER, adapter_folder)
    return adapter_folder


@pytest.mark.parametrize(("name", "kind", "times"), PULLS)
def test_pull(hub: Hub, client: HubClient, adapter: Path, name: str, kind: Any, times: int) -> None:
    """The fault is there, then it is gone; nobody says force_download=True."""
    expected = {path.name: path.read_bytes().hex() for path in adapter.iterdir()}
    hub.faults.append(Fault(PULL_REQUESTS[name], kind, times))
    pulled = outcome(client, "fetch", repo_id=ADAPTER)
    assert pulled is None or {file: pulled[file] for file in expected} == expected
    hub.faults.clear()
    again = client("fetch", repo_id=ADAPTER)
    assert {file: again[file] for file in expected} == expected
    assert not list(client.home.rglob("*.incomplete"))
    assert client("fetch", repo_id=ADAPTER, local_files_only=True) == again


def test_a_file_altered_in_the_cache(
    hub: Hub, client: HubClient, push_arguments: dict[str, Any], upload_mode: str
) -> None:
    """Bytes that rot on the disk, and no network: an error, and the next pull repairs it."""
    hub.upload_mode, xet = upload_mode, upload_mode == "xet"  # type: ignore[assignment]
    client("push", **{**push_arguments, "xet": xet})
    client.wipe_cache()
    good = client("fetch", repo_id=ADAPTER, xet=xet)
    content = (Path(push_arguments["folder"]) / "model.safetensors").read_bytes()
    files = [path for path in client.home.rglob("*") if path.is_file() and not path.is_symlink()]
    (blob,) = [path for path in files if path.read_bytes() == content]
    blob.chmod(0o644)
    blob.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(ClientError, match=r"model\.safetensors") as caught:
        client("fetch", repo_id=ADAPTER, local_files_only=True)
    assert caught.value.classes[0] == "ValueError"
    assert client("fetch", repo_id=ADAPTER, xet=xet) == good
    assert client("fetch", repo_id=ADAPTER, local_files_only=True) == good


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        ("GET /_storage/", "cut_body"),
        ("GET /_storage/", "truncate"),
        ("GET /_storage/", "drop"),
        ("GET /alice/base/resolve/.*/config.json", "truncate"),
        pytest.param("GET /alice/base/resolve/.*/config.json", 500, marks=pytest.mark.slow),
        pytest.param("GET /_storage/", 500, marks=pytest.mark.slow),
    ],
)
def test_pull_of_the_base(
    hub: Hub,
    client: HubClient,
    push_arguments: dict[str, Any],
    base_folders: dict[str, Path],
    pattern: str,
    kind: Any,
) -> None:
    client("push", **push_arguments)
    expected = client("load", adapter=ADAPTER, token="hf_alice", base_model=str(base_folders["dinov2"]))
    hub.faults.append(Fault(pattern, kind))  # of the adapter nothing is left to download
    loaded = outcome(client, "load", adapter=ADAPTER, token="hf_alice")
    assert loaded in (None, expected)
    assert not hub.faults
    assert client("load", adapter=ADAPTER, token="hf_alice") == expected


# The command line


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("commit", 503, "robtok: Server error '503 Service Unavailable' for url '.*/alice/adapter/commit/main'"),
        ("commit", "drop", "robtok: the connection broke while pushing to alice/adapter: push again"),
        ("put", 500, "robtok: nothing was pushed to alice/adapter, push again: .*500"),
    ],
)
def test_robtok_says_what_happened(
    hub: Hub, client: HubClient, push_arguments: dict[str, Any], name: str, kind: Any, message: str
) -> None:
    """One line, no traceback."""
    hub.faults.append(Fault(PUSH_REQUESTS[name], kind, FOREVER))
    arguments = ["push", push_arguments["folder"], ADAPTER, "--base-model-id", "alice/base"]
    status, output = client("robtok", arguments=arguments, token="hf_alice", xet=False)
    assert status == 1
    assert re.search(message, output, flags=re.DOTALL)
    assert "Traceback" not in output
