"""A stand-in for the Hugging Face hub, over real HTTP: repositories with branches, tags and commits; missing, private
and gated ones; trees in pages; files in ranges, those in LFS behind a redirect.

    with hub_serving(tmp_path / "cache", monkeypatch, Hub) as hub:
        hub.add("owner/name", {"config.json": b"{}", "model.safetensors": weights}, "step1000")
        hub.add("owner/texts", {"train.jsonl": b"..."}, kind="datasets")

The client is the real huggingface_hub, in this process (`hub_serving` sets its address), or in another one with
`hub.environment(cache)`. `hub.asked`, `hub.heads` and `hub.bytes_sent()` hold what was asked for; the other attributes
of `tests.serving.Server` (cuts, failures, stall, ...) apply, by the path of a request. `routes` may be extended.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote

from tests.serving import File, Handler, Server

Kind = Literal["models", "datasets"]
Query = dict[str, list[str]]
LFS = re.compile(r"\.(safetensors|bin|parquet|arrow|npy|gz|zst|zip|pt)$")
WHEN = "2024-02-01T12:00:00.000Z"


@dataclass
class Commit:
    sha: str
    files: dict[str, bytes]
    title: str = "Upload"


@dataclass
class Repository:
    name: str
    kind: Kind
    gated: bool = False  # its files need a token, what is known of them does not
    private: bool = False  # without a token it does not seem to exist
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, revision: str) -> Commit | None:
        named = {**self.tags, **self.branches}.get(revision.removeprefix("refs/heads/").removeprefix("refs/tags/"))
        return self.commits.get(named or revision)


@dataclass
class Request:
    """What a route gets: its repository, the named groups of its pattern, and what came with the request."""

    hub: Hub
    repository: Repository
    parts: dict[str, str]
    query: Query
    headers: Mapping[str, str]
    body: bytes = b""

    def commit(self) -> Commit:
        """The commit of the `revision` of the path, or of the main branch."""
        found = self.repository.commit(self.parts.get("revision", "main"))
        if found is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {self.parts.get('revision')}")
        return found


class Refused(Exception):
    """An answer that is an error: the status, and the header by which the client knows which one."""

    def __init__(self, status: int, code: str | None, message: str):
        super().__init__(message)
        headers: dict[str, str | None] = {"X-Error-Message": message, "ETag": None, "Content-Type": "application/json"}
        self.file = File(b"", {**headers, "X-Error-Code": code}, status=status)
        self.file.content = json.dumps({"error": message}).encode()


Route = Callable[[Request], File]


class Hub(Server):
    """See the head of this module."""

    def __init__(self) -> None:
        super().__init__()
        # As on the hub, LFS is on another host: the client neither follows there for a HEAD nor sends its token.
        self.elsewhere = self.url.replace("127.0.0.1", "localhost")
        self.repositories: dict[tuple[Kind, str], Repository] = {}
        self.token = "hf_valid"  # opens private and gated repositories
        self.page = 1000  # entries of a tree in one answer
        self.stored: dict[str, bytes] = {}  # sha256 -> content in LFS
        self.routes: list[tuple[str, re.Pattern[str], Route]] = [
            (method, re.compile(pattern), route) for method, pattern, route in ROUTES
        ]

    def add(
        self,
        name: str,
        files: dict[str, bytes],
        revision: str = "main",
        *,
        kind: Kind = "models",
        tag: bool = False,
        gated: bool = False,
        private: bool = False,
        title: str = "Upload",
    ) -> str:
        """Add a commit with exactly these files, and let a branch or tag point to it; returns the commit. A repository
        is made at its first commit, with a `main` of its first files."""
        repository = self.repositories.setdefault((kind, name), Repository(name, kind))
        repository.gated, repository.private = gated or repository.gated, private or repository.private
        digest = hashlib.sha1(f"{kind}{name}{revision}{len(repository.commits)}".encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
            if LFS.search(path):
                self.stored[hashlib.sha256(content).hexdigest()] = content
        commit = Commit(digest.hexdigest(), dict(files), title)
        repository.commits[commit.sha] = commit
        repository.branches.setdefault("main", commit.sha)
        (repository.tags if tag else repository.branches)[revision] = commit.sha
        return commit.sha

    def environment(self, cache: Path) -> dict[str, str]:
        """What a new process needs in its environment to take this for the hub."""
        offline = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1,localhost", **offline}

    def bytes_sent(self, ending: str = "") -> int:
        """Bytes of body sent so far for paths with this ending."""
        return sum(asked.sent for asked in self.asked if asked.path.partition("?")[0].endswith(ending))

    def allowed(self, headers: Mapping[str, str]) -> bool:
        return headers.get("Authorization") == f"Bearer {self.token}"

    def handler(self) -> type[Handler]:
        return HubHandler

    def find(self, path: str, headers: Mapping[str, str]) -> File | None:
        return super().find(path, headers) or self.answer("GET", path, headers)

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes = b"") -> File | None:
        """What a route makes of a request; None if there is no such route."""
        path, _, query = target.partition("?")
        for wanted, pattern, route in self.routes:
            if wanted != method or not (match := pattern.fullmatch(path)):
                continue
            parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
            try:
                repository = self._repository(parts, headers)
                return route(Request(self, repository, parts, parse_qs(query), headers, body))
            except Refused as refused:
                return refused.file
        return None

    def _repository(self, parts: dict[str, str], headers: Mapping[str, str]) -> Repository:
        if "name" not in parts:  # of no repository
            return Repository("", "models")
        kind: Kind = "datasets" if parts.get("kind", "models").startswith("datasets") else "models"
        found = self.repositories.get((kind, parts["name"]))
        if found is not None and (not found.private or self.allowed(headers)):
            return found
        # Whoever is not logged in does not learn whether it exists.
        if "Authorization" in headers:
            raise Refused(404, "RepoNotFound", "Repository not found")
        raise Refused(401, "RepoNotFound", "Invalid username or password.")


class HubHandler(Handler):
    server: Hub

    def do_POST(self) -> None:
        self._send("POST")

    def do_PUT(self) -> None:
        self._send("PUT")

    def do_DELETE(self) -> None:
        self._send("DELETE")

    def _send(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.received.append(dict(self.headers))
        file = self.server.answer(method, self.path, self.headers, body)
        if file is None:
            file = Refused(404, None, "no such route").file
        self.head(file, file.status, len(file.content))
        self.wfile.write(file.content)


# --- routes ----------------------------------------------------------------------------------------------------------


def answer(content: Any, **headers: str | None) -> File:
    return File(json.dumps(content).encode(), {"Content-Type": "application/json", "ETag": None, **headers})


def blob(content: bytes) -> str:
    """The name that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def about(path: str, content: bytes) -> dict[str, Any]:
    """A file as a tree lists it."""
    found: dict[str, Any] = {"type": "file", "path": path, "oid": blob(content), "size": len(content)}
    if LFS.search(path):
        found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 135}
    return found


