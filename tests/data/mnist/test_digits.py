"""Digits: the embedded subset, IDX files, and the download from mirrors (served on this machine)."""

from __future__ import annotations

import gzip
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from ssdir.common.errors import DataError
from ssdir.data.mnist import digits as module
from ssdir.data.mnist.digits import MD5, MIRRORS, Digits, download_mnist, load_digits, read_idx, write_idx


def test_embedded_digits() -> None:
    train, test = load_digits()
    assert np.bincount(train.labels).tolist() == [600] * 10
    assert np.bincount(test.labels).tolist() == [100] * 10
    assert (
        len(train) == 6_000 and train.images.shape == (6_000, 28, 28) and test.images.shape == (1_000, 28, 28)
    )
    # The first labels and the first digit's ink of MNIST, which the subset keeps in order.
    assert train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert train.images[0].sum() == 27_525
    flat = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in flat for image in test.images)


def test_embedded_files_are_small_and_attributed() -> None:
    folder = Path(module.__file__).parent / "embedded"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2_000_000
    text = (folder / "ATTRIBUTION.md").read_text()
    assert all(word in text for word in ("LeCun", "Cortes", "Burges", "ShareAlike 3.0", "first 600"))


def _write_mnist(folder: Path, n: int = 20, compressed: bool = True) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", random.integers(0, 256, (n, 28, 28), np.uint8))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8) % 10)
    if not compressed:
        for path in list(folder.iterdir()):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()


@pytest.mark.parametrize("compressed", [True, False])
def test_idx_folder(tmp_path: Path, compressed: bool) -> None:
    _write_mnist(tmp_path / "mnist", compressed=compressed)
    train, test = load_digits(tmp_path / "mnist")
    assert len(train) == len(test) == 20 and train.labels.tolist() == [*range(10)] * 2
    assert train.checksum() != test.checksum()
    assert train.checksum() == Digits(train.images.copy(), train.labels.copy(), "elsewhere").checksum()


