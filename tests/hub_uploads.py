"""Uploads to the stand-in for the hub: `with hub_serving(cache, monkeypatch, UploadHub) as hub`.

Repositories and branches are created, files of weights put into LFS, commits made. `hub.refused_uploads` are answers
(statuses) to the next files put into LFS instead of keeping them, `hub.calls` what was asked for, in order.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping

import yaml

from tests.hub import _API, _NAME, _REVISION, LFS, Hub, Refused, Repository, Request, answer
from tests.serving import File

LARGEST_REGULAR = 10 * 2**20


class UploadHub(Hub):
    def __init__(self) -> None:
        super().__init__()
        self.refused_uploads: list[int] = []
        self.calls: list[tuple[str, str]] = []
        for method, pattern, route in ROUTES:
            self.routes.append((method, re.compile(pattern), route))

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes = b"") -> File | None:
        self.calls.append((method, target.partition("?")[0]))
        return super().answer(method, target, headers, body)


def _writable(request: Request) -> UploadHub:
    assert isinstance(request.hub, UploadHub)
    if not request.hub.allowed(request.headers):
        raise Refused(403, None, "You don't have the rights to write here.")
    return request.hub


def create(request: Request) -> File:
    hub, asked = _writable(request), json.loads(request.body)
    name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
    if ("models", name) in hub.repositories:
        raise Refused(409, None, "You already created this model repo")
    hub.repositories["models", name] = Repository(name, "models")
    hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=asked.get("visibility") == "private")
    return answer({"url": f"{hub.url}/{name}", "name": name})


def branch(request: Request) -> File:
    _writable(request)
    request.repository.branches[request.parts["revision"]] = request.repository.branches["main"]
    return answer({})


def validate(request: Request) -> File:
    head = json.loads(request.body)["content"].split("---\n")[1]
    found = yaml.safe_load(head)
    errors = [] if isinstance(found, dict) else [{"message": "not keys and values"}]
    return File(json.dumps({"errors": errors, "warnings": []}).encode(), {}, status=400 if errors else 200)


def preupload(request: Request) -> File:
    _writable(request)
    commit = request.commit()
    modes = []
    for file in json.loads(request.body)["files"]:
        large = bool(LFS.search(file["path"])) or file["size"] > LARGEST_REGULAR
        there = commit.files.get(file["path"])
        mode = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if there is not None:
            blob = hashlib.sha1(b"blob %d\0" % len(there) + there).hexdigest()
            mode["oid"] = hashlib.sha256(there).hexdigest() if large else blob
        modes.append(mode)
    return answer({"files": modes})


def batch(request: Request) -> File:
    hub = _writable(request)
    objects = []
    for one in json.loads(request.body)["objects"]:
        action = {"upload": {"href": f"{hub.elsewhere}/lfs-upload/{one['oid']}", "header": {}}}
        objects.append({**one, **({} if one["oid"] in hub.stored else {"actions": action})})
    return answer({"objects": objects, "transfer": "basic"}, **{"Content-Type": "application/vnd.git-lfs+json"})


def put(request: Request) -> File:
    assert isinstance(request.hub, UploadHub)
    refused = request.hub.refused_uploads
    if refused and (status := refused.pop(0)) != 200:
        raise Refused(status, None, "cut off")
    sha256 = hashlib.sha256(request.body).hexdigest()
    if sha256 != request.parts["sha256"]:
        raise Refused(400, None, "other content than announced")
    request.hub.stored[sha256] = request.body
    return File(b"", {})


def commit(request: Request) -> File:
    hub, repository, revision = _writable(request), request.repository, request.parts["revision"]
    lines = [json.loads(line) for line in request.body.splitlines()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    head = request.commit()
    if header.get("parentCommit") not in (None, head.sha):
        raise Refused(412, None, "The branch has moved on")
    if revision not in repository.branches:
        raise Refused(400, None, "not a branch")
    files = dict(head.files)
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.stored[value["oid"]]
        elif line["key"] == "deletedFile":
            del files[value["path"]]
    sha = hub.add(repository.name, files, revision, title=header["summary"])
    return answer({"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{repository.name}/commit/{sha}"})


ROUTES = [
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", validate),
    ("POST", _API + _NAME + "/branch" + _REVISION, branch),
    ("POST", _API + _NAME + "/preupload" + _REVISION, preupload),
    ("POST", _NAME + r"\.git/info/lfs/objects/batch", batch),
    ("PUT", "/lfs-upload/(?P<sha256>[0-9a-f]+)", put),
    ("POST", _API + _NAME + "/commit" + _REVISION, commit),
]
