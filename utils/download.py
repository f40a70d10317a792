"""Fetch published datasets: downloads that go on after a break, checked where there is a checksum, unpacked safely."""

import hashlib
import http.client
import shutil
import ssl
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from .log import DataError, log

ATTEMPTS = 5  # breaks in a row that brought nothing new
TIMEOUT = 60  # seconds without a byte
CHUNK = 1 << 20  # bytes
EXPANSION = 100  # times an archive may grow; pictures hardly do, COCO's annotations fourfold


class Archive(NamedTuple):
    """An address and the MD5 of what lies there, where one is known."""

    url: str
    md5: str = ""


_COCO = "http://images.cocodataset.org"
_VOC = "http://host.robots.ox.ac.uk/pascal/VOC"
ARCHIVES = {  # COCO and Oxford Hand publish no checksums; zip and gzip carry their own. VOC's: torchvision.datasets.voc
    "coco": (
        Archive(f"{_COCO}/annotations/annotations_trainval2017.zip"),
        Archive(f"{_COCO}/zips/val2017.zip"),
        Archive(f"{_COCO}/zips/train2017.zip"),
    ),
    "voc": (
        Archive(f"{_VOC}/voc2007/VOCtrainval_06-Nov-2007.tar", "c52e279531787c972589f7e41ab4ae64"),
        Archive(f"{_VOC}/voc2007/VOCtest_06-Nov-2007.tar", "b6e924de25625d8de591ea690078ad9f"),
        Archive(f"{_VOC}/voc2012/VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd"),
    ),
    "oxfordhand": (Archive("https://www.robots.ox.ac.uk/~vgg/data/hands/downloads/hand_dataset.tar.gz"),),
}
PAGES = {  # where a person has to go
    "visdrone": (
        "is on Google Drive (https://github.com/VisDrone/VisDrone-Dataset, task 1)",
        "VisDrone2019-DET-train and VisDrone2019-DET-val",
    ),
    "bdd100k": (
        "needs an account (http://bdd-data.berkeley.edu)",
        "images/100k of '100K Images' and labels/det_20 of 'Detection 2020 Labels'",
    ),
    "dior": (
        "is on Google Drive (https://gcheng-nwpu.github.io/#Datasets)",
        "Annotations, ImageSets, JPEGImages-trainval and JPEGImages-test",
    ),
}


def download(name: str, folder: Path) -> None:
    """Fetch and unpack the archives of a dataset into `folder`; what is there already stays. Raises DataError."""
    if name in PAGES:
        where, what = PAGES[name]
        raise DataError(
            f"--download: {name} {where}: unpack it to {folder} so that it holds {what}, and leave the flag"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for archive in ARCHIVES[name]:
            done = folder / f".{PurePosixPath(archive.url).name}.unpacked"
            if not done.exists():
                unpack(fetch(archive, folder), folder)
                done.touch()
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: cannot be written: {error.strerror} (run again to go on)"
        ) from None


def fetch(archive: Archive, folder: Path) -> Path:
    """Download into `folder`, going on where an earlier attempt broke off, and give the file. Raises DataError."""
    if not archive.url.startswith(("http://", "https://")):
        raise DataError(f"{archive.url}: expected http or https")
    target = folder / PurePosixPath(archive.url).name
    if target.exists():
        return target
    partial, tag = target.with_name(f"{target.name}.partial"), target.with_name(f"{target.name}.tag")
    failures = 0
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            problem = _continue(archive.url, partial, tag)
        except urllib.error.HTTPError as error:
            raise DataError(f"{archive.url}: {error.code} {error.reason}") from None
        except (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError) as error:
            problem = str(getattr(error, "reason", "") or error) or type(error).__name__
        if not problem:
            break
        failures = 0 if partial.exists() and partial.stat().st_size > before else failures + 1
        if failures == ATTEMPTS:
            raise DataError(f"{archive.url}: {problem} (run again to go on from {before:,} bytes)")
        log.info("%s: %s; going on", target.name, problem)
        time.sleep(failures)
    if archive.md5 and (found := _md5(partial)) != archive.md5:
        partial.unlink()
        tag.unlink(missing_ok=True)
        raise DataError(f"{archive.url}: has MD5 {found}, expected {archive.md5} (removed; run again)")
    log.info("%s: %s", target.name, "its MD5 is right" if archive.md5 else "the publisher gives no checksum")
    tag.unlink(missing_ok=True)
    return partial.replace(target)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .zip or .tar[.gz] into `folder`. Files that are there in full stay.

    Raises DataError for a broken archive, and before anything is written for one with a path outside `folder`, a link,
    a device, or an absurd size.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                found = [(info.filename, info.file_size, _zip_kind(info), info) for info in opened.infolist()]
                _write_all(archive, folder, found, opened.open)
        else:
            with tarfile.open(archive) as opened:
                found = [(info.name, info.size, _tar_kind(info), info) for info in opened]
                _write_all(archive, folder, found, opened.extractfile)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{archive}: broken archive: {error} (remove it and download it again)") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise DataError(f"{archive}: broken archive: {error} (remove it and download it again)") from None  # gzip's own


