"""What a small Hugging Face Hub answers: repositories, commits, LFS, revisions, private repositories; all in memory.

It knows as much of the Hub's HTTP API as the real client needs to create, push, list and load models and data sets.
How requests arrive, and how they go wrong on demand, is in `hub_server.py`.

Source: what huggingface_hub 2.4 sends and reads in `hf_api.py`, `_commit_api.py`, `lfs.py` and `file_download.py`.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote

# Who may write where: token → namespace. Reading a private repository takes a token of its namespace.
TOKENS = {"hf_owner": "org", "hf_stranger": "stranger"}
LFS_SUFFIXES = (".safetensors", ".parquet", ".arrow", ".bin", ".png")
LFS_BYTES = 1_000_000

Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits by sha, each the whole of its files, and the branches that point to them."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        """Put a commit on a branch and return its sha."""
        sha = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


@dataclass
class HubState:
    """Everything the Hub remembers: repositories by "models/org/name" or "datasets/org/name", LFS objects by sha256."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: Files = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What came in; `query` holds the last value of each name."""

    state: HubState
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON; nothing is an empty dictionary."""
        return json.loads(self.body or b"{}")


@dataclass(frozen=True)
class Answer:
    """What goes out."""

    status: int = 200
    content: bytes = b"{}"
    headers: Mapping[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer that is no success: status, the Hub's words, and its error code."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


def respond(request: Request) -> Answer:
    """Return the answer of the function that `ROUTES` names for the request."""
    try:
        for pattern, function in ROUTES.items():
            if match := re.fullmatch(pattern, f"{request.method} {request.path}"):
                answer = function(request, **{k: unquote(v) for k, v in match.groupdict().items() if v is not None})
                return answer if isinstance(answer, Answer) else Answer(content=json.dumps(answer).encode())
        raise Refusal(404, f"no such address: {request.method} {request.path}")
    except Refusal as refusal:
        headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
        return Answer(refusal.status, json.dumps({"error": str(refusal)}).encode(), headers)


# --- who may do what


def namespace_of(request: Request) -> str | None:
    """Return the namespace of the request's token, or None without a token."""
    token = request.headers.get("Authorization", "").removeprefix("Bearer ")
    if token and token not in TOKENS:
        raise Refusal(401, "Invalid username or password.")
    return TOKENS.get(token)


def find(request: Request, kind: str, repo_id: str, *, write: bool = False) -> Repository:
    """Return a repository that the request may read, or write; strangers are told that a private one does not exist."""
    namespace, repository = namespace_of(request), request.state.repositories.get(f"{kind}/{repo_id}")
    owner = namespace == repo_id.split("/")[0]
    if repository is None or (repository.private and not owner):
        raise Refusal(401 if namespace is None else 404, "Repository not found", "RepoNotFound")
    if write and not owner:
        raise Refusal(401 if namespace is None else 403, f"You have no write access to {repo_id}")
    return repository


def at(repository: Repository, revision: str) -> tuple[str, Files]:
    """Return the sha and the files of a branch or commit."""
    sha = repository.branches.get(revision, revision)
    if sha not in repository.commits:
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return sha, repository.commits[sha]


# --- repositories


def create(request: Request) -> Any:
    """Make a repository with one almost empty commit on main."""
    asked, namespace = request.json, namespace_of(request)
    if namespace is None:
        raise Refusal(401, "Invalid username or password.")
    owner = asked["organization"] or namespace
    key = f"{asked.get('type') or 'model'}s/{owner}/{asked['name']}"
    url = f"{request.state.url}/{key.removeprefix('models/')}"
    if owner != namespace:
        raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
    if key in request.state.repositories:
        return Answer(409, json.dumps({"error": "You already created this repo", "url": url}).encode())
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    repository = request.state.repositories[key] = Repository(private)
    repository.commit("main", {".gitattributes": b""})
    return {"url": url}


def validate(request: Request) -> Any:
    """Ask of a README only that it opens with metadata."""
    if not request.json["content"].startswith("---\n"):
        return Answer(400, b'{"errors": [{"message": "empty or missing yaml metadata"}]}')
    return {"errors": [], "warnings": []}


def info(request: Request, kind: str, id: str, revision: str = "main") -> Any:
    """Describe a repository at a revision."""
    repository = find(request, kind, id)
    sha, files = at(repository, revision)
    config = json.loads(files.get("config.json", b"{}"))
    described = {"config": {"model_type": config["model_type"]}} if "model_type" in config else {}
    siblings = [{"rfilename": path} for path in sorted(files)]
    return described | {"id": id, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []}


def may_write(request: Request, kind: str, id: str) -> Any:
    """Say whether the token may write there."""
    find(request, kind, id, write=True)
    return {}


def refs(request: Request, kind: str, id: str) -> Any:
    """List the branches."""
    branches = find(request, kind, id).branches.items()
    listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
    return {"branches": listed, "converts": [], "tags": []}


def branch(request: Request, kind: str, id: str, revision: str) -> Any:
    """Make a branch from main, or from the starting point asked."""
    repository = find(request, kind, id, write=True)
    if revision in repository.branches:
        raise Refusal(409, "Reference already exists")
    repository.branches[revision] = at(repository, request.json.get("startingPoint", "main"))[0]
    return {}


# --- reading files


