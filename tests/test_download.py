"""Downloads from a server of our own that breaks off, and archives that want out of their folder."""

import hashlib
import http.server
import io
import os
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.layouts import small_voc
from utils import convert, download
from utils.download import Archive, fetch, unpack
from utils.log import DataError

DATA = os.urandom(300_000)


class Server(http.server.ThreadingHTTPServer):
    """Serves `data`; `breaks` says after how many bytes each request breaks off (None: not), `log` what was asked."""

    data = DATA
    breaks: list[int | None]
    has_ranges = True
    etag = '"one"'
    status = 200
    kind = "application/octet-stream"
    log: list[str]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range", "")
        server.log.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-") or 0)
        if not server.has_ranges or self.headers.get("If-Range", server.etag) != server.etag:
            start = 0
        if start >= len(server.data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.data)}")
            self.end_headers()
            return
        rest = server.data[start:]
        self.send_response(206 if start else server.status)
        self.send_header("Content-Length", str(len(rest)))
        self.send_header("Content-Type", server.kind)
        self.send_header("ETag", server.etag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.data) - 1}/{len(server.data)}")
        self.end_headers()
        self.wfile.write(rest[: server.breaks.pop(0) if server.breaks else None])
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    with Server(("127.0.0.1", 0), Handler) as running:
        running.breaks, running.log = [], []
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def address(server: Server, name: str = "data.tar") -> str:
    return f"http://127.0.0.1:{server.server_port}/{name}"