def test_write_idx_gives_the_same_bytes(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    for name in "ab":
        write_idx(tmp_path / name, array)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert np.array_equal(read_idx(tmp_path / "a"), array)


def test_bad_idx_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        load_digits(tmp_path / "absent")
    folder = tmp_path / "mnist"
    _write_mnist(folder)
    images, labels = folder / "t10k-images-idx3-ubyte.gz", folder / "t10k-labels-idx1-ubyte.gz"
    good = labels.read_bytes()

    write_idx(labels, np.zeros(19, np.uint8))
    with pytest.raises(DataError, match=r"one label 0\.\.9 for each of the 20"):
        load_digits(folder)
    write_idx(labels, np.full(20, 10, np.uint8))
    with pytest.raises(DataError, match=r"one label 0\.\.9"):
        load_digits(folder)
    labels.write_bytes(good[:-8])
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz cannot be read"):
        load_digits(folder)
    labels.write_bytes(gzip.decompress(good)[:-1])
    with pytest.raises(DataError, match=r"should hold \(20,\) values but has 19"):
        load_digits(folder)
    labels.write_bytes(b"hello")
    with pytest.raises(DataError, match="not an IDX file"):
        load_digits(folder)
    labels.unlink()
    with pytest.raises(DataError, match=r"lacks t10k-labels-idx1-ubyte\.gz"):
        load_digits(folder)
    labels.write_bytes(good)
    write_idx(images, np.zeros((20, 14, 14), np.uint8))
    with pytest.raises(DataError, match="not images of 28 x 28"):
        load_digits(folder)


class _Mirror:
    """Serves ``files`` with Range requests; ``break_after`` cuts every transfer off after so many bytes."""

    def __init__(self, files: dict[str, bytes], break_after: int | None = None, ranges: bool = True) -> None:
        mirror = self
        self.files, self.break_after, self.ranges = files, break_after, ranges
        self.requests: list[tuple[str, str | None]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name, wanted = self.path.strip("/"), self.headers.get("Range")
                mirror.requests.append((name, wanted))
                data = mirror.files.get(name)
                if data is None:
                    self.send_error(404)
                    return
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and mirror.ranges else 0
                if start >= len(data) > 0:
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                self.wfile.write(data[start:][: mirror.break_after])

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


FILES = {"a.gz": bytes(range(256)) * 600, "b.gz": b"labels"}
SUMS = {name: hashlib.md5(data).hexdigest() for name, data in FILES.items()}


@pytest.fixture
def mirrors() -> Iterator[list[_Mirror]]:
    started: list[_Mirror] = []
    yield started
    for mirror in started:
        mirror.close()


def _there(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_download(tmp_path: Path, mirrors: list[_Mirror]) -> None:
    mirrors.append(_Mirror(FILES))
    seen: list[tuple[str, int, int]] = []
    download_mnist(tmp_path, [mirrors[0].url], lambda *step: seen.append(step), SUMS)
    assert _there(tmp_path) == FILES
    assert seen[-1] == ("b.gz", 6, 6) and ("a.gz", len(FILES["a.gz"]), len(FILES["a.gz"])) in seen
    n = len(mirrors[0].requests)
    download_mnist(tmp_path, [mirrors[0].url], None, SUMS)
    assert len(mirrors[0].requests) == n  # nothing is fetched twice


def test_second_mirror_after_a_broken_first(tmp_path: Path, mirrors: list[_Mirror]) -> None:
    mirrors += [
        _Mirror({}),
        _Mirror({name: data[:-1] + b"!" for name, data in FILES.items()}),
        _Mirror(FILES),
    ]
    download_mnist(tmp_path, [mirror.url for mirror in mirrors], None, SUMS)
    assert _there(tmp_path) == FILES
    assert all(len(mirror.requests) == 2 for mirror in mirrors)


def test_truncated_transfer_is_resumed(tmp_path: Path, mirrors: list[_Mirror]) -> None:
    mirrors += [_Mirror(FILES, break_after=100_000), _Mirror(FILES)]
    download_mnist(tmp_path, [mirror.url for mirror in mirrors], None, SUMS)
    assert _there(tmp_path) == FILES
    assert mirrors[1].requests == [("a.gz", "bytes=100000-")]


def test_interrupted_download_goes_on_later(tmp_path: Path, mirrors: list[_Mirror]) -> None:
    mirrors += [_Mirror(FILES, break_after=100_000), _Mirror(FILES)]
    with pytest.raises(DataError, match="broke off after 100000 of 153600 bytes"):
        download_mnist(tmp_path, [mirrors[0].url], None, SUMS)
    assert (tmp_path / "a.gz.part").stat().st_size == 100_000 and not (tmp_path / "a.gz").exists()
    download_mnist(tmp_path, [mirrors[1].url], None, SUMS)
    assert _there(tmp_path) == FILES
    assert mirrors[1].requests[0] == ("a.gz", "bytes=100000-")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_foreign_part_is_thrown_away(tmp_path: Path, mirrors: list[_Mirror], ranges: bool) -> None:
    mirrors.append(_Mirror(FILES, ranges=ranges))
    (tmp_path / "a.gz.part").write_bytes(b"something else")
    (tmp_path / "b.gz.part").write_bytes(FILES["b.gz"])  # complete, but not renamed
    download_mnist(tmp_path, [mirrors[0].url], None, SUMS)
    assert _there(tmp_path) == FILES


def test_another_file_of_the_name_is_kept(tmp_path: Path, mirrors: list[_Mirror]) -> None:
    mirrors.append(_Mirror(FILES))
    (tmp_path / "b.gz").write_bytes(b"letters, not digits")
    with pytest.raises(DataError, match=r"b\.gz is not MNIST's"):
        download_mnist(tmp_path, [mirrors[0].url], None, SUMS)
    assert (tmp_path / "b.gz").read_bytes() == b"letters, not digits"


def test_wrong_file_everywhere(tmp_path: Path, mirrors: list[_Mirror]) -> None:
    mirrors.append(_Mirror({"a.gz": b"not it"}))
    with pytest.raises(DataError, match="wrong md5"):
        download_mnist(tmp_path, [mirrors[0].url], None, SUMS)
    assert _there(tmp_path) == {}


def test_offline_error_names_mirrors_and_remedy(tmp_path: Path) -> None:
    nowhere = ["http://127.0.0.1:9/first/", "http://127.0.0.1:9/second/"]
    with pytest.raises(DataError) as caught:
        download_mnist(tmp_path / "new", nowhere, None, SUMS, timeout=2.0)
    message = str(caught.value)
    assert all(text in message for text in (*nowhere, "a.gz", str(tmp_path / "new"), "--digits embedded"))


def test_official_sources() -> None:
    assert len(MIRRORS) == 2 and all(url.startswith("https://") and url.endswith("/") for url in MIRRORS)
    assert list(MD5.values()) == [
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ]


def test_a_file_that_unpacks_beyond_any_digits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LARGEST_IDX", 1_000)
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(1_000_000)))
    with pytest.raises(DataError, match=r"holds more than 1\.0 kB"):
        read_idx(tmp_path / "a.gz")
