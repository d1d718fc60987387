"""Answer the requests of a small Hugging Face Hub, in memory: repositories, commits, LFS, revisions, private access.

It implements the part of the Hub's HTTP API that `huggingface_hub` needs to create, push, list and load models and
data sets. `hub_server.py` serves it over HTTP, and injects faults.

Source: the requests and answers in huggingface_hub 2.4, `hf_api.py`, `_commit_api.py`, `lfs.py` and `file_download.py`.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote

# Token → namespace that it can write to. Private repositories can only be read with a token of their namespace.
TOKENS = {"hf_owner": "org", "hf_stranger": "stranger"}
LFS_SUFFIXES = (".safetensors", ".parquet", ".arrow", ".bin", ".png")
LFS_BYTES = 1_000_000

Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits by sha, each with all its files, and the branches that point to them."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        """Add a commit to a branch and return its sha."""
        sha = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


@dataclass
class HubState:
    """The state of the Hub: repositories by "models/org/name" or "datasets/org/name", LFS objects by sha256."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: Files = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """An HTTP request; `query` holds the last value of each name."""

    state: HubState
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON; an empty body gives an empty dictionary."""
        return json.loads(self.body or b"{}")


@dataclass(frozen=True)
class Answer:
    """An HTTP response."""

    status: int = 200
    content: bytes = b"{}"
    headers: Mapping[str, str] = field(default_factory=dict)


class Rejection(Exception):
    """An error response: status, message, and the Hub's error code."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


def respond(request: Request) -> Answer:
    """Answer a request with the function that `ROUTES` lists for it."""
    try:
        for pattern, function in ROUTES.items():
            if match := re.fullmatch(pattern, f"{request.method} {request.path}"):
                answer = function(request, **{k: unquote(v) for k, v in match.groupdict().items() if v is not None})
                return answer if isinstance(answer, Answer) else Answer(content=json.dumps(answer).encode())
        raise Rejection(404, f"no such address: {request.method} {request.path}")
    except Rejection as rejection:
        headers = {"X-Error-Code": rejection.code, "X-Error-Message": str(rejection)}
        return Answer(rejection.status, json.dumps({"error": str(rejection)}).encode(), headers)


# --- access


def namespace_of(request: Request) -> str | None:
    """Return the namespace of the request's token, or None without a token."""
    token = request.headers.get("Authorization", "").removeprefix("Bearer ")
    if token and token not in TOKENS:
        raise Rejection(401, "Invalid username or password.")
    return TOKENS.get(token)


def find(request: Request, kind: str, repo_id: str, *, write: bool = False) -> Repository:
    """Return a repository that the request can read or write; private ones are reported to others as not found."""
    namespace, repository = namespace_of(request), request.state.repositories.get(f"{kind}/{repo_id}")
    owner = namespace == repo_id.split("/")[0]
    if repository is None or (repository.private and not owner):
        raise Rejection(401 if namespace is None else 404, "Repository not found", "RepoNotFound")
    if write and not owner:
        raise Rejection(401 if namespace is None else 403, f"You have no write access to {repo_id}")
    return repository