def _continue(url: str, partial: Path, tag: Path) -> str:
    """Ask for what is missing and append it. Returns what is wrong, empty where the file is whole."""
    have = partial.stat().st_size if partial.exists() else 0
    headers = {"User-Agent": "darkslim"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if tag.exists():
            headers["If-Range"] = tag.read_text()  # a changed file comes anew, from its start
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return ""  # nothing is missing
        if error.code == 416:
            partial.unlink()
            return "has another length than before, from its start"
        if error.code in (429, 500, 502, 503, 504):
            return f"{error.code} {error.reason}"
        raise
    with response:
        if response.headers.get_content_type() == "text/html":
            raise DataError(f"{url}: answers with a web page (expected an archive)")
        is_rest = response.status == 206
        if is_rest and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise DataError(f"{url}: sends another part than asked for ({response.headers.get('Content-Range')})")
        start = have if is_rest else 0
        total = start + int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
        if version := response.headers.get("ETag") or response.headers.get("Last-Modified"):
            tag.write_text(version)
        _check_space(partial.parent, (total or 0) - start)
        bar = tqdm(desc=PurePosixPath(url).name, initial=start, total=total, unit="B", unit_scale=True)
        with bar, partial.open("ab" if is_rest else "wb") as file:
            while chunk := response.read1(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            end = file.tell()
    return "" if total in (None, end) else f"broke off at {end:,} of {total:,} bytes"


def _write_all(archive: Path, folder: Path, found: list[tuple[str, int, str, Any]], opener: Callable[..., IO]) -> None:
    """Check every member (name, size, kind, itself), then write the files."""
    limit = EXPANSION * archive.stat().st_size + CHUNK
    total = 0
    for name, size, kind, _ in found:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in name or "\0" in name:
            raise DataError(f"{archive}: {name!r} leads out of {folder} (nothing was unpacked)")
        if kind not in ("file", "folder"):
            raise DataError(f"{archive}: {name!r} is a {kind} (expected files and folders; nothing was unpacked)")
        total += size
        if total > limit:
            raise DataError(f"{archive}: grows more than {EXPANSION} times (nothing was unpacked)")
    folder.mkdir(parents=True, exist_ok=True)
    _check_space(folder, total)
    root = folder.resolve()
    for name, size, kind, member in tqdm(found, desc=f"unpacking {archive.name}", unit="file"):
        path = folder / name.replace("\\", "/")
        if not path.parent.resolve().is_relative_to(root):
            raise DataError(f"{path}: a link leads out of {folder} (remove it)")
        if kind == "folder":
            path.mkdir(parents=True, exist_ok=True)
        elif not (path.is_file() and path.stat().st_size == size):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.partial")
            with opener(member) as source, partial.open("wb") as file:
                shutil.copyfileobj(source, file, CHUNK)
            partial.replace(path)


def _zip_kind(info: zipfile.ZipInfo) -> str:
    mode = info.external_attr >> 16
    return "link" if stat.S_ISLNK(mode) else "folder" if info.is_dir() else "file"


def _tar_kind(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return "link"
    return "folder" if info.isdir() else "file" if info.isreg() else "device"


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(f"{folder}: {needed:,} bytes are needed, {free:,} are free")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
