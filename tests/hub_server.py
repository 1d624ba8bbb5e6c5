"""A local Hub server: enough of the protocol for the unmodified huggingface_hub client.

Create, validate, preupload (regular and LFS), commit, branch; resolve, info, revision, tree, paths-info,
auth-check; start, show, cancel and follow jobs. It refuses, fails and drops connections on request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopbackTokenForTests0123456789"
READ_TOKEN = "hf_loopbackTokenThatReads012345678"
ROLES = {TOKEN: "write", READ_TOKEN: "read"}
USER = "me"
ORGANISATIONS = {"team": "write", "audience": "read"}
DROP = "drop"  # a fault: the connection breaks
CUT, FLIP = "cut", "flip"  # faults of a file: truncated half-way; one bit flipped
LFS_SUFFIXES = (".safetensors", ".parquet")
LFS_BYTES = 1 << 20
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Repo:
    """Files by path at the last commit on main, and on other branches."""

    files: dict[str, bytes] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    num_commits: int = 0
    private: bool = False
    branches: dict[str, Repo] = field(default_factory=dict)

    @property
    def sha(self) -> str:
        digest = hashlib.sha1(str(self.num_commits).encode())
        for path, content in sorted(self.files.items()):
            digest.update(path.encode() + content)
        return digest.hexdigest()

    def oid(self, path: str) -> str:
        """The ETag: Git's hash of a blob, or the SHA-256 of an LFS file."""
        content = self.files[path]
        if path in self.lfs:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def entry(self, path: str) -> dict:
        size = len(self.files[path])
        lfs = {"oid": self.oid(path), "size": size, "pointerSize": 130}
        entry = {"type": "file", "path": path, "size": size, "oid": self.oid(path)}
        return entry | ({"lfs": lfs} if path in self.lfs else {})


@dataclass
class RemoteJob:
    """A job of HF Jobs: what was posted, its log so far, its stage, and a message about it."""

    spec: dict
    lines: list[str] = field(default_factory=list)
    stage: str = "RUNNING"
    message: str | None = None


class Hub:
    """The server, its repos by ("models", "datasets" or "spaces", id), its configured refusals and faults.

    refused: (action, repo id) -> HTTP status. faults: (action, repo id) -> statuses or DROP, one for each
    request until none is left. Actions: whoami and validate, which name no repo (""), write, create, branch,
    preupload, lfs, upload, commit, and answer, which fails after the commit; info, listing, and download, of
    a path after the repo id; jobs and logs, of a namespace. A fault of None lets one request pass.
    refused_cards: model names that validate rejects. etag: a mirror's ETag of a content, quotes included;
    None for the Hub's. requests: the log of requests. jobs: by id. machine: runs a job in a thread: adds to
    its log, and sets its stage at the end; None leaves jobs running.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.refused: dict[tuple[str, str], int] = {}
        self.faults: dict[tuple[str, str], list[int | str | None]] = {}
        self.refused_cards: set[str] = set()
        self.etag: Callable[[bytes], str] | None = None
        self.requests: list[str] = []
        self.jobs: dict[str, RemoteJob] = {}
        self.machine: Callable[[RemoteJob, Hub], None] | None = None
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fill(self, kind: str, repo_id: str, folder: Path) -> None:
        """Publish the files of a folder."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        lfs = {name for name in files if name.endswith(LFS_SUFFIXES)}
        self.repos[kind, repo_id] = Repo(files, lfs, 1)


