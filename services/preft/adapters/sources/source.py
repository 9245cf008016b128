"""Opens an adapter's source: a local folder, or a folder at s3://, gs://, http(s):// or hf://, as a few files to read.

The module owns which files make an adapter, and the errors for missing ones. `remote_files` reads files that aren't
local, `peers` those of other processes. Other modules check content and size. All calls block, and are safe in several
threads at once.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, suppress
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from preft.adapters.formats.digest import ADAPTER_FILES, CHUNK, CONFIG_FILE, LORA_FILES, REFT_CONFIG_FILE, REFT_FILES
from preft.adapters.formats.folder_texts import TEXT_BYTES, TEXT_FILES
from preft.adapters.formats.found_instead import explain
from preft.adapters.sources.limits import SourceLimits, SourceRules
from preft.adapters.sources.remote_files import FoundFile, RemoteFolder
from preft.adapters.sources.waiting import stop_error
from preft.core.errors import InvalidAdapter, PreftError, SourceNotFound, Unavailable
from preft.rpc.checked import CONTROL, MAX_TEXT

LISTED = 1000  # names read from a folder without an adapter, to explain what the folder holds
SCHEME = re.compile(r"([^/]*)://(.*)", re.DOTALL)
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}
UNLIMITED = SourceLimits()
MAX_URI = MAX_TEXT // 2  # a relative path gets longer when it is made absolute
SERVED = "a local path, s3://, gs://, http://, https:// or hf://"


class SourceFolder(Protocol):
    """A folder somewhere. `find` and `names` look into it, `read` reads one file. Raise as `LocalFolder`."""

    def find(self, names: Iterable[str]) -> dict[str, FoundFile]: ...

    def names(self) -> set[str]: ...

    def read(self, name: str) -> Iterator[bytes]: ...


class AdapterSource:
    """One adapter's source. `uri` is normalised: a local `uri` is an absolute path, and no `uri` ends in a slash.

    `place` is the scheme with host or bucket; "" for local sources. Slow sources of one place share its threads.
    """

    def __init__(self, uri: str, folder: SourceFolder, stop: threading.Event) -> None:
        self.uri = uri
        scheme, separator, rest = uri.partition("://")
        self.place = f"{scheme}://{rest.partition('/')[0]}" if separator else ""
        self._folder = folder
        self._stop = stop

    def files(self) -> dict[str, int | None]:
        """The adapter's files with their sizes in bytes; None where the server doesn't report a size.

        Raises SourceNotFound if no adapter file exists, InvalidAdapter if the files are not a whole adapter, and
        Unavailable if the source can't be reached.
        """
        return {name: found.size for name, found in self._adapter().items()}

    def read(self, name: str) -> Generator[bytes]:
        """The file's bytes, about 1 MiB at a time.

        Raises Unavailable if the source fails, stalls or ends early, and InvalidAdapter if the file is gone.
        """
        for chunk in self._folder.read(name):
            if self._stop.is_set():
                raise stop_error(self.uri)
            yield chunk

    def stamp(self) -> str:
        """A text that changes when a file is rewritten; "" if the source reports no versions. Raises as `files`.

        The stamp of a local folder is made of sizes, change times and inodes; that of a remote one, of the versions
        that the server reports. No file is read.
        """
        marks = [(name, found.mark) for name, found in self._adapter().items()]
        if not all(mark for _, mark in marks):
            return ""
        return hashlib.sha256(repr(marks).encode()).hexdigest()[:32]

    def text_files(self) -> dict[str, bytes]:
        """The beginnings of the folder's TEXT_FILES. Files that can't be read are left out."""
        texts = {}
        with suppress(PreftError):
            for name, found in self._folder.find(TEXT_FILES).items():
                if found.regular:
                    with closing(self.read(name)) as chunks:
                        texts[name] = _beginning(chunks, TEXT_BYTES)
        return texts

    def _adapter(self) -> dict[str, FoundFile]:
        found = self._folder.find(ADAPTER_FILES)
        names = [name for kind in (LORA_FILES, REFT_FILES) if any(name in found for name in kind) for name in kind]
        missing = [name for name in names if name not in found]
        if (missing or not names) and (instead := explain(self._folder.names(), self.uri)):
            raise InvalidAdapter(instead)
        if not names:
            raise SourceNotFound(
                f"there is no adapter in {self.uri}: it needs the files {' and '.join(LORA_FILES)}, "
                f"or {' and '.join(REFT_FILES)}"
            )
        if missing:
            raise InvalidAdapter(f"{missing[0]} is missing in {self.uri}")
        for name in names:
            if not found[name].regular:
                raise InvalidAdapter(f"{name} in {self.uri} is not a regular file")
        return {name: found[name] for name in names}


def open_source(uri: str, limits: SourceLimits = UNLIMITED, *, stop: threading.Event | None = None) -> AdapterSource:
    """The source at `uri`, without access to it yet. Once a thread sets `stop`, reading the source soon ends.

    Raises InvalidAdapter for an unknown scheme, a scheme whose package isn't installed, or a place that `limits`
    doesn't allow.
    """
    stop = stop or threading.Event()
    scheme, place = _split(uri)
    if not place.strip("/") and scheme not in ("", "file"):
        raise _refusal(f"{uri!r} names no place: write what comes after {scheme}://")
    if scheme in ("", "file"):
        path = _local_path(scheme, place)
        limits.rules.check_path(path)
        return AdapterSource(path, LocalFolder(path, limits.rules), stop)
    if scheme not in PACKAGES:
        raise _refusal(f"adapters can't be read from {scheme}://: name {SERVED}")
    if find_spec(PACKAGES[scheme]) is None:
        raise _refusal(
            f"{scheme}:// needs the package {PACKAGES[scheme]}: run pip install 'preft-serve[{scheme}]' on the server"
        )
    if PACKAGES[scheme] == "aiohttp":
        _check_web_address(uri)
    uri = f"{scheme}://{place.rstrip('/')}"
    limits.rules.check_uri(uri)
    return AdapterSource(uri, RemoteFolder(scheme, uri, limits, stop), stop)


class LocalFolder:
    """The folder at `path`. Symbolic links are followed as far as `rules` allow."""

    def __init__(self, path: str, rules: SourceRules) -> None:
        self._path = path
        self._rules = rules

    def find(self, names: Iterable[str]) -> dict[str, FoundFile]:
        """The files among `names` that exist.

        If none exists, raises SourceNotFound for a missing folder, InvalidAdapter if `path` isn't a folder, and
        Unavailable if the folder can't be read. Raises Unavailable for a file that can't be read.
        """
        found = {}
        for name in names:
            try:
                status = os.stat(f"{self._path}/{name}")
                self._rules.check_path(f"{self._path}/{name}")
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise Unavailable(f"{name} in {self._path} can't be read: {error.strerror}") from error
            mark = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
            found[name] = FoundFile(status.st_size, stat.S_ISREG(status.st_mode), mark)
        if not found:
            self._check_folder()
        return found

    def read(self, name: str) -> Generator[bytes]:
        """The file's bytes. Raises InvalidAdapter if it is missing or not a file, Unavailable if it can't be read."""
        try:
            # Without O_NONBLOCK, opening a pipe that has replaced the file would wait for a writer.
            with open(f"{self._path}/{name}", "rb", buffering=0, opener=_open_without_waiting) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise InvalidAdapter(f"{name} in {self._path} is not a regular file")
                self._rules.check_path(f"/proc/self/fd/{file.fileno()}")  # the opened file, even if it was renamed
                while chunk := file.read(CHUNK):
                    yield chunk
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise InvalidAdapter(f"{name} is missing in {self._path}") from error
        except OSError as error:
            raise Unavailable(f"{name} in {self._path} can't be read: {error.strerror}") from error

    def names(self) -> set[str]:
        """Names in the folder, and adapter configurations in its subfolders. Empty if the folder can't be listed."""
        names: set[str] = set()
        with suppress(OSError), os.scandir(self._path) as entries:
            for entry in islice(entries, LISTED):
                inside = (f"{entry.name}/{config}" for config in (CONFIG_FILE, REFT_CONFIG_FILE))
                names |= {name for name in inside if os.path.exists(f"{self._path}/{name}")} or {entry.name}
        return names

    def _check_folder(self) -> None:
        folder = Path(self._path)
        try:
            mode = folder.stat().st_mode
        except (FileNotFoundError, NotADirectoryError) as error:
            raise SourceNotFound(f"there is no folder {folder}") from error
        except OSError as error:
            raise Unavailable(f"{folder} can't be read: {error.strerror}") from error
        if not stat.S_ISDIR(mode):
            raise InvalidAdapter(f"{folder} is not a folder")


