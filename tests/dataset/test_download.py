"""COCO's archives arrive whole over a bad line, and nothing of them is written elsewhere."""

from __future__ import annotations

import io
import json
import shutil
import socket
import stat
import threading
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitgen.dataset import download
from bitgen.dataset.check import check_dataset
from bitgen.dataset.coco import load_coco
from bitgen.dataset.download import download_coco
from bitgen.errors import DiskFullError, DownloadError, InputError

TRAIN, VAL = range(1, 9), range(9, 12)
ANNOTATIONS = "/annotations/annotations_trainval2017.zip"
TRAIN_ZIP, VAL_ZIP = "/zips/train2017.zip", "/zips/val2017.zip"


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def captions(ids: range) -> bytes:
    return json.dumps(
        {
            "images": [{"id": i, "file_name": f"{i}.png"} for i in ids],
            "annotations": [{"id": i, "image_id": i, "caption": f"Picture {i}."} for i in ids],
        }
    ).encode()


def official_archives(year: int = 2017) -> dict[str, bytes]:
    archives = {
        f"/annotations/annotations_trainval{year}.zip": zip_of(
            {
                f"annotations/captions_train{year}.json": captions(TRAIN),
                f"annotations/captions_val{year}.json": captions(VAL),
            }
        )
    }
    for split, ids in (("train", TRAIN), ("val", VAL)):
        members = {f"{split}{year}/": b""} | {f"{split}{year}/{i}.png": picture(i) for i in ids}
        archives[f"/zips/{split}{year}.zip"] = zip_of(members)
    return archives