def at(repository: Repository, revision: str) -> tuple[str, Files]:
    """Return the sha and the files of a branch or commit."""
    sha = repository.branches.get(revision, revision)
    if sha not in repository.commits:
        raise Rejection(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return sha, repository.commits[sha]


# --- repositories


def create(request: Request) -> Any:
    """Create a repository with one commit on main that holds .gitattributes only."""
    requested, namespace = request.json, namespace_of(request)
    if namespace is None:
        raise Rejection(401, "Invalid username or password.")
    owner = requested["organization"] or namespace
    key = f"{requested.get('type') or 'model'}s/{owner}/{requested['name']}"
    url = f"{request.state.url}/{key.removeprefix('models/')}"
    if owner != namespace:
        raise Rejection(403, f"You don't have the rights to create a model under the namespace {owner!r}")
    if key in request.state.repositories:
        return Answer(409, json.dumps({"error": "You already created this repo", "url": url}).encode())
    private = requested.get("visibility") == "private" or bool(requested.get("private"))
    repository = request.state.repositories[key] = Repository(private)
    repository.commit("main", {".gitattributes": b""})
    return {"url": url}


def validate(request: Request) -> Any:
    """Check that a README starts with metadata."""
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


def check_write_access(request: Request, kind: str, id: str) -> Any:
    """Check that the token has write access."""
    find(request, kind, id, write=True)
    return {}


def refs(request: Request, kind: str, id: str) -> Any:
    """List the branches."""
    branches = find(request, kind, id).branches.items()
    listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
    return {"branches": listed, "converts": [], "tags": []}


def branch(request: Request, kind: str, id: str, revision: str) -> Any:
    """Create a branch from main, or from the requested starting point."""
    repository = find(request, kind, id, write=True)
    if revision in repository.branches:
        raise Rejection(409, "Reference already exists")
    repository.branches[revision] = at(repository, request.json.get("startingPoint", "main"))[0]
    return {}


# --- reading files


def tree(request: Request, kind: str, id: str, revision: str, path: str = "") -> Any:
    """List files, and also folders if the listing is not recursive."""
    files = at(find(request, kind, id), revision)[1]
    prefix = f"{path.rstrip('/')}/" if path else ""
    below = {name[len(prefix) :]: content for name, content in files.items() if name.startswith(prefix)}
    if path and not below:
        raise Rejection(404, f"{path} does not exist", "EntryNotFound")
    recursive = request.query.get("recursive", "").lower() in {"1", "true"}
    listed = [describe(prefix + name, content) for name, content in below.items() if recursive or "/" not in name]
    folders = sorted({prefix + name.split("/")[0] for name in below if "/" in name})
    return listed + [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in folders]


def paths_info(request: Request, kind: str, id: str, revision: str) -> Any:
    """Describe the requested paths that exist."""
    files = at(find(request, kind, id), revision)[1]
    requested = parse_qs(request.body.decode()).get("paths", [])
    return [describe(path, files[path]) for path in requested if path in files]


def resolve(request: Request, id: str, revision: str, path: str, kind: str = "models/") -> Answer:
    """Send a file, or the requested range of it."""
    sha, files = at(find(request, kind.rstrip("/"), id), revision)
    if path not in files:
        raise Rejection(404, f"{path} does not exist at {revision}", "EntryNotFound")
    content, oid = files[path], oid_of(path, files[path])
    headers = {"X-Repo-Commit": sha, "ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
    headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))} if in_lfs(path, len(content)) else {}
    span = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if not span:
        return Answer(200, content, headers)
    start = int(span[1]) if span[1] else max(len(content) - int(span[2]), 0)
    stop = min(int(span[2]) + 1, len(content)) if span[1] and span[2] else len(content)
    if start >= len(content):
        return Answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
    return Answer(206, content[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})


# --- writing files


def preupload(request: Request, kind: str, id: str, revision: str) -> Any:
    """State for each file how to upload it, and which version is stored already."""
    files = at(find(request, kind, id, write=True), revision)[1]
    answer = []
    for file in request.json["files"]:
        path, mode = file["path"], "lfs" if in_lfs(file["path"], file["size"]) else "regular"
        oid = oid_of(path, files[path]) if path in files else None
        answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return {"files": answer}


def lfs_batch(request: Request, id: str, kind: str = "models/") -> Any:
    """State where to upload each object; stored objects need no upload."""
    find(request, kind.rstrip("/"), id, write=True)
    objects = request.json["objects"]
    for item in objects:
        if item["oid"] not in request.state.blobs:
            target, verify = f"{request.state.url}/lfs/{item['oid']}", f"{request.state.url}/lfs/verify"
            item["actions"] = {"upload": {"href": target}, "verify": {"href": verify}}
    return {"transfer": "basic", "objects": objects}


def lfs_put(request: Request, oid: str) -> Any:
    """Store an object if its content matches its sha256."""
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Rejection(400, "the content does not match its sha256")
    request.state.blobs[oid] = request.body
    return {}


def lfs_verify(request: Request) -> Any:
    """Check the size of a stored object."""
    if len(request.state.blobs.get(request.json["oid"], b"")) != request.json["size"]:
        raise Rejection(404, "no such object")
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
                raise Rejection(400, f"{value['path']} was not uploaded")
            files[value["path"]] = request.state.blobs[value["oid"]]
        elif key == "deletedFile":
            files.pop(value["path"])
        elif key == "deletedFolder":
            files = {path: kept for path, kept in files.items() if not path.startswith(value["path"].rstrip("/") + "/")}
    sha = repository.commit(revision, files)
    return {"commitUrl": f"{request.state.url}/{id}/commit/{sha}", "commitOid": sha}


def in_lfs(path: str, size: int) -> bool:
    """Return whether the Hub stores such a file in LFS."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_BYTES)


def git_oid(content: bytes) -> str:
    """Return the id that git gives to a blob."""
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


def oid_of(path: str, content: bytes) -> str:
    """Return the id of a file's content on the Hub: sha256 in LFS, the git id otherwise."""
    return hashlib.sha256(content).hexdigest() if in_lfs(path, len(content)) else git_oid(content)


def describe(path: str, content: bytes) -> dict[str, Any]:
    """Return the entry of a file in listings."""
    size = len(content)
    lfs = {"lfs": {"oid": oid_of(path, content), "size": size, "pointerSize": 130}} if in_lfs(path, size) else {}
    return {"type": "file", "path": path, "oid": git_oid(content), "size": size} | lfs


_API = r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"
_GIT = r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+?)"
ROUTES = {
    r"POST /api/repos/create": create,
    r"POST /api/validate-yaml": validate,
    rf"GET {_API}(/revision/(?P<revision>.+))?": info,
    rf"GET {_API}/auth-check/write": check_write_access,
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