def hub_environment(home, endpoint):
    """Environment of a process with a Hub at `endpoint`, a cache in `home`, and a token."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE"))}
    return kept | {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """Handler of one request. Routes are tried in order; an unmatched request is a 404."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        if path == "/api/whoami-v2":
            if self.authorised() and not self.fails("whoami", ""):
                orgs = [{"name": org, "roleInOrg": role} for org, role in ORGANISATIONS.items()]
                auth = {"accessToken": {"role": ROLES[self.token]}}
                self.answer({"type": "user", "name": USER, "orgs": orgs, "auth": auth})
        elif found := re.fullmatch(r"/api/(models|datasets|spaces)/(.+)/auth-check(/write)?", path):
            if self.repo(found[1], found[2]) and not (found[3] and self.refuses("write", found[2])):
                self.answer({})
        elif found := re.fullmatch(
            r"/api/(models|datasets|spaces)/(.+?)(/revision/([^/]+))?", path
        ):
            if "/tree/" in path:
                self.answer_tree(
                    *re.fullmatch(r"/api/(\w+)/(.+)/tree/([^/]+)/?(.*)", path).groups()
                )
            elif self.fails("info", found[2]):
                pass
            elif repo := self.at(found[1], found[2], found[4]):
                siblings = [{"rfilename": name} for name in repo.files]
                names = {"id": found[2], "sha": repo.sha, "siblings": siblings, "tags": []}
                self.answer(names | {"private": repo.private, "downloads": 0, "likes": 0})
        elif found := re.fullmatch(r"/api/jobs/([^/]+)/([^/]+)(/logs)?", path):
            if found[3]:
                self.stream_log(found[1], self.hub.jobs[found[2]])
            else:
                self.answer(self.job_info(found[2]))
        elif found := re.fullmatch(r"/(datasets/|spaces/)?(.+?)/resolve/([^/]+)/(.+)", path):
            kind = (found[1] or "models/").rstrip("/")
            self.answer_file(kind, *found.groups()[1:])
        else:
            self.answer({"error": "no such page"}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            errors = card_errors(content, json.loads(body)["repoType"])
            names = re.findall(r"^- name: (.*)$", content, re.MULTILINE)
            errors += [f"not this one: {name}" for name in names if name in self.hub.refused_cards]
            if not self.fails("validate", ""):
                self.answer(
                    {"errors": [{"message": e} for e in errors], "warnings": []},
                    400 if errors else 200,
                )
        elif found := re.fullmatch(r"/api/(\w+)/(.+)/paths-info/([^/]+)", path):
            form = parse_qs(body.decode())
            if self.fails("listing", found[2]):
                pass
            elif repo := self.repo(found[1], found[2]):
                self.answer([repo.entry(p) for p in form.get("paths", []) if p in repo.files])
        elif not self.authorised():
            return
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif found := re.fullmatch(r"/api/jobs/([^/]+)", path):
            if not self.refuses("jobs", found[1]):
                self.start_job(json.loads(body))
        elif found := re.fullmatch(r"/api/jobs/([^/]+)/([^/]+)/cancel", path):
            self.hub.jobs[found[2]].stage = "CANCELED"
            self.answer({})
        elif found := re.fullmatch(r"/api/(\w+)/(.+)/preupload/([^/]+)", path):
            repo = self.at(found[1], found[2], found[3])
            if repo and not self.refuses("preupload", found[2]):
                files = [
                    {"path": f["path"], "uploadMode": upload_mode(f), "shouldIgnore": False}
                    | ({"oid": repo.oid(f["path"])} if f["path"] in repo.files else {})
                    for f in json.loads(body)["files"]
                ]
                self.answer({"files": files})
        elif found := re.fullmatch(r"/(datasets/|spaces/)?(.+)\.git/info/lfs/objects/batch", path):
            if not self.refuses("lfs", found[2]):
                self.answer_lfs_batch(found[2], json.loads(body)["objects"])
        elif found := re.fullmatch(r"/api/(\w+)/(.+)/commit/([^/]+)", path):
            lines = [json.loads(line) for line in body.splitlines()]
            self.commit(*found.groups(), lines)
        elif found := re.fullmatch(r"/api/(\w+)/(.+)/branch/([^/]+)", path):
            repo = self.repo(found[1], found[2])
            if repo and not self.refuses("branch", found[2]):
                known = found[3] in repo.branches
                start = Repo(dict(repo.files), set(repo.lfs), private=repo.private)
                repo.branches.setdefault(found[3], start)
                self.answer({}, 409 if known else 201)
        else:
            self.answer({"error": "no such page"}, 404)

    def do_PUT(self) -> None:
        folder, _, oid = self.path.rpartition("/")
        length = int(self.headers["Content-Length"])
        fault = self.next_fault("upload", folder.removeprefix("/lfs/"))
        content = self.rfile.read(length // 2 if fault == DROP else length)
        if fault is not None:
            self.fail("upload", fault)
            return
        good = hashlib.sha256(content).hexdigest() == oid
        if good:
            self.hub.objects[oid] = content
        self.answer({}, 200 if good else 400)

    def create(self, asked: dict) -> None:
        kind, repo_id = (
            asked.get("type", "model") + "s",
            f"{asked['organization'] or USER}/{asked['name']}",
        )
        if self.refuses("create", repo_id):
            return
        known = (kind, repo_id) in self.hub.repos
        private = asked.get("visibility") == "private" or asked.get("private", False)
        self.hub.repos.setdefault((kind, repo_id), Repo(private=private))
        prefix = "" if kind == "models" else f"{kind}/"
        self.answer({"url": f"{self.hub.endpoint}/{prefix}{repo_id}"}, 409 if known else 200)

    def start_job(self, spec: dict) -> None:
        job_id = f"{len(self.hub.jobs):024x}"
        job = self.hub.jobs[job_id] = RemoteJob(spec)
        if self.hub.machine is not None:
            threading.Thread(target=self.hub.machine, args=(job, self.hub), daemon=True).start()
        self.answer(self.job_info(job_id))

    def job_info(self, job_id: str) -> dict:
        job = self.hub.jobs[job_id]
        shown = {name: value for name, value in job.spec.items() if name != "secrets"}
        owner = {"id": "0" * 24, "name": USER, "type": "user"}
        status = {"stage": job.stage, "message": job.message}
        return {**shown, "id": job_id, "owner": owner, "status": status}

    def stream_log(self, namespace: str, job: RemoteJob) -> None:
        """Send the lines of a job as server-sent events, until it ends."""
        if self.fails("logs", namespace):
            return
        self.hub.requests.append(f"GET {self.path} 200")
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        sent = 0
        try:
            while True:
                ended = job.stage != "RUNNING"
                for line in job.lines[sent:]:
                    event = {"data": line, "timestamp": "2026-01-01T00:00:00.000Z"}
                    self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                    sent += 1
                if ended:
                    return
                time.sleep(0.05)
        except OSError:  # the client has gone
            pass

    def commit(self, kind: str, repo_id: str, revision: str, lines: list[dict]) -> None:
        repo = self.at(kind, repo_id, revision)
        if repo is None or self.refuses("commit", repo_id):
            return
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.objects[value["oid"]]
                repo.lfs.add(value["path"])
            elif line["key"] == "deletedFile":
                repo.files.pop(value["path"], None)
        repo.num_commits += 1
        # The commit exists, but the client gets no answer.
        if self.fails("answer", repo_id):
            return
        url = f"{self.hub.endpoint}/{repo_id}/commit/{repo.sha}"
        self.answer({"commitUrl": url, "commitOid": repo.sha, "success": True})

    def answer_lfs_batch(self, repo_id: str, objects: list[dict]) -> None:
        for item in objects:
            if item["oid"] not in self.hub.objects:
                href = f"{self.hub.endpoint}/lfs/{repo_id}/{item['oid']}"
                item["actions"] = {"upload": {"href": href}}
        self.answer({"transfer": "basic", "objects": objects})

    def answer_tree(self, kind: str, repo_id: str, revision: str, folder: str) -> None:
        repo = self.at(kind, repo_id, revision)
        if repo is None:
            return
        prefix = f"{folder}/" if folder else ""
        entries = [repo.entry(path) for path in sorted(repo.files) if path.startswith(prefix)]
        if "recursive=true" not in self.path.lower():
            deeper = {
                e["path"][len(prefix) :].partition("/")[0]
                for e in entries
                if "/" in e["path"][len(prefix) :]
            }
            entries = [e for e in entries if "/" not in e["path"][len(prefix) :]]
            entries += [
                {"type": "directory", "path": prefix + d, "oid": "0" * 40, "size": 0}
                for d in deeper
            ]
        if folder and not entries:
            self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        else:
            self.answer(entries)

    def answer_file(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        repo = self.at(kind, repo_id, revision)
        if repo is None:
            return
        if path not in repo.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.sha}
            self.answer({"error": "Entry not found"}, 404, headers)
            return
        headers = {
            "ETag": self.hub.etag(repo.files[path]) if self.hub.etag else f'"{repo.oid(path)}"',
            "X-Repo-Commit": repo.sha,
            "Accept-Ranges": "bytes",
        }
        content, status = repo.files[path], 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(found[1]), int(found[2] or len(content) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content, status = content[start:stop], 206
        fault = self.next_fault("download", f"{repo_id}/{path}") if self.command == "GET" else None
        if fault == FLIP:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        elif fault not in (CUT, None):
            self.fail("download", fault)
            return
        self.answer(content, status, headers, cut=fault == CUT)

    def repo(self, kind: str, repo_id: str) -> Repo | None:
        repo = self.hub.repos.get((kind, repo_id))
        if repo is not None and not (repo.private and self.token not in ROLES):
            return repo
        status = 404 if self.token in ROLES else 401
        self.answer({"error": "Repository not found"}, status, {"X-Error-Code": "RepoNotFound"})
        return None

    def at(self, kind: str, repo_id: str, revision: str | None) -> Repo | None:
        """A repo at a branch or commit."""
        repo = self.repo(kind, repo_id)
        if repo is None or revision in (None, "main", repo.sha):
            return repo
        for name, branch in repo.branches.items():
            if revision in (name, branch.sha):
                return branch
        self.answer({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        return None

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def authorised(self) -> bool:
        if self.token in ROLES:
            return True
        self.answer({"error": "Invalid username or password."}, 401)
        return False

    def refuses(self, action: str, repo_id: str) -> bool:
        """True if a write is refused, by permissions or by the test's configuration."""
        namespace = repo_id.split("/")[0]
        may_write = namespace == USER or ORGANISATIONS.get(namespace) == "write"
        if ROLES.get(self.token) != "write" or not may_write:
            self.answer({"error": f"{action}: no permission"}, 403)
            return True
        return self.fails(action, repo_id)

    def fails(self, action: str, repo_id: str) -> bool:
        fault = self.next_fault(action, repo_id)
        if fault is not None:
            self.fail(action, fault)
        return fault is not None

    def next_fault(self, action: str, repo_id: str) -> int | str | None:
        """An HTTP status, DROP, or None."""
        queue = self.hub.faults.get((action, repo_id))
        return queue.pop(0) if queue else self.hub.refused.get((action, repo_id))

    def fail(self, action: str, fault: int | str) -> None:
        if fault == DROP:
            self.hub.requests.append(f"{self.command} {self.path} dropped")
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.answer({"error": f"{action} refused"}, fault, {"Retry-After": "0"})

    def answer(
        self, content: object, status: int = 200, headers: dict | None = None, cut: bool = False
    ) -> None:
        self.hub.requests.append(f"{self.command} {self.path} {status}")
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload[: len(payload) // 2] if cut else payload)
        if cut:
            self.close_connection = True


def upload_mode(file: dict) -> str:
    """Upload mode of a file: in the commit, or LFS for weights, tables and large files."""
    return "lfs" if file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_BYTES else "regular"


def card_errors(content: str, kind: str = "model") -> list[str]:
    """Errors in the metadata of a README.md, as far as this server checks."""
    found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if not found:
        return ["no metadata"]
    try:
        metadata = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [str(error)]
    ids = [metadata.get("base_model") or [], metadata.get("datasets") or []]
    flat = [name for value in ids for name in (value if isinstance(value, list) else [value])]
    errors = [f"{name!r} is not a valid id" for name in flat if not REPO_ID.fullmatch(name)]
    if kind == "space":
        return errors + space_errors(metadata)
    if metadata.get("pipeline_tag") != "image-classification":
        errors.append("pipeline_tag is not one of this server's")
    for model in metadata.get("model-index", []):
        for result in model["results"]:
            for key, wanted in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                if not isinstance(result[key].get(wanted), str):
                    errors.append(f"model-index: {key}.{wanted} is missing")
            errors += [f"no value: {m}" for m in result["metrics"] if "value" not in m]
    return errors


def space_errors(metadata: dict) -> list[str]:
    """Errors in the metadata of a Space. Source: huggingface.co/docs/hub/spaces-config-reference"""
    colours = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
    errors = [
        f"{key} is missing" for key in ("title", "app_file", "sdk_version") if not metadata.get(key)
    ]
    errors += [key for key in ("colorFrom", "colorTo") if metadata.get(key) not in colours]
    if metadata.get("sdk") not in ("gradio", "docker", "static"):
        errors.append("sdk is not one of the Hub's")
    if len(metadata.get("short_description", "")) > 60:
        errors.append("short_description is longer than 60 characters")
    return errors
