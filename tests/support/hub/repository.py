"""The repositories of the stand-in Hub: files by revision, and what a listing says of them."""

import hashlib
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

Gated = Literal[False, "auto", "manual"]
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".zip", ".ckpt")
LFS_SIZE = 10_000_000


@dataclass(frozen=True)
class StoredFile:
    """One file at one revision."""

    path: str
    content: bytes

    @property
    def is_lfs(self) -> bool:
        """Whether it is kept in the storage and not in git."""
        return self.path.endswith(LFS_SUFFIXES) or len(self.content) > LFS_SIZE

    @cached_property
    def sha256(self) -> str:
        """Of its content, in hex."""
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git holds in the place of a file in the storage."""
        lines = "version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}"
        return "\n".join([*lines, f"size {len(self.content)}", ""]).encode()

    @cached_property
    def blob_id(self) -> str:
        """The git object id of the content, or of the pointer to it."""
        blob = self.pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        """Without quotes: the sha256 of what is in the storage, the git object id of the rest."""
        return self.sha256 if self.is_lfs else self.blob_id


Files = Mapping[str, StoredFile]


@dataclass
class Repository:
    """A model repository.

    Args:
        id: `owner/name`.
        files: path -> content, the first commit on main.
        tags: what listings filter by, besides the library.
        gated: who may read the files: anyone, whom a form lets in, or whom the owner does.
        private: neither listed nor found without a token that opens it.
        disabled: listed, but closed by the Hub.
        created_at, last_modified: ISO 8601 with milliseconds and a Z.
    """

    id: str
    files: InitVar[Mapping[str, bytes]]
    tags: tuple[str, ...] = ()
    library_name: str | None = "peft"
    gated: Gated = False
    private: bool = False
    disabled: bool = False
    downloads: int = 0
    likes: int = 0
    created_at: str = "2025-01-01T00:00:00.000Z"
    last_modified: str = "2025-01-01T00:00:00.000Z"
    commits: dict[str, Files] = field(default_factory=dict, init=False, repr=False)
    branches: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self, files: Mapping[str, bytes]) -> None:
        self.commit(files)

    @classmethod
    def from_folder(cls, repo_id: str, folder: Path) -> "Repository":
        """A repository of the files in a folder, such as a base model."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return cls(repo_id, {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths})

    @property
    def author(self) -> str:
        """Its owner."""
        return self.id.partition("/")[0]

    @property
    def sha(self) -> str:
        """The newest commit on main."""
        return self.branches["main"]

    @property
    def newest(self) -> Files:
        """The files at that commit."""
        return self.commits[self.sha]

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Replaces what a branch holds by these files; the new commit's id, 40 hex digits."""
        stored = {path: StoredFile(path, content) for path, content in files.items()}
        digest = hashlib.sha1(f"{self.id}@{branch}:{len(self.commits)}".encode())
        for path, file in sorted(stored.items()):
            digest.update(f"{path}\0{file.blob_id}\0".encode())
        sha = digest.hexdigest()
        self.commits[sha] = stored
        self.branches[branch] = sha
        return sha

    def find_commit(self, revision: str) -> str | None:
        """The commit that a branch name or a commit id means."""
        if revision in self.branches:
            return self.branches[revision]
        return revision if revision in self.commits else None

    def find_blob(self, sha256: str) -> bytes | None:
        """What the storage holds under a digest, at whatever revision."""
        for files in self.commits.values():
            for file in files.values():
                if file.is_lfs and file.sha256 == sha256:
                    return file.content
        return None
