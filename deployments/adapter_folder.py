"""The folder that the adapters of a model lie in: what comes into it, what is in it, what goes.

There is no other record of an uploaded adapter than its sub-folder, so whoever shares the folder (every router and
decoder of the model must) sees the same. A sub-folder appears whole, by being renamed, and goes in the same way:
readers find all of an adapter or nothing. Names that begin with a dot are ours, and no adapter's.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from omnilmm.errors import CheckpointError, ConfigError, InvalidRequest, NotFound, Overloaded, PayloadTooLarge
from omnilmm.files.blobs import sync_folder
from omnilmm.models.adapter_files import CONFIG_FILE, NAME, AdapterCatalog, AdapterFacts
from omnilmm.models.adapter_header import WEIGHTS_FILE

RECORD_FILE: Final = "omnilmm_adapter.json"
MAX_UPLOADED: Final = 1000
"""Adapters that may lie in one folder."""
ABANDONED_S: Final = 3600.0
"""When an upload that nobody finished is swept away."""
_MAX_RECORD_BYTES: Final = 64 * 1024
_INCOMING, _OUTGOING = ".incoming-", ".outgoing-"


@dataclass(frozen=True, slots=True)
class Record:
    """What an uploaded adapter's folder says of it.

    Attributes:
        digest: of its two files, as of `omnilmm.models.adapter_files.AdapterWeights`.
        num_bytes: of its weights.
        created_at: Unix time in seconds.
        tenants: who may use it; None is everybody.
    """

    digest: str
    rank: int
    num_bytes: int
    created_at: int
    tenants: tuple[str, ...] | None


def read_record(folder: Path) -> Record | None:
    """The record of the adapter in `folder`; None if it was put there by other means.

    One that is not as we write it belongs to nobody: what the owner wanted is then not known.
    """
    try:
        descriptor = os.open(folder / RECORD_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError:
        return _UNREADABLE
    try:
        with os.fdopen(descriptor, "rb") as file:
            return _parse(json.loads(file.read(_MAX_RECORD_BYTES)))
    except (OSError, ValueError, RecursionError):
        return _UNREADABLE


_UNREADABLE: Final = Record("", 0, 0, 0, ())


def _parse(document: Any) -> Record:
    match document:
        case {
            "digest": str(digest),
            "rank": int(rank),
            "num_bytes": int(num_bytes),
            "created_at": int(created_at),
            "tenants": None | list() as tenants,
        } if tenants is None or all(isinstance(tenant, str) for tenant in tenants):
            return Record(digest, rank, num_bytes, created_at, None if tenants is None else tuple(tenants))
    return _UNREADABLE


class Incoming:
    """An upload on its way: `write` takes the bytes of its weights."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self._left = max_bytes
        self._file = open(folder / WEIGHTS_FILE, "xb")  # noqa: SIM115  closed by `close`

    def write(self, piece: bytes) -> None:
        """Raises PayloadTooLarge, and Overloaded where the disk takes no more."""
        self._left -= len(piece)
        if self._left < 0:
            raise PayloadTooLarge("The adapter has more bytes than one for this model can have.", code="file_too_large")
        try:
            self._file.write(piece)
        except OSError:
            raise _full() from None

    def close(self) -> None:
        """All bytes are on the disk."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            raise _full() from None
        finally:
            self._file.close()

    def discard(self) -> None:
        """Whatever became of it, nothing stays."""
        with suppress(OSError):
            self._file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class AdapterFolder:
    """Puts adapters into a folder and takes them out. Calls block; thread-safe, and safe beside other processes.

    Args:
        folder: must be there, and writable for uploads.
        check: tells of the adapter in a folder, or raises CheckpointError.
        max_bytes: what the weights of one may have.
    """

    def __init__(self, folder: Path, check: Callable[[Path], AdapterFacts], *, max_bytes: int) -> None:
        if not folder.is_dir():
            raise ConfigError("adapters.folder is not a folder on this node", param="adapters.folder")
        self.max_bytes: Final = max_bytes
        self._folder = folder
        self._check = check

    @contextmanager
    def receive(self) -> Iterator[Incoming]:
        """A place for an upload. What is not `put` before the block ends is gone after it.

        Raises:
            Overloaded: nothing can be written there.
        """
        self._sweep()
        place = self._folder / f"{_INCOMING}{secrets.token_hex(8)}"
        try:
            place.mkdir(mode=0o755)
            incoming = Incoming(place, self.max_bytes)
        except OSError:
            raise _full() from None
        try:
            yield incoming
        finally:
            incoming.discard()

    def put(self, incoming: Incoming, name: str, settings: bytes, tenants: tuple[str, ...] | None) -> Record:
        """Check an upload and give it its name, at once and whole. `settings` are those of its adapter_config.json.

        Raises:
            InvalidRequest: `invalid_adapter` and what is wrong with it; `already_exists`; `too_many_adapters`.
            Overloaded: it could not be written.
        """
        if not NAME.fullmatch(name):
            raise InvalidRequest(
                "'name' must be 1 to 63 of A-Z a-z 0-9 . _ - and begin with none of . _ -", param="name"
            )
        if len(AdapterCatalog(self._folder).names()) >= MAX_UPLOADED:
            raise InvalidRequest(f"A model may have {MAX_UPLOADED} adapters.", code="too_many_adapters")
        incoming.close()
        _write(incoming.folder / CONFIG_FILE, settings)
        try:
            facts = self._check(incoming.folder)
        except CheckpointError as error:
            raise InvalidRequest(error.message, code="invalid_adapter") from None
        record = Record(facts.digest, facts.rank, facts.num_bytes, int(time.time()), tenants)
        _write(incoming.folder / RECORD_FILE, json.dumps(asdict(record)).encode())
        sync_folder(incoming.folder)
        try:
            incoming.folder.rename(self._folder / name)  # fails if there is a folder that holds something
            sync_folder(self._folder)
        except OSError:
            if (self._folder / name).exists():
                raise InvalidRequest(
                    "There is an adapter of this name: delete it first.", param="name", code="already_exists"
                ) from None
            raise _full() from None
        return record

    def remove(self, name: str) -> None:
        """Take an uploaded adapter away, at once and whole. Decoders that hold it in memory keep it while it is used.

        Raises:
            NotFound: there is none that was uploaded under this name.
            Overloaded: it cannot be moved.
        """
        folder = AdapterCatalog(self._folder).find(name)
        if folder is None or read_record(folder) is None:
            raise NotFound("There is no uploaded adapter of this name.", code="adapter_not_found")
        gone = self._folder / f"{_OUTGOING}{secrets.token_hex(8)}"
        try:
            folder.rename(gone)
            sync_folder(self._folder)
        except FileNotFoundError:
            raise NotFound("There is no uploaded adapter of this name.", code="adapter_not_found") from None
        except OSError:
            raise _full() from None
        shutil.rmtree(gone, ignore_errors=True)

    def _sweep(self) -> None:
        """Take away what killed processes left."""
        with suppress(OSError):
            for entry in os.scandir(self._folder):
                ours = entry.name.startswith((_INCOMING, _OUTGOING)) and entry.is_dir(follow_symlinks=False)
                if ours and time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED_S:
                    shutil.rmtree(entry.path, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        raise _full() from None


def _full() -> Overloaded:
    return Overloaded("The server's folder of adapters cannot be written.", code="storage_unavailable", retry_after=1.0)