def info(request: Request) -> File:
    repository, commit = request.repository, request.commit()
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
    if "blobs" in request.query:
        for one, content in zip(siblings, commit.files.values()):
            one.update(size=len(content), blobId=blob(content))
            if LFS.search(one["rfilename"]):
                lfs = about(one["rfilename"], content)["lfs"]
                one["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 135}
    return answer(
        {
            **{"id": repository.name, "author": repository.name.partition("/")[0], "sha": commit.sha},
            **({"modelId": repository.name} if repository.kind == "models" else {}),
            **{"siblings": siblings, "tags": [], "downloads": 0, "likes": 0, "disabled": False},
            **{"lastModified": WHEN, "createdAt": WHEN},
            **{"private": repository.private, "gated": "manual" if repository.gated else False},
        }
    )


def refs(request: Request) -> File:
    repository = request.repository

    def listed(names: dict[str, str], place: str) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"refs/{place}/{n}", "targetCommit": sha} for n, sha in names.items()]

    branches, tags = listed(repository.branches, "heads"), listed(repository.tags, "tags")
    return answer({"branches": branches, "tags": tags, "converts": []})


def commits(request: Request) -> File:
    request.commit()
    found = [{"id": c.sha, "title": c.title, "date": WHEN} for c in reversed(request.repository.commits.values())]
    return answer([{**one, "message": "", "authors": []} for one in found])


def entries(files: Mapping[str, bytes], folder: str, recursive: bool) -> Iterator[dict[str, Any]]:
    """The files below a folder ("" for all), and the folders among them."""
    inside = {path: content for path, content in sorted(files.items()) if path.startswith(folder and folder + "/")}
    seen = set()
    for path, content in inside.items():
        steps = path[len(folder and folder + "/") :].split("/")[:-1]
        for depth in range(len(steps) if recursive else min(len(steps), 1)):
            between = "/".join([*filter(None, [folder]), *steps[: depth + 1]])
            if between not in seen:
                seen.add(between)
                yield {"type": "directory", "path": between, "oid": hashlib.sha1(between.encode()).hexdigest()}
        if recursive or not steps:
            yield about(path, content)