class Server(ThreadingHTTPServer):
    """Serves files, well or badly."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = official_archives()
        self.requests: list[tuple[str, str | None]] = []  # path, Range
        self.cut_after: list[int] = []  # bytes of each coming answer before the line breaks
        self.statuses: list[int] = []  # of each coming answer, instead of the file
        self.ranges = True
        self.sends_length = True
        self.etag: str | None = '"1"'
        self.shift_ranges_by = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def ranges_asked(self, path: str) -> list[str | None]:
        return [asked for name, asked in self.requests if name == path]


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.0"  # the connection's end may mean the file's end

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.requests.append((self.path, asked))
        content = server.files.get(self.path)
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        if content is None:
            self.send_error(404)
            return
        start, status = 0, 200
        unchanged = self.headers.get("If-Range") in (None, server.etag)
        if asked and server.ranges and unchanged:
            start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
            start += server.shift_ranges_by
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.sends_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if server.cut_after:
            body = body[: server.cut_after.pop(0)]
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Stay silent."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(server: Server, output: Path, **options: object) -> None:
    download_coco(output, base_url=server.url, retry_seconds=0.001, **options)  # type: ignore[arg-type]


def assert_whole(output: Path, year: int = 2017) -> None:
    assert [image.image_id for image in load_coco([output], "train")] == list(TRAIN)
    assert [image.image_id for image in load_coco([output], "val")] == list(VAL)
    assert check_dataset(output).is_sound
    for i in TRAIN:
        assert (output / f"train{year}/{i}.png").read_bytes() == picture(i)
    leftovers = [path for path in output.rglob("*") if path.suffix in (".part", ".zip", ".version")]
    assert leftovers == []


def test_everything_arrives_and_trains(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    fetch(server, tmp_path / "data/coco", on_progress=lambda *step: seen.append(step))
    assert_whole(tmp_path / "data/coco")
    assert [path for path, _ in server.requests] == [ANNOTATIONS, TRAIN_ZIP, VAL_ZIP]
    assert {what for *_, what in seen} == {
        f"{prefix}{name}.zip"
        for prefix in ("", "unpacking ")
        for name in ("annotations_trainval2017", "train2017", "val2017")
    }
    last = {what: (done, total) for done, total, what in seen}
    assert all(done == total for done, total in last.values())
    assert last["train2017.zip"][1] == len(server.files[TRAIN_ZIP])
    assert last["unpacking train2017.zip"][1] == sum(len(picture(i)) for i in TRAIN)


def test_2014(server: Server, tmp_path: Path) -> None:
    server.files = official_archives(2014)
    fetch(server, tmp_path, year=2014)
    assert_whole(tmp_path, 2014)


def test_one_split_and_kept_archives(server: Server, tmp_path: Path) -> None:
    fetch(server, tmp_path, splits=("val",), keep_archives=True)
    assert not (tmp_path / "train2017").exists()
    kept = tmp_path / ".download/val2017.zip"
    assert kept.read_bytes() == server.files[VAL_ZIP]


def test_what_is_there_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    fetch(server, tmp_path)
    server.requests.clear()
    fetch(server, tmp_path)
    assert server.requests == []
    (tmp_path / "val2017/10.png").unlink()
    fetch(server, tmp_path)
    assert [path for path, _ in server.requests] == [VAL_ZIP]
    assert_whole(tmp_path)


def test_a_broken_line_is_continued(server: Server, tmp_path: Path) -> None:
    server.cut_after = [100, 50, 10**9, 20_000]
    fetch(server, tmp_path)
    assert server.ranges_asked(ANNOTATIONS) == [None, "bytes=100-", "bytes=150-"]
    assert server.ranges_asked(TRAIN_ZIP) == [None, "bytes=20000-"]
    assert_whole(tmp_path)


def test_a_download_is_continued_by_a_later_command(server: Server, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(done: int, total: int, what: str) -> None:
        if what == "train2017.zip":
            raise Interrupted

    server.cut_after = [10**9, 30_000]
    with pytest.raises(Interrupted):
        fetch(server, tmp_path, on_progress=interrupt)
    part = tmp_path / ".download/train2017.zip.part"
    assert part.read_bytes() == server.files[TRAIN_ZIP][:30_000]
    server.requests.clear()
    fetch(server, tmp_path)
    assert server.requests[0] == (TRAIN_ZIP, "bytes=30000-")
    assert_whole(tmp_path)


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cut_after = [100, 10**9, 20_000]
    fetch(server, tmp_path)
    assert server.ranges_asked(TRAIN_ZIP) == [None, "bytes=20000-"]
    assert_whole(tmp_path)


def test_a_server_that_continues_elsewhere_is_not_trusted(server: Server, tmp_path: Path) -> None:
    server.cut_after = [200]
    server.shift_ranges_by = 3
    fetch(server, tmp_path)
    assert server.ranges_asked(ANNOTATIONS) == [None, "bytes=200-", None]
    assert_whole(tmp_path)


def test_a_file_that_changed_meanwhile_starts_over(server: Server, tmp_path: Path) -> None:
    state = tmp_path / ".download"
    state.mkdir()
    (state / "train2017.zip.part").write_bytes(b"of the old file" * 100)
    (state / "train2017.zip.part.version").write_text('"0"')
    fetch(server, tmp_path)
    assert server.ranges_asked(TRAIN_ZIP) == ["bytes=1500-"]
    assert_whole(tmp_path)


def test_a_whole_part_is_taken(server: Server, tmp_path: Path) -> None:
    state = tmp_path / ".download"
    state.mkdir()
    (state / "train2017.zip.part").write_bytes(server.files[TRAIN_ZIP])
    fetch(server, tmp_path)
    assert len(server.ranges_asked(TRAIN_ZIP)) == 1
    assert_whole(tmp_path)


def test_a_part_that_is_too_long_starts_over(server: Server, tmp_path: Path) -> None:
    state = tmp_path / ".download"
    state.mkdir()
    (state / "train2017.zip.part").write_bytes(server.files[TRAIN_ZIP] + b"more")
    fetch(server, tmp_path)
    assert server.ranges_asked(TRAIN_ZIP)[-1] is None
    assert_whole(tmp_path)


def test_without_length_and_version(server: Server, tmp_path: Path) -> None:
    server.sends_length, server.etag = False, None
    seen: list[tuple[int, int, str]] = []
    fetch(server, tmp_path, on_progress=lambda *step: seen.append(step))
    assert_whole(tmp_path)
    assert {total for _, total, what in seen if what == "val2017.zip"} == {0}


def test_without_length_a_cut_is_found_by_the_archive(server: Server, tmp_path: Path) -> None:
    server.sends_length = False
    server.cut_after = [100]
    with pytest.raises(DownloadError, match="damaged"):
        fetch(server, tmp_path)
    fetch(server, tmp_path)
    assert_whole(tmp_path)


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 429, 500]
    fetch(server, tmp_path)
    assert len(server.ranges_asked(ANNOTATIONS)) == 4
    assert_whole(tmp_path)


def test_a_server_that_stays_down(server: Server, tmp_path: Path) -> None:
    server.statuses = [503] * 99
    with pytest.raises(DownloadError, match="503") as caught:
        fetch(server, tmp_path)
    assert server.url + ANNOTATIONS in caught.value.message
    assert "continues" in str(caught.value)
    assert len(server.requests) == 6


def test_a_line_that_delivers_nothing_new(server: Server, tmp_path: Path) -> None:
    server.cut_after = [100] + [0] * 99
    with pytest.raises(DownloadError, match="ended after 100 bytes"):
        fetch(server, tmp_path)
    assert (tmp_path / ".download/annotations_trainval2017.zip.part").stat().st_size == 100


def test_a_file_that_is_not_there(server: Server, tmp_path: Path) -> None:
    del server.files[TRAIN_ZIP]
    with pytest.raises(DownloadError, match="404"):
        fetch(server, tmp_path)
    assert len(server.ranges_asked(TRAIN_ZIP)) == 1
    assert not (tmp_path / "train2017").exists()


def test_no_server(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DownloadError, match="did not arrive"):
        download_coco(tmp_path, base_url=f"http://127.0.0.1:{port}", retry_seconds=0.001)


# Archives


def test_not_a_zip(server: Server, tmp_path: Path) -> None:
    server.files[VAL_ZIP] = b"<html>Sign in to the network</html>" * 100
    with pytest.raises(DownloadError, match=r"val2017\.zip is damaged, or not a zip") as caught:
        fetch(server, tmp_path)
    assert "Run the command again" in str(caught.value)
    assert not (tmp_path / ".download/val2017.zip").exists()
    server.files = official_archives()
    fetch(server, tmp_path)
    assert_whole(tmp_path)


def test_a_flipped_bit_is_found(server: Server, tmp_path: Path) -> None:
    damaged = bytearray(server.files[VAL_ZIP])
    damaged[len(damaged) // 2] ^= 1
    server.files[VAL_ZIP] = bytes(damaged)
    with pytest.raises(DownloadError, match="damaged"):
        fetch(server, tmp_path)
    assert not list(tmp_path.rglob("*.part"))
    server.files = official_archives()
    fetch(server, tmp_path)
    assert_whole(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../evil.txt", "val2017/../../evil.txt", "/tmp/evil.txt", "..\\evil.txt", "C:\\evil.txt"],
)
def test_names_that_lead_out_are_refused(server: Server, tmp_path: Path, name: str) -> None:
    server.files[VAL_ZIP] = zip_of({"val2017/9.png": picture(9), name: b"evil"})
    output = tmp_path / "deep" / "output"
    with pytest.raises(DownloadError, match="not safe to unpack") as caught:
        fetch(server, output)
    assert "evil.txt" in caught.value.message
    assert not (output / "val2017").exists()
    assert not list(tmp_path.rglob("*evil*"))


def test_links_are_refused(server: Server, tmp_path: Path) -> None:
    link = zipfile.ZipInfo("val2017/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(link, str(tmp_path))
        archive.writestr("val2017/link/evil.txt", b"evil")
    server.files[VAL_ZIP] = buffer.getvalue()
    with pytest.raises(DownloadError, match="is a link"):
        fetch(server, tmp_path / "output")
    assert not (tmp_path / "output/val2017").exists()


def test_encrypted_and_unusual_archives_are_refused(server: Server, tmp_path: Path) -> None:
    encrypted = bytearray(zip_of({"val2017/9.png": picture(9)}))
    entry = encrypted.index(b"PK\x01\x02")
    encrypted[entry + 8] |= 1
    server.files[VAL_ZIP] = bytes(encrypted)
    with pytest.raises(DownloadError, match="is encrypted"):
        fetch(server, tmp_path / "a")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("val2017/9.png", picture(9))
    server.files[VAL_ZIP] = buffer.getvalue()
    with pytest.raises(DownloadError, match="unusual way"):
        fetch(server, tmp_path / "b")


def test_unpacking_continues_after_a_kill(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if what == "unpacking train2017.zip" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(server, tmp_path, on_progress=interrupt)
    unpacked = {path: path.stat().st_mtime_ns for path in (tmp_path / "train2017").iterdir()}
    assert 0 < len(unpacked) < len(TRAIN)
    server.requests.clear()
    fetch(server, tmp_path)
    assert [path for path, _ in server.requests] == [VAL_ZIP]
    assert all(path.stat().st_mtime_ns == written for path, written in unpacked.items())
    assert_whole(tmp_path)


# Disk and arguments


def test_a_disk_that_is_too_small_is_told_before(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 2000))
    with pytest.raises(DiskFullError, match="GB are free"):
        fetch(server, tmp_path)
    assert not (tmp_path / "train2017").exists()
    monkeypatch.undo()
    fetch(server, tmp_path)
    assert_whole(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / ".download"
    state.mkdir()
    (state / "annotations_trainval2017.zip.part").symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match="No room is left"):
        fetch(server, tmp_path)
    assert len(server.requests) == 1  # trying again would not help


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"year": 2015}, "COCO 2015"),
        ({"splits": ("test",)}, "train, val or both"),
        ({"splits": ()}, "got none"),
        ({"base_url": "file:///etc"}, "must begin with http"),
    ],
)
def test_impossible_requests(tmp_path: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        download_coco(tmp_path / "new", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        download_coco(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        download_coco(tmp_path / "file" / "coco")


def test_a_line_that_hangs_in_the_middle_is_continued(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, hung = download.http.client.HTTPResponse.read, []

    def read(self: object, *args: int) -> bytes:
        if len(server.requests) == 2 and not hung:
            hung.append(True)
            raise TimeoutError("timed out")
        return real(self, *args)

    monkeypatch.setattr(download.http.client.HTTPResponse, "read", read)
    fetch(server, tmp_path)
    assert hung
    assert len(server.ranges_asked(TRAIN_ZIP)) == 2
    assert_whole(tmp_path)


def test_a_server_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(download, "_RETRIES", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(DownloadError, match="timed out"):
            download_coco(tmp_path, base_url=url, retry_seconds=0.001)
