"""What the Hub answers to whom."""

from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, urlencode

from support.hub.listing import FULL, chosen, facts_of, fields_asked, listing, page_of
from support.hub.messages import Answer, Request, as_json, error, file_answer
from support.hub.repository import Files, Repository, StoredFile
from support.hub.shelves import Refused, Shelves, check_gate, find_commit, find_repository


def answer_hub(request: Request, shelves: Shelves) -> Answer:
    """The answer of the Hub's own origin."""
    try:
        return _route(request, shelves)
    except Refused as refused:
        return refused.answer


def answer_storage(request: Request, shelves: Shelves) -> Answer:
    """The answer of the storage: bytes for whoever has the signed link, and never a token."""
    if request.authorization is not None:
        return error(400, "Only one auth mechanism allowed")
    if request.parameter("Signature") is None:
        return error(403, "Access Denied")
    *repo_id, sha256 = request.parts
    repository = shelves.repositories.get("/".join(repo_id))
    content = repository.find_blob(sha256) if repository else None
    if content is None:
        return error(404, "The specified key does not exist.")
    return file_answer(content, request.range).with_headers(ETag=f'"{sha256[:32]}"')


def _route(request: Request, shelves: Shelves) -> Answer:
    if request.token is not None and request.token not in shelves.tokens:
        raise Refused(error(401, "Invalid credentials in Authorization header"))
    match request.parts:
        case ["api", "models"]:
            return listing(request, shelves)
        case ["api", "models", owner, name]:
            repository = find_repository(request, shelves, owner, name)
            return _info(request, repository, "main")
        case ["api", "models", owner, name, "revision", revision]:
            repository = find_repository(request, shelves, owner, name)
            return _info(request, repository, revision)
        case ["api", "models", owner, name, "tree", revision, *folder]:
            repository = find_repository(request, shelves, owner, name)
            return _tree(request, shelves, repository, revision, "/".join(folder))
        case [owner, name, "resolve", revision, *path]:
            repository = find_repository(request, shelves, owner, name)
            return _resolve(request, shelves, repository, revision, "/".join(path))
    raise Refused(error(404, "Sorry, we can't find the page you are looking for."))


def _info(request: Request, repository: Repository, revision: str) -> Answer:
    sha = find_commit(repository, revision)
    facts = facts_of(repository, sha)
    if request.parameter("blobs") == "true":
        facts["siblings"] = [_sibling_with_blob(file) for file in repository.commits[sha].values()]
    return as_json(chosen(facts, fields_asked(request, FULL)))


def _sibling_with_blob(file: StoredFile) -> dict[str, Any]:
    sibling: dict[str, Any] = {
        "rfilename": file.path,
        "size": len(file.content),
        "blobId": file.blob_id,
    }
    return {**sibling, "lfs": _lfs(file, "sha256")} if file.is_lfs else sibling


def _lfs(file: StoredFile, digest_name: str) -> dict[str, Any]:
    size = len(file.content)
    return {digest_name: file.sha256, "size": size, "pointerSize": len(file.pointer)}


def _tree(
    request: Request, shelves: Shelves, repository: Repository, revision: str, folder: str
) -> Answer:
    sha = find_commit(repository, revision)
    recursive = request.parameter("recursive") == "true"
    entries = [
        entry
        for entry in _entries(repository.commits[sha])
        if _is_in(entry["path"], folder, recursive)
    ]
    if folder and not entries:
        missing = error(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        raise Refused(missing.with_headers(X_Repo_Commit=sha))
    page, link = page_of(request, shelves, entries)
    answer = as_json(page).with_headers(X_Repo_Commit=sha)
    return answer.with_headers(Link=link) if link else answer


def _entries(files: Files) -> list[dict[str, Any]]:
    parents = {str(parent) for path in files for parent in PurePosixPath(path).parents}
    folders = [
        {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
        for path in sorted(parents - {".", "/"})
    ]
    return folders + [_entry(file) for file in files.values()]


def _entry(file: StoredFile) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": file.path,
        "size": len(file.content),
        "oid": file.blob_id,
    }
    return {**entry, "lfs": _lfs(file, "oid")} if file.is_lfs else entry


def _is_in(path: str, folder: str, recursive: bool) -> bool:
    if folder and not path.startswith(folder + "/"):
        return False
    return recursive or "/" not in path.removeprefix(folder + "/" if folder else "")


def _resolve(
    request: Request, shelves: Shelves, repository: Repository, revision: str, path: str
) -> Answer:
    check_gate(request, shelves, repository)
    sha = find_commit(repository, revision)
    file = repository.commits[sha].get(path)
    if file is None:
        missing = error(404, "Entry not found", "EntryNotFound")
        raise Refused(missing.with_headers(X_Repo_Commit=sha))
    if not file.is_lfs:
        answer = file_answer(file.content, request.range)
        return answer.with_headers(ETag=f'"{file.etag}"', X_Repo_Commit=sha)
    signed = urlencode({"Signature": file.sha256[:16], "filename": path})
    headers = {
        "Location": f"{shelves.storage_url}/{quote(repository.id)}/{file.sha256}?{signed}",
        "X-Linked-ETag": f'"{file.etag}"',
        "X-Linked-Size": str(len(file.content)),
        "X-Repo-Commit": sha,
    }
    return Answer(302, headers)
