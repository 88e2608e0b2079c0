# SPDX-License-Identifier: Apache-2.0
"""A Hub of models in memory, served over loopback: what huggingface_hub needs to publish a folder and load it again."""

import base64
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_SUFFIXES = (".safetensors", ".bin", ".png")


def blob_oid(content: bytes) -> str:
    """The name that git gives to a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Commit:
    """One commit: the branch it was made on, its message, and every file of the repository after it."""

    oid: str
    branch: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """A model repository: commits in the order they were made, and the commit that each branch points to."""

    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add_commit(self, branch: str, message: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {branch} {message}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, branch, message, files)
        self.branches[branch] = oid
        return oid


class LoopbackHub:
    """
    Serves repositories of models at `url` until the `with` block ends.

    Args:
        user (`str`, defaults to `"ada"`): the account that `token` belongs to.
        token (`str`): the one token that is accepted.
        orgs (`list[str]`, *optional*): the organizations of the user.
        role (`str`, defaults to `"write"`): what the token may do, `"read"` or `"write"`.
    """

    def __init__(self, user="ada", token="hf_loopback", orgs=("lab",), role="write"):
        self.user, self.token, self.orgs, self.role = user, token, list(orgs), role
        self.repos: dict[str, Repo] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[str] = []  # "METHOD /path" in the order of arrival
        self.uploads: list[bytes] = []  # bodies of the requests that change something
        self.lock = Lock()

    def __enter__(self) -> "LoopbackHub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Content of every file at a branch or commit."""
        repo = self.repos[repo_id]
        return repo.commits[repo.branches.get(revision, revision)].files

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a fresh process that talks to this Hub and keeps its caches under `home`."""
        return {
            **{key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HUGGING"))},
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def reply(self, status: int, body=None, headers: dict[str, str] | None = None) -> None:
        if body is None or isinstance(body, (dict, list)):
            body = json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str | None, message: str) -> None:
        self.reply(status, {"error": message}, {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}))

    def handle_request(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        writes = self.command in ("POST", "PUT") and path != "/api/validate-yaml"
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            if writes:
                self.hub.uploads.append(body)
            authorized = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
            if not authorized and (path == "/api/whoami-v2" or (writes and not path.startswith("/lfs/"))):
                return self.refuse(401, None, "Invalid credentials in Authorization header")
            for pattern, methods, name in ROUTES:
                if (match := re.fullmatch(pattern, path)) and self.command in methods:
                    repo_id = match.groupdict().get("repo_id")
                    repo = self.hub.repos.get(repo_id)
                    if repo_id is not None and (repo is None or (repo.private and not authorized)):
                        return self.refuse(404, "RepoNotFound", "Repository not found")
                    groups = {key: value for key, value in match.groupdict().items() if key != "repo_id"}
                    arguments = {"body": body, "query": parse_qs(parts.query), **groups}
                    return getattr(self, name)(repo_id, repo, **arguments)
        self.refuse(404, None, f"No route for {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def whoami(self, repo_id, repo, body, query):
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": self.hub.role}}
        orgs = [{"type": "org", "name": name} for name in self.hub.orgs]
        self.reply(200, {"type": "user", "name": self.hub.user, "orgs": orgs, "auth": access})

    def validate_yaml(self, repo_id, repo, body, query):
        block = re.match(r"---\n(.*?)\n---", json.loads(body)["content"], re.S)
        metadata = yaml.safe_load(block[1]) if block else {}
        errors = [{"message": f"{key} is empty"} for key, value in metadata.items() if value in (None, "", [])]
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def create_repo(self, repo_id, repo, body, query):
        request = json.loads(body)
        owner = request.get("organization") or self.hub.user
        if owner not in [self.hub.user, *self.hub.orgs] or self.hub.role != "write":
            return self.refuse(403, None, "You don't have the rights to create a model under this namespace")
        repo_id = f"{owner}/{request['name']}"
        if repo_id in self.hub.repos:
            return self.reply(
                409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"}
            )
        private = request.get("visibility") == "private" or bool(request.get("private"))
        repo = self.hub.repos[repo_id] = Repo(private=private)
        repo.add_commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.reply(200, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id})

    def create_branch(self, repo_id, repo, body, query, revision):
        if revision in repo.branches:
            return self.refuse(409, None, "Reference already exists")
        start = json.loads(body or b"{}").get("startingPoint", "main")
        repo.branches[revision] = repo.branches.get(start, start)
        self.reply(200)

    def preupload(self, repo_id, repo, body, query, revision):
        if revision not in repo.branches:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        present = self.hub.files(repo_id, revision)
        files = []
        for entry in json.loads(body)["files"]:
            mode = "lfs" if entry["path"].endswith(LFS_SUFFIXES) else "regular"
            oid = None
            if (content := present.get(entry["path"])) is not None:
                oid = hashlib.sha256(content).hexdigest() if mode == "lfs" else blob_oid(content)
            files.append({"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply(200, {"files": files})

    def lfs_batch(self, repo_id, repo, body, query):
        objects = []
        for entry in json.loads(body)["objects"]:
            if entry["oid"] not in self.hub.lfs_objects:
                target = {"href": f"{self.hub.url}/lfs/{entry['oid']}", "header": {}}
                entry = {**entry, "authenticated": True, "actions": {"upload": target}}
            objects.append(entry)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, repo_id, repo, body, query, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.refuse(400, None, "The content does not have this hash")
        self.hub.lfs_objects[oid] = body
        self.reply(200)

    def commit(self, repo_id, repo, body, query, revision):
        if revision not in repo.branches:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        files = dict(self.hub.files(repo_id, revision))
        message = ""
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs_objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.add_commit(revision, message, files)
        self.reply(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid, "success": True})

    def find(self, repo_id, repo, revision) -> Commit | None:
        commit = repo.commits.get(repo.branches.get(revision, revision))
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def info(self, repo_id, repo, body, query, revision="main"):
        if commit := self.find(repo_id, repo, revision):
            siblings = [{"rfilename": path} for path in commit.files]
            info = {"id": repo_id, "modelId": repo_id, "sha": commit.oid, "private": repo.private, "tags": []}
            self.reply(200, {**info, "siblings": siblings, "downloads": 0, "likes": 0})

    def tree(self, repo_id, repo, body, query, revision):
        if commit := self.find(repo_id, repo, revision):
            entries = []
            for path, content in commit.files.items():
                entry = {"type": "file", "path": path, "size": len(content), "oid": blob_oid(content)}
                if path.endswith(LFS_SUFFIXES):
                    oid = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
                entries.append(entry)
            self.reply(200, entries)

    def resolve(self, repo_id, repo, body, query, revision, path):
        if commit := self.find(repo_id, repo, revision):
            if (content := commit.files.get(path)) is None:
                return self.refuse(404, "EntryNotFound", "Entry not found")
            headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob_oid(content)}"'}
            if path.endswith(LFS_SUFFIXES):
                headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
                headers["X-Linked-Size"] = str(len(content))
            self.reply(200, content, headers)


_REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>[\w.-]+)"
ROUTES = [
    (r"/api/whoami-v2", ("GET",), "whoami"),
    (r"/api/validate-yaml", ("POST",), "validate_yaml"),
    (r"/api/repos/create", ("POST",), "create_repo"),
    (rf"/api/models/{_REPO}/branch/{_REVISION}", ("POST",), "create_branch"),
    (rf"/api/models/{_REPO}/preupload/{_REVISION}", ("POST",), "preupload"),
    (rf"/api/models/{_REPO}/commit/{_REVISION}", ("POST",), "commit"),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", ("POST",), "lfs_batch"),
    (r"/lfs/(?P<oid>[0-9a-f]{64})", ("PUT",), "lfs_put"),
    (rf"/api/models/{_REPO}", ("GET",), "info"),
    (rf"/api/models/{_REPO}/revision/{_REVISION}", ("GET",), "info"),
    (rf"/api/models/{_REPO}/tree/{_REVISION}", ("GET",), "tree"),
    (rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", ("GET", "HEAD"), "resolve"),
]
