"""The model hub on loopback: what `huggingface_hub` asks for to download a snapshot, make a repository and commit."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

from tests.loopback_site import Request, Site

_TOKEN = "hf_test"  # the only login there is


class Hub(Site):
    """Repositories by name, each as commits of {path: content}, the newest last."""

    def __init__(self) -> None:
        super().__init__()
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: dict[str, bool] = {}
        self.stored: dict[str, bytes] = {}
        self.lies: dict[str, bytes] = {}  # content that is sent in place of what is stated
        self.default = self.answer

    def commit(self, repo: str, files: dict[str, bytes], *, private: bool = False) -> str:
        commits = self.repos.setdefault(repo, [])
        self.private.setdefault(repo, private)
        sha = hashlib.sha1(f"{repo}{len(commits)}".encode()).hexdigest()
        commits.append((sha, {**(commits[-1][1] if commits else {}), **files}))
        return sha

    def answer(self, request: Request) -> None:
        path = unquote(request.path.partition("?")[0])
        for pattern, route in _ROUTES:
            if found := re.fullmatch(pattern, path):
                route(self, request, *found.groups())
                return
        reply(request, {"error": "not found"}, 404)

    def files(self, request: Request, repo: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repos.get(repo)
        if commits is None or (self.private[repo] and not logged_in(request)):
            reply(request, {"error": "no repo"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        if revision in (None, "main"):
            return commits[-1]
        found = next((commit for commit in commits if commit[0] == revision), None)
        if found is None:
            reply(request, {"error": "no revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        return found


def reply(request: Request, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
    request.send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})


def logged_in(request: Request) -> bool:
    return request.headers.get("Authorization") == f"Bearer {_TOKEN}"


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def lfs(name: str, data: bytes) -> dict[str, Any]:
    sha256 = hashlib.sha256(data).hexdigest()
    return {"lfs": {"sha256": sha256, "oid": sha256, "size": len(data), "pointerSize": 130}} if is_lfs(name) else {}


def info(hub: Hub, request: Request, repo: str, revision: str | None = None) -> None:
    if (found := hub.files(request, repo, revision)) is not None:
        siblings = [{"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest(), **lfs(name, data)}
                    for name, data in found[1].items()]  # fmt: skip
        reply(request, {"id": repo, "sha": found[0], "private": hub.private[repo], "siblings": siblings, "tags": []})


def tree(hub: Hub, request: Request, repo: str, revision: str) -> None:
    if (found := hub.files(request, repo, revision)) is not None:
        reply(request, [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest(),
                         **lfs(name, data)} for name, data in found[1].items()])  # fmt: skip


def resolve(hub: Hub, request: Request, repo: str, revision: str, name: str) -> None:
    if (found := hub.files(request, repo, revision)) is None:
        return
    if name not in found[1]:
        reply(request, {"error": "no entry"}, 404, {"X-Error-Code": "EntryNotFound"})
        return
    data = hub.lies.get(name, found[1][name])
    etag = hashlib.sha256(data).hexdigest() if is_lfs(name) else hashlib.sha1(data).hexdigest()
    request.send(data, 200, {"X-Repo-Commit": found[0], "ETag": f'"{etag}"'})


def create(hub: Hub, request: Request) -> None:
    if not logged_in(request):
        reply(request, {"error": "Invalid username or password."}, 401)
        return
    asked = json.loads(request.body)
    repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
    status = 409 if repo in hub.repos else 200
    if repo not in hub.repos:
        hub.repos[repo], hub.private[repo] = [("0" * 40, {".gitattributes": b""})], asked.get("visibility") == "private"
    reply(request, {"url": f"{hub.url}/{repo}", "name": repo, "error": "exists"}, status)


def preupload(hub: Hub, request: Request, repo: str) -> None:
    files = json.loads(request.body)["files"]
    modes = [{"path": file["path"], "uploadMode": "lfs" if is_lfs(file["path"]) else "regular", "shouldIgnore": False}
             for file in files]  # fmt: skip
    reply(request, {"files": modes})


def batch(hub: Hub, request: Request, repo: str) -> None:
    asked = json.loads(request.body)["objects"]
    to = {item["oid"]: {"upload": {"href": f"{hub.url}/store/{item['oid']}"}} for item in asked}
    objects = [{"oid": item["oid"], "size": item["size"], "actions": to[item["oid"]]} for item in asked]
    kind = {"Content-Type": "application/vnd.git-lfs+json"}
    reply(request, {"transfer": "basic", "objects": objects}, 200, kind)


def store(hub: Hub, request: Request, oid: str) -> None:
    right = hashlib.sha256(request.body).hexdigest() == oid
    if right:
        hub.stored[oid] = request.body
    request.send(b"", 200 if right else 400)


def make_commit(hub: Hub, request: Request, repo: str) -> None:
    if not logged_in(request):
        reply(request, {"error": "forbidden"}, 403)
        return
    files: dict[str, bytes] = {}
    for line in request.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif item["key"] == "lfsFile":
            files[value["path"]] = hub.stored[value["oid"]]
    sha = hub.commit(repo, files)
    reply(request, {"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{repo}/commit/{sha}"})


def validate(hub: Hub, request: Request) -> None:
    reply(request, {"errors": [], "warnings": []})


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    (r"/api/repos/create", create),
    (r"/api/validate-yaml", validate),
    (rf"/api/models/{_REPO}", info),
    (rf"/api/models/{_REPO}/revision/(.+)", info),
    (rf"/api/models/{_REPO}/tree/([^/]+)/?", tree),
    (rf"/api/models/{_REPO}/preupload/main", preupload),
    (rf"/api/models/{_REPO}/commit/main", make_commit),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", batch),
    (r"/store/(\w+)", store),
    (rf"/{_REPO}/resolve/([^/]+)/(.+)", resolve),
)


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