def _expanded(found: dict[str, Any], commit: Commit, asked: str) -> dict[str, Any]:
    last = {"id": commit.sha, "title": commit.title, "date": WHEN}
    return {**found, "lastCommit": last} if asked.lower() == "true" else found


def tree(request: Request) -> File:
    commit, query = request.commit(), request.query
    folder = request.parts.get("path", "").strip("/")
    recursive = query.get("recursive", [""])[0].lower() == "true"
    found = list(entries(commit.files, folder, recursive))
    if not found and folder:
        raise Refused(404, "EntryNotFound", f'{folder} does not exist on "{request.parts["revision"]}"')
    start, size = int(query.get("cursor", ["0"])[0]), request.hub.page
    more: dict[str, str | None] = {}
    if start + size < len(found):
        kept = "&".join(f"{key}={values[0]}" for key, values in query.items() if key != "cursor")
        revision, kind = request.parts["revision"].replace("/", "%2F"), request.repository.kind
        place = f"{request.hub.url}/api/{kind}/{request.repository.name}/tree/{revision}{folder and '/' + folder}"
        more = {"Link": f'<{place}?{kept}&cursor={start + size}>; rel="next"'}
    asked = query.get("expand", [""])[0]
    return answer([_expanded(one, commit, asked) for one in found[start : start + size]], **more)


def paths_info(request: Request) -> File:
    commit = request.commit()
    if "json" in request.headers.get("Content-Type", ""):
        given = json.loads(request.body)
    else:
        given = parse_qs(request.body.decode())
    known = {one["path"]: one for one in entries(commit.files, "", recursive=True)}
    asked = str(given.get("expand", ["false"])).strip("[']")
    return answer([_expanded(known[p], commit, asked) for p in given.get("paths", []) if p in known])


def file(request: Request) -> File:
    """A file of a commit, or where LFS has it."""
    repository, path = request.repository, request.parts["path"]
    if repository.gated and not request.hub.allowed(request.headers):
        known = "Authorization" in request.headers
        message = f"Access to {repository.kind[:-1]} {repository.name} is restricted. You must have access to it"
        message += "." if known else " and be authenticated to access it. Please log in."
        raise Refused(403 if known else 401, "GatedRepo", message)
    commit = request.commit()
    headers: dict[str, str | None] = {"X-Repo-Commit": commit.sha}
    if (content := commit.files.get(path)) is None:
        refused = Refused(404, "EntryNotFound", "Entry not found")
        refused.file.headers.update(headers)
        raise refused
    if not LFS.search(path):
        return File(content, {**headers, "ETag": f'"{blob(content)}"', "Accept-Ranges": "bytes"})
    sha256 = hashlib.sha256(content).hexdigest()
    linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
    # The commit and the path are in the address only so that a test sees what was asked for.
    where = f"{request.hub.elsewhere}/lfs/{sha256}/{commit.sha}/{quote(path)}"
    return File(b"", {**headers, **linked, "Location": where}, status=302)


def lfs(request: Request) -> File:
    if (content := request.hub.stored.get(request.parts["sha256"])) is None:
        raise Refused(404, None, "no such object")
    return File(content, {"ETag": f'"{request.parts["sha256"]}"', "Accept-Ranges": "bytes"})


def user(request: Request) -> File:
    if not request.hub.allowed(request.headers):
        raise Refused(401, None, "Invalid username or password.")
    return answer({"type": "user", "name": "owner", "fullname": "Owner", "orgs": []})


_API, _NAME = r"/api/(?P<kind>models|datasets)", r"/(?P<name>[^/]+/[^/]+)"
_REVISION, _PATH = r"/(?P<revision>[^/]+)", r"(?:/(?P<path>.*))?"
ROUTES: list[tuple[str, str, Route]] = [
    ("GET", _API + _NAME, info),
    ("GET", _API + _NAME + "/revision" + _REVISION, info),
    ("GET", _API + _NAME + "/refs", refs),
    ("GET", _API + _NAME + "/commits" + _REVISION, commits),
    ("GET", _API + _NAME + "/tree" + _REVISION + _PATH, tree),
    ("POST", _API + _NAME + "/paths-info" + _REVISION, paths_info),
    ("GET", "(?:/(?P<kind>datasets))?" + _NAME + "/resolve" + _REVISION + "/(?P<path>.+)", file),
    ("GET", "/lfs/(?P<sha256>[0-9a-f]+)/.*", lfs),
    ("GET", "/api/whoami-v2", user),
]