def _beginning(chunks: Iterable[bytes], size: int) -> bytes:
    content = b""
    for chunk in chunks:
        content += chunk
        if len(content) >= size:
            break
    return content[:size]


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _split(uri: str) -> tuple[str, str]:
    if not uri or len(uri) > MAX_URI or CONTROL.search(uri):  # workers would refuse this source
        raise _refusal(f"no adapter can be at {uri[:100]!r}: name {SERVED}")
    match = SCHEME.fullmatch(uri)
    return (match[1].lower(), match[2]) if match else ("", uri)


def _local_path(scheme: str, place: str) -> str:
    if scheme == "":
        return os.path.abspath(os.path.expanduser(place))
    host, slash, path = place.partition("/")
    if host not in ("", "localhost") or not slash:
        raise _refusal(f"'file://{place}' is no local place: write file:///absolute/path, or the path alone")
    return os.path.abspath(f"/{unquote(path)}")


def _check_web_address(uri: str) -> None:
    try:
        parts = urlsplit(uri)
        whole = bool(parts.hostname) and parts.port != 0
    except ValueError:
        whole = False
    if not whole:
        raise _refusal(f"{uri!r} is no web address: write http://host/folder")
    if parts.query or parts.fragment or parts.username is not None:
        raise _refusal("a web address with a query, a fragment or a user can't be a source: name the folder alone")


def _refusal(message: str) -> InvalidAdapter:
    return InvalidAdapter(message, param="source")
