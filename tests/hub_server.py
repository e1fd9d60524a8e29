"""A model Hub on the loopback interface that speaks the protocol of `huggingface_hub`.

Repositories live in memory as commits (a commit maps paths to bytes). Uploads arrive as regular
files or by git LFS, as on the real Hub; private repositories want the right token; every request
is kept, so that a test can see what was asked of the server and with which token.

`HF_ENDPOINT` must be set to `HubServer.url` before `huggingface_hub` is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

REPO = r"(?P<repo>[^/]+/[^/]+?)"
ROUTES = {
    "POST": {
        r"/api/repos/create": "create_repo",
        r"/api/validate-yaml": "validate_yaml",
        rf"/api/models/{REPO}/preupload/(?P<rev>.+)": "preupload",
        rf"/api/models/{REPO}/commit/(?P<rev>.+)": "commit",
        rf"/api/models/{REPO}/branch/(?P<rev>.+)": "create_branch",
        rf"/{REPO}\.git/info/lfs/objects/batch": "lfs_batch",
    },
    "PUT": {r"/lfs/(?P<oid>[0-9a-f]{64})": "lfs_put"},
    "GET": {
        rf"/api/models/{REPO}/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?": "tree",
        rf"/api/models/{REPO}/revision/(?P<rev>.+)": "model_info",
        rf"/api/models/{REPO}": "model_info",
        rf"/{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)": "resolve",
    },
}


@dataclass
class Repository:
    """One model repository: its commits, oldest first, and where its branches point.

    Attributes:
        token: Token without which it is not to be seen; None for a public repository.
    """

    token: str | None = None
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add_commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Make `files` the content of a new commit at the head of `branch`; return its hash."""
        digest = hashlib.sha1(repr((len(self.commits), branch)).encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        sha = digest.hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """Return the commit that a branch name or a commit hash stands for."""
        return revision if revision in self.commits else self.branches.get(revision)


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    path: str
    token: str | None


class HubServer:
    """The server; a context manager that listens on a free port while it is entered."""

    def __init__(self, token: str = "hf_loopback") -> None:
        """Prepare an empty Hub on which `token` may write."""
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        """Address for `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> HubServer:
        """Start to listen."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop and close the socket."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def environment(self, home: Path, *, offline: bool = False) -> dict[str, str]:
        """Environment variables with which a fresh process talks to this Hub alone."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1" if offline else "0",
        }

    def add_folder(self, repo: str, folder: Path) -> str:
        """Publish a folder as a new commit on `main`; return the commit's hash."""
        files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        repository = self.repositories.setdefault(repo, Repository())
        return repository.add_commit(files)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Content of a repository at a revision."""
        repository = self.repositories[repo]
        sha = repository.resolve(revision)
        assert sha is not None, f"{repo} has no revision {revision}"
        return repository.commits[sha]

    def paths(self, method: str) -> list[str]:
        """Paths that were asked for with `method`, in order."""
        return [request.path for request in self.requests if request.method == method]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._dispatch("GET")

    def do_HEAD(self) -> None:
        self._dispatch("GET")

    def do_POST(self) -> None:
        self._dispatch("POST")

    def do_PUT(self) -> None:
        self._dispatch("PUT")

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def _dispatch(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        self._token = token if scheme == "Bearer" else None
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            self._body = self._read_chunks()
        else:
            self._body = self.rfile.read(length)
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, path, self._token))
            for pattern, name in ROUTES[method].items():
                match = re.fullmatch(pattern, path)
                if match:
                    getattr(self, f"_{name}")(**match.groupdict())
                    return
        self._fail(HTTPStatus.NOT_FOUND, "EntryNotFound", f"no such route: {method} {path}")

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    # -- answers ---------------------------------------------------------------------------------

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        # A body after a HEAD reply would be read as the next answer on this connection.
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = HTTPStatus.OK) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str, message: str, commit: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        if commit:
            headers["X-Repo-Commit"] = commit
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _find(self, repo: str, rev: str = "main") -> tuple[Repository, str] | None:
        """Look up a repository and a commit of it; answer with the Hub's error when absent."""
        repository = self.hub.repositories.get(repo)
        if repository is None or repository.token not in (None, self._token):
            self._fail(HTTPStatus.NOT_FOUND, "RepoNotFound", f"Repository {repo} not found")
            return None
        sha = repository.resolve(rev)
        if sha is None:
            self._fail(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"{repo} has no revision {rev}")
            return None
        return repository, sha

    def _may_write(self) -> bool:
        if self._token == self.hub.token:
            return True
        self._fail(HTTPStatus.UNAUTHORIZED, "Unauthorized", "Invalid username or password.")
        return False

    # -- routes ----------------------------------------------------------------------------------

    def _create_repo(self) -> None:
        if not self._may_write():
            return
        wanted = json.loads(self._body)
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}
        if repo in self.hub.repositories:
            answer["error"] = "You already created this model repo"
            self._json(answer, HTTPStatus.CONFLICT)
            return
        repository = Repository(token=self.hub.token if wanted.get("private") else None)
        repository.add_commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.repositories[repo] = repository
        self._json(answer)

    def _validate_yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def _preupload(self, repo: str, rev: str) -> None:
        if self._may_write() and self._find(repo, rev):
            wanted = json.loads(self._body)["files"]
            self._json({"files": [_upload_mode(file["path"]) for file in wanted]})

    def _lfs_batch(self, repo: str) -> None:
        if not (self._may_write() and self._find(repo)):
            return
        objects = []
        for wanted in json.loads(self._body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs_objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self._body).hexdigest() != oid:
            self._fail(HTTPStatus.BAD_REQUEST, "BadRequest", "content does not have this hash")
            return
        self.hub.lfs_objects[oid] = self._body
        self._send(HTTPStatus.OK, b"", {})

    def _create_branch(self, repo: str, rev: str) -> None:
        found = self._find(repo) if self._may_write() else None
        if found is None:
            return
        repository, sha = found
        if rev in repository.branches:
            self._fail(HTTPStatus.CONFLICT, "Conflict", "Reference already exists")
            return
        repository.branches[rev] = sha
        self._json({}, HTTPStatus.CREATED)

    def _commit(self, repo: str, rev: str) -> None:
        found = self._find(repo, rev) if self._may_write() else None
        if found is None:
            return
        repository, sha = found
        files = dict(repository.commits[sha])
        for line in self._body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs_objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        new = repository.add_commit(files, branch=rev)
        url = f"{self.hub.url}/{repo}/commit/{new}"
        self._json({"success": True, "commitOid": new, "commitUrl": url})

    def _model_info(self, repo: str, rev: str = "main") -> None:
        found = self._find(repo, rev)
        if found is None:
            return
        repository, sha = found
        siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
        self._json({
            "_id": repo, "id": repo, "modelId": repo, "sha": sha,
            "private": repository.token is not None, "tags": [], "siblings": siblings,
        })  # fmt: skip

    def _tree(self, repo: str, rev: str, path: str | None = None) -> None:
        found = self._find(repo, rev)
        if found is None:
            return
        repository, sha = found
        prefix = f"{path}/" if path else ""
        self._json([
            {"type": "file", "path": name, "size": len(content), "oid": _git_hash(content)}
            for name, content in sorted(repository.commits[sha].items())
            if name.startswith(prefix)
        ])  # fmt: skip

    def _resolve(self, repo: str, rev: str, path: str) -> None:
        found = self._find(repo, rev)
        if found is None:
            return
        repository, sha = found
        content = repository.commits[sha].get(path)
        if content is None:
            self._fail(HTTPStatus.NOT_FOUND, "EntryNotFound", f"{repo} has no file {path}", sha)
            return
        self._send(
            HTTPStatus.OK,
            content,
            {"ETag": f'"{_git_hash(content)}"', "X-Repo-Commit": sha, "Accept-Ranges": "none"},
        )


def _upload_mode(path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False}


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
