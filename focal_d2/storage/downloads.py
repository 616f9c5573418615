"""Files that an address names: fetched into the cache folder, from detectron2's stores or where allowed."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import re
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any
from urllib.parse import unquote, urljoin, urlsplit

from detectron2.checkpoint.catalog import ModelCatalog

from focal_d2.errors import UserError, describe_error
from focal_d2.storage.files import LARGEST_DOWNLOAD

# Ends the line that refuses an address: the flag is that of focal_d2.engine.add_trust_flag.
UNLESS_ALLOWED = " (unless you trust the address: --allow-download of train, eval and predict)"
PATIENCE = 30.0  # seconds without a byte
SLOWEST = 10_000  # bytes per second, on average, after the first PATIENCE

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_HOST = "https://dl.fbaipublicfiles.com/"
# The models of detectron2 and Detectron with their ImageNet weights, and those of pycls, which detectron2's
# own configs name.
_STORES = ("detectron2/", "detectron/", "pycls/")
# A part of a path that is the same for every server and file system; never "." or "..".
_PART = re.compile(r"(?!\.+$)[\w.,+=:@~()-]{1,200}", re.ASCII)


def is_address(path: str) -> bool:
    """Return whether a path starts with a scheme, like https://. Such a text never names a local file."""
    return _SCHEME.match(path) is not None


def join_address(address: str, name: str) -> str:
    """Return the address that `name` means in a file that came from `address`."""
    return name if is_address(name) else urljoin(_url(address), name)


def check_address(address: str, *, allow_download: bool) -> str:
    """Return the URL of an address, if it may be fetched.

    Args:
        address: detectron2://…, catalog://…, https://… or http://….
        allow_download: accept other places than detectron2's stores.

    Raises:
        UserError: if it may not.
    """
    url = _url(address)
    if _is_in_store(url):
        return url
    if not allow_download:
        raise UserError(f"{address} is not in the stores of detectron2{UNLESS_ALLOWED}")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable or not re.fullmatch(r"[!-~]+", url):
        raise UserError(
            f"{address!r} can't be fetched; legal are https://, http://, detectron2://, catalog://"
        )
    return url


def fetch(address: str, *, allow_download: bool, limit: int = LARGEST_DOWNLOAD) -> str:
    """Return the local copy of the file that an address names; download it if there is none.

    The copy is in $FVCORE_CACHE or ~/.torch/iopath_cache. A file of detectron2's stores has the place there
    that detectron2 gives it, so that both use the same copy. Any other has a place that is computed from the
    address, so that no address can choose where it is written or be taken for another.

    Args:
        address: detectron2://…, catalog://…, https://… or http://….
        allow_download: accept other places than detectron2's stores.
        limit: the most bytes that the file may have.

    Raises:
        UserError: if it may not be fetched, or can't be.
    """
    url = check_address(address, allow_download=allow_download)
    root = cache_folder()
    target = os.path.join(root, *_place(url))
    folder = os.path.dirname(target)
    if os.path.commonpath([os.path.realpath(root), os.path.realpath(folder)]) != os.path.realpath(root):
        raise UserError(f"{address}: {folder} is linked to a place outside the cache folder {root}")
    if os.path.isfile(target):
        return target
    try:
        os.makedirs(folder, exist_ok=True)
        with locked(f"{target}.lock"):
            if not os.path.isfile(target):
                _download(url, target, allow_download=allow_download, limit=limit)
    except UserError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{address} can't be fetched into {folder}: {describe_error(error)}") from error
    return target


def cache_folder() -> str:
    """Return the folder of what was downloaded: $FVCORE_CACHE, or detectron2's default."""
    return os.path.expanduser(os.environ.get("FVCORE_CACHE", "~/.torch/iopath_cache"))


def _url(address: str) -> str:
    scheme, _, rest = address.partition("://")
    if scheme == "detectron2":
        return f"{_HOST}detectron2/{rest}"
    if scheme == "catalog":
        try:
            return str(ModelCatalog.get(rest))
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{address}: detectron2's catalog has no such model") from error
    return address


def _is_in_store(url: str) -> bool:
    parts = url.removeprefix(_HOST).split("/")
    return url.startswith(tuple(_HOST + x for x in _STORES)) and all(
        _PART.fullmatch(unquote(x)) for x in parts
    )


def _place(url: str) -> list[str]:
    """Return where the copy lies below the cache folder."""
    if _is_in_store(url):
        return url.removeprefix(_HOST).split("/")
    name = re.sub(r"[^\w.-]", "_", urlsplit(url).path.rsplit("/", 1)[-1], flags=re.ASCII)
    # The ending tells the reader the format.
    return ["other", hashlib.sha256(url.encode()).hexdigest()[:32], name[-100:].lstrip(".") or "file"]


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold a lock, so that only one process downloads at a time."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _download(url: str, target: str, *, allow_download: bool, limit: int) -> None:
    # A new file of this name and no other: nothing that lies in the folder is written through.
    handle, aside = tempfile.mkstemp(dir=os.path.dirname(target), suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            allow = allow_download and not _is_in_store(url)  # a store stays one, wherever it redirects to
            transfer = _Transfer(url, file, allow_download=allow, limit=limit)
            start = time.monotonic()
            transfer.start()
            while transfer.is_alive():
                transfer.join(0.5)
                if time.monotonic() - start > PATIENCE + transfer.received / SLOWEST:
                    raise TimeoutError(f"{transfer.received} bytes in {time.monotonic() - start:.0f} seconds")
            if transfer.error is not None:
                raise transfer.error
        os.chmod(aside, 0o644)  # mkstemp's is for one user, and a cache folder may be shared
        os.replace(aside, target)
    finally:
        with suppress(FileNotFoundError):
            os.remove(aside)


class _Transfer(threading.Thread):
    """A download in a thread that can be abandoned, since a server may stop sending at any time."""

    def __init__(self, url: str, file: IO[bytes], *, allow_download: bool, limit: int) -> None:
        super().__init__(daemon=True)
        self.received = 0  # bytes
        self.error: Exception | None = None
        self._url, self._file, self._limit = url, file, limit
        self._redirects = _Redirects(allow_download)

    def run(self) -> None:
        """Fill the file, or set `error`."""
        try:
            self._run()
        except Exception as error:
            self.error = error

    def _run(self) -> None:
        # Python's own list of handlers also has those of ftp://, file:// and data:.
        opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            self._redirects,
        ):
            opener.add_handler(handler)
        with opener.open(self._url, timeout=PATIENCE) as response:
            length = response.headers.get("Content-Length")
            expected = int(length) if length is not None else None
            if expected is not None and expected > self._limit:
                raise ValueError(f"it has {expected} bytes, more than {self._limit}")
            while block := response.read1(2**20):
                self.received += len(block)
                if self.received > self._limit:
                    raise ValueError(f"it has more than {self._limit} bytes")
                self._file.write(block)
        if self.received == 0 or expected not in (None, self.received):
            raise ValueError(f"it ended after {self.received} of {expected or 'at least 1'} bytes")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow a redirect only to where the first address could have led."""

    def __init__(self, allow_download: bool) -> None:
        self._allow_download = allow_download

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Check the new address."""
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise UserError(f"{req.full_url} is redirected to {newurl}, which is not encrypted")
        check_address(newurl, allow_download=self._allow_download)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