def tree(request: Request, kind: str, id: str, revision: str, path: str = "") -> Any:
    """List files, and folders where the listing is not recursive."""
    files = at(find(request, kind, id), revision)[1]
    prefix = f"{path.rstrip('/')}/" if path else ""
    below = {name[len(prefix) :]: content for name, content in files.items() if name.startswith(prefix)}
    if path and not below:
        raise Refusal(404, f"{path} does not exist", "EntryNotFound")
    recursive = request.query.get("recursive", "").lower() in {"1", "true"}
    listed = [describe(prefix + name, content) for name, content in below.items() if recursive or "/" not in name]
    folders = sorted({prefix + name.split("/")[0] for name in below if "/" in name})
    return listed + [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in folders]


def paths_info(request: Request, kind: str, id: str, revision: str) -> Any:
    """Describe the paths asked that exist."""
    files = at(find(request, kind, id), revision)[1]
    asked = parse_qs(request.body.decode()).get("paths", [])
    return [describe(path, files[path]) for path in asked if path in files]


def resolve(request: Request, id: str, revision: str, path: str, kind: str = "models/") -> Answer:
    """Send a file, or the range of it that is asked."""
    sha, files = at(find(request, kind.rstrip("/"), id), revision)
    if path not in files:
        raise Refusal(404, f"{path} does not exist at {revision}", "EntryNotFound")
    content, oid = files[path], oid_of(path, files[path])
    headers = {"X-Repo-Commit": sha, "ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
    headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))} if in_lfs(path, len(content)) else {}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if not asked:
        return Answer(200, content, headers)
    start = int(asked[1]) if asked[1] else max(len(content) - int(asked[2]), 0)
    stop = min(int(asked[2]) + 1, len(content)) if asked[1] and asked[2] else len(content)
    if start >= len(content):
        return Answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
    return Answer(206, content[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})


# --- writing files


def preupload(request: Request, kind: str, id: str, revision: str) -> Any:
    """Say of each file how it is to be sent, and what is there already."""
    files = at(find(request, kind, id, write=True), revision)[1]
    answer = []
    for asked in request.json["files"]:
        path, mode = asked["path"], "lfs" if in_lfs(asked["path"], asked["size"]) else "regular"
        oid = oid_of(path, files[path]) if path in files else None
        answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return {"files": answer}


def lfs_batch(request: Request, id: str, kind: str = "models/") -> Any:
    """Say where each object goes; one that is here needs no sending."""
    find(request, kind.rstrip("/"), id, write=True)
    objects = request.json["objects"]
    for asked in objects:
        if asked["oid"] not in request.state.blobs:
            target, verify = f"{request.state.url}/lfs/{asked['oid']}", f"{request.state.url}/lfs/verify"
            asked["actions"] = {"upload": {"href": target}, "verify": {"href": verify}}
    return {"transfer": "basic", "objects": objects}


def lfs_put(request: Request, oid: str) -> Any:
    """Keep an object if it is what its name says."""
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refusal(400, "the content does not match its sha256")
    request.state.blobs[oid] = request.body
    return {}


def lfs_verify(request: Request) -> Any:
    """Confirm an object's size."""
    if len(request.state.blobs.get(request.json["oid"], b"")) != request.json["size"]:
        raise Refusal(404, "no such object")
    return {}


def commit(request: Request, kind: str, id: str, revision: str) -> Any:
    """Apply the operations of an ndjson commit, all or none."""
    repository = find(request, kind, id, write=True)
    files = dict(at(repository, revision)[1])
    for operation in map(json.loads, request.body.decode().splitlines()):
        key, value = operation["key"], operation["value"]
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in request.state.blobs:
                raise Refusal(400, f"{value['path']} was not uploaded")
            files[value["path"]] = request.state.blobs[value["oid"]]
        elif key == "deletedFile":
            files.pop(value["path"])
        elif key == "deletedFolder":
            files = {path: kept for path, kept in files.items() if not path.startswith(value["path"].rstrip("/") + "/")}
    sha = repository.commit(revision, files)
    return {"commitUrl": f"{request.state.url}/{id}/commit/{sha}", "commitOid": sha}


def in_lfs(path: str, size: int) -> bool:
    """Return whether the Hub keeps such a file in LFS."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_BYTES)


def git_oid(content: bytes) -> str:
    """Return the name git gives to a blob."""
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


def oid_of(path: str, content: bytes) -> str:
    """Return what the Hub calls a file's content: sha256 in LFS, git's name otherwise."""
    return hashlib.sha256(content).hexdigest() if in_lfs(path, len(content)) else git_oid(content)


def describe(path: str, content: bytes) -> dict[str, Any]:
    """Return a file as listings show it."""
    size = len(content)
    lfs = {"lfs": {"oid": oid_of(path, content), "size": size, "pointerSize": 130}} if in_lfs(path, size) else {}
    return {"type": "file", "path": path, "oid": git_oid(content), "size": size} | lfs


_API = r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"
_GIT = r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+?)"
ROUTES = {
    r"POST /api/repos/create": create,
    r"POST /api/validate-yaml": validate,
    rf"GET {_API}(/revision/(?P<revision>.+))?": info,
    rf"GET {_API}/auth-check/write": may_write,
    rf"GET {_API}/refs": refs,
    rf"POST {_API}/branch/(?P<revision>.+)": branch,
    rf"GET {_API}/tree/(?P<revision>[^/]+)(/(?P<path>.*))?": tree,
    rf"POST {_API}/paths-info/(?P<revision>[^/]+)": paths_info,
    rf"POST {_API}/preupload/(?P<revision>.+)": preupload,
    rf"POST {_API}/commit/(?P<revision>.+)": commit,
    rf"POST {_GIT}\.git/info/lfs/objects/batch": lfs_batch,
    r"PUT /lfs/(?P<oid>\w+)": lfs_put,
    r"POST /lfs/verify": lfs_verify,
    rf"(GET|HEAD) {_GIT}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": resolve,
}
