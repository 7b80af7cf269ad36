"""Where a run's input and output lie: on a disk of this machine, or in a store that fsspec knows by its URL.

Paths are the quick way and stay plain files. A URL (s3://bucket/key, gs://, memory://, file:///path ...) goes through
fsspec, whose driver for that store must be installed. Locations are values: they may travel to other processes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from posixpath import basename, dirname
from typing import Any, BinaryIO, cast

from omnilmm.errors import ConfigError

SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")


@dataclass(frozen=True, slots=True)
class OnDisk:
    """A path."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def suffix(self) -> str:
        """In small letters, with its dot."""
        return self.path.suffix.lower()

    @property
    def scheme(self) -> str:
        return ""

    @property
    def parent(self) -> OnDisk:
        return OnDisk(self.path.parent)

    def join(self, name: str) -> OnDisk:
        return OnDisk(self.path / name)

    def is_folder(self) -> bool:
        return self.path.is_dir()

    def is_file(self) -> bool:
        return self.path.is_file()

    def files(self) -> list[str]:
        """Names of all files under this folder, relative to it, sorted."""
        return sorted(path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file())

    def open(self) -> BinaryIO:
        return self.path.open("rb")

    def read(self) -> bytes:
        return self.path.read_bytes()

    def read_part(self, offset: int, length: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def version(self) -> list[object]:
        """Changes when the content does."""
        stat = self.path.stat()
        return [str(self.path.resolve()), *([stat.st_size, stat.st_mtime_ns] if self.path.is_file() else [])]

    @contextmanager
    def replacing(self, scratch: Path) -> Iterator[Path]:
        """A path to write to; when the block ends, what was written is in place: whole, or not at all."""
        part = self.path.with_name(self.path.name + ".part")
        try:
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class InStore:
    """A URL. Methods raise what the store's driver raises, which is OSError where it knows better than to invent."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return basename(self.url.rstrip("/"))

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix.lower()

    @property
    def scheme(self) -> str:
        return self.url.partition("://")[0]

    @property
    def parent(self) -> InStore:
        return InStore(dirname(self.url.rstrip("/")))

    def join(self, name: str) -> InStore:
        return InStore(f"{self.url.rstrip('/')}/{name}")

    def is_folder(self) -> bool:
        store, path = self._store()
        return bool(store.isdir(path))

    def is_file(self) -> bool:
        store, path = self._store()
        return bool(store.isfile(path))

    def files(self) -> list[str]:
        store, path = self._store()
        root = path.rstrip("/") + "/"
        return sorted(name.removeprefix(root) for name in store.find(path))

    def open(self) -> BinaryIO:
        store, path = self._store()
        return cast(BinaryIO, store.open(path, "rb"))

    def read(self) -> bytes:
        store, path = self._store()
        return cast(bytes, store.cat_file(path))

    def read_part(self, offset: int, length: int) -> bytes:
        store, path = self._store()
        return cast(bytes, store.cat_file(path, start=offset, end=offset + length))

    def version(self) -> list[object]:
        store, path = self._store()
        if store.isdir(path):
            return [self.url]
        info = store.info(path)
        marks = (info.get(name) for name in ("ETag", "etag", "mtime", "LastModified", "last_modified", "created"))
        return [self.url, info.get("size"), *(str(mark) for mark in marks if mark is not None)]

    @contextmanager
    def replacing(self, scratch: Path) -> Iterator[Path]:
        """A path in `scratch` to write to; when the block ends, it is brought into the store under another name and
        then moved. The move is a rename where the store has renames, else a copy of the whole object and a removal:
        readers never see half a file under the right name, but a crash between the two can leave NAME.part there."""
        written = scratch / "output"
        try:
            yield written
            store, path = self._store()
            store.put_file(str(written), path + ".part")
            store.mv(path + ".part", path)
        finally:
            written.unlink(missing_ok=True)

    def _store(self) -> tuple[Any, str]:
        """The file system, which fsspec keeps per process, and the path in it."""
        import fsspec  # type: ignore[import-untyped]

        try:
            return fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise ConfigError(f"{self.scheme}:// needs a driver: {error}") from None
        except ValueError as error:
            raise ConfigError(f"{self.url}: {error}") from None


Location = OnDisk | InStore


def locate(path_or_url: str | Path) -> Location:
    """Whatever has a scheme is a URL."""
    if isinstance(path_or_url, str) and SCHEME.match(path_or_url):
        return InStore(path_or_url)
    return OnDisk(Path(path_or_url))