def test_a_download_that_breaks_off_goes_on(server: Server, tmp_path: Path) -> None:
    server.breaks = [100_000, 50_000, 0]
    archive = Archive(address(server), hashlib.md5(DATA).hexdigest())
    assert fetch(archive, tmp_path).read_bytes() == DATA
    assert server.log == ["", "bytes=100000-", "bytes=150000-", "bytes=150000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["data.tar"]
    fetch(archive, tmp_path)
    assert len(server.log) == 4  # what is there is not fetched again


def test_a_killed_download_goes_on(server: Server, tmp_path: Path) -> None:
    server.breaks = [100_000, *[0] * download.ATTEMPTS]
    with pytest.raises(DataError, match="run again to go on from 100,000 bytes"):
        fetch(Archive(address(server)), tmp_path)
    assert not (tmp_path / "data.tar").exists()
    server.breaks = []
    assert fetch(Archive(address(server)), tmp_path).read_bytes() == DATA
    assert server.log[-1] == "bytes=100000-"


def test_a_server_without_ranges_starts_anew(server: Server, tmp_path: Path) -> None:
    server.breaks, server.has_ranges = [100_000], False
    assert fetch(Archive(address(server)), tmp_path).read_bytes() == DATA


def test_a_file_that_changed_meanwhile_comes_anew(server: Server, tmp_path: Path) -> None:
    server.breaks = [100_000, *[0] * download.ATTEMPTS]
    with pytest.raises(DataError):
        fetch(Archive(address(server)), tmp_path)
    server.breaks, server.etag, server.data = [], '"two"', DATA[::-1]
    assert fetch(Archive(address(server)), tmp_path).read_bytes() == DATA[::-1]


@pytest.mark.parametrize("have", [len(DATA), len(DATA) + 5])
def test_a_partial_file_that_lacks_nothing_or_is_too_long(server: Server, tmp_path: Path, have: int) -> None:
    (tmp_path / "data.tar.partial").write_bytes((DATA + b"12345")[:have])
    assert fetch(Archive(address(server)), tmp_path).read_bytes() == DATA


def test_a_wrong_checksum_removes_the_file(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected 0123"):
        fetch(Archive(address(server), "0123"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_answers_that_are_no_archive(server: Server, tmp_path: Path) -> None:
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(DataError, match="answers with a web page"):
        fetch(Archive(address(server)), tmp_path)
    with pytest.raises(DataError, match=r"expected http"):
        fetch(Archive("file:///etc/passwd"), tmp_path)


def test_nobody_there(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Connection refused"):
        fetch(Archive("http://127.0.0.1:9/data.tar"), tmp_path)


def test_a_missing_file(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.status = 404
    with pytest.raises(DataError, match="404 Not Found"):
        fetch(Archive(address(server)), tmp_path)
    assert len(server.log) == 1


def test_a_full_disk_is_told_before(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = download.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match="300,000 bytes are needed, 1,000 are free"):
        fetch(Archive(address(server)), tmp_path)


# Unpacking


def make_tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


GOOD = (member("set/a.txt"), b"alpha")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_is_unpacked_and_what_is_there_stays(tmp_path: Path, mode: str) -> None:
    archive = make_tar(tmp_path / "x.tar", [(member("set", tarfile.DIRTYPE), b""), GOOD], mode)
    unpack(archive, tmp_path / "out")
    file = tmp_path / "out/set/a.txt"
    assert file.read_bytes() == b"alpha"
    stamp = file.stat().st_mtime_ns
    unpack(archive, tmp_path / "out")
    assert file.stat().st_mtime_ns == stamp
    file.write_bytes(b"alp")  # as a break would leave it
    unpack(archive, tmp_path / "out")
    assert file.read_bytes() == b"alpha"


def test_a_zip_is_unpacked(tmp_path: Path) -> None:
    unpack(make_zip(tmp_path / "x.zip", {"set/": b"", "set/b/a.txt": b"alpha"}), tmp_path / "out")
    assert (tmp_path / "out/set/b/a.txt").read_bytes() == b"alpha"


BAD_TARS = {
    "leads out of": member("../a.txt"),
    "'/tmp/a.txt' leads out": member("/tmp/a.txt"),
    r"'set\\\\..\\\\..\\\\a.txt' leads out": member("set\\..\\..\\a.txt"),
    "is a link": member("set/link", tarfile.SYMTYPE, "/etc"),
    "'set/hard' is a link": member("set/hard", tarfile.LNKTYPE, "../../etc/passwd"),
    "is a device": member("set/null", tarfile.CHRTYPE),
    "'set/pipe' is a device": member("set/pipe", tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("message", BAD_TARS)
def test_a_malicious_tar_writes_nothing(tmp_path: Path, message: str) -> None:
    archive = make_tar(tmp_path / "x.tar", [GOOD, (BAD_TARS[message], b"")])
    with pytest.raises(DataError, match=message):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../a.txt", "/a.txt", "C:/a.txt", "set/../../a.txt"])
def test_a_malicious_zip_writes_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="leads out"):
        unpack(make_zip(tmp_path / "x.zip", {"good": b"x", name: b"x"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, "/etc")
    with pytest.raises(DataError, match="is a link"):
        unpack(tmp_path / "x.zip", tmp_path / "out")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive_that_blows_up_is_refused(tmp_path: Path, kind: str) -> None:
    zeros = bytes(20_000_000)
    archive = tmp_path / f"x.{kind}"
    if kind == "zip":
        make_zip(archive, {"zeros": zeros})
    else:
        make_tar(archive, [(member("zeros"), zeros)], "w:gz")
    with pytest.raises(DataError, match="grows more than 100 times"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_that_is_there_is_not_followed_out(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/set").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="a link leads out"):
        unpack(make_tar(tmp_path / "x.tar", [GOOD]), tmp_path / "out")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("kind", ["x.zip", "x.tar", "x.tar.gz"])
@pytest.mark.parametrize("share", [0, 0.2, 0.5, 0.9])
def test_a_truncated_archive_is_named(tmp_path: Path, kind: str, share: float) -> None:
    archive = tmp_path / kind
    if kind == "x.zip":
        make_zip(archive, {"a": DATA})
    else:
        make_tar(archive, [(member("a"), DATA), (member("b"), DATA)], "w:gz" if kind.endswith("gz") else "w")
    archive.write_bytes(archive.read_bytes()[: int(archive.stat().st_size * share)])
    with pytest.raises(DataError, match="broken archive"):
        unpack(archive, tmp_path / "out")


# The command


def test_download_and_convert(server: Server, tmp_path: Path, command, monkeypatch: pytest.MonkeyPatch) -> None:
    small_voc(tmp_path / "made/VOCdevkit/VOC2007")
    with tarfile.open(tmp_path / "voc.tar", "w") as archive:
        archive.add(tmp_path / "made/VOCdevkit", "VOCdevkit")
    server.data = (tmp_path / "voc.tar").read_bytes()
    server.breaks = [5000]
    monkeypatch.setitem(download.ARCHIVES, "voc", (Archive(address(server)),))
    outcome = command("utils/convert", "voc", "original", "dst", "--download")
    assert outcome.status == 0, outcome.err
    assert "the publisher gives no checksum" in outcome.out
    assert (tmp_path / "dst/train.txt").read_text() == "images/VOC2007/a.jpg\nimages/VOC2007/b.jpg\n"
    assert server.log == ["", "bytes=5000-"]
    assert command("utils/convert", "voc", "original", "dst", "--download").status == 0
    assert len(server.log) == 2


@pytest.mark.parametrize("kind", convert.READERS)
def test_every_dataset_has_an_address_or_a_page(command, tmp_path: Path, kind: str) -> None:
    assert (kind in download.ARCHIVES) != (kind in download.PAGES)
    if kind in download.PAGES:
        outcome = command("utils/convert", kind, "original", "dst", "--download")
        (line,) = outcome.err.splitlines()
        assert (outcome.status, "http" in line, "original" in line) == (2, True, True)
        assert not (tmp_path / "original").exists()
