"""Token stores: what is written is read, and damage anywhere is refused with the file named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palmjax import tokenizer
from palmjax.config import ConfigError
from palmjax.data import store as store_module
from palmjax.data.store import Folder, PartWriter, TokenStore, is_complete, part_name, token_dtype, write_manifest
from palmjax.data.vocabulary import Bytes, SentencePiece, Vocabulary

VOCABULARY = tokenizer.train(["to be or not to be, that is the question: " * 20], 277)
DOCUMENTS = [
    [np.random.default_rng(part * 100 + i).integers(3, 259, 1 + 37 * i % 500) for i in range(count)]
    for part, count in enumerate((40, 0, 25))
]  # three parts, one empty
MASKED = (2, 5, 7)  # part 2: 7 tokens of document 5 have weight 0


def write(path: Path | str, vocabulary: Vocabulary = VOCABULARY) -> TokenStore:
    folder = Folder(str(path))
    records = []
    for part, documents in enumerate(DOCUMENTS):
        writer = PartWriter(folder, part, vocabulary)
        for i, document in enumerate(documents):
            writer.add(document, num_unweighted=MASKED[2] if (part, i) == MASKED[:2] else 0)
        records.append(writer.finish())
    assert not is_complete(str(path))
    write_manifest(folder, "a_task", "train", vocabulary, records)
    return TokenStore(str(path))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "a b%20c"  # a path that is no URL
    write(path)
    return path


@pytest.fixture(scope="module")
def store(path: Path) -> TokenStore:
    return TokenStore(str(path))


STREAM = np.concatenate([document for documents in DOCUMENTS for document in documents])
WEIGHTS = np.ones(len(STREAM), np.uint8)
_masked_from = sum(len(document) for document in DOCUMENTS[0] + DOCUMENTS[2][: MASKED[1]])
WEIGHTS[_masked_from : _masked_from + MASKED[2]] = 0


def test_manifest_counts(store: TokenStore) -> None:
    assert (store.task, store.split, store.num_tokens) == ("a_task", "train", len(STREAM))
    assert store.num_documents == sum(map(len, DOCUMENTS))
    assert store.num_bytes == VOCABULARY.token_bytes()[STREAM].sum()
    assert store.vocabulary == VOCABULARY
    ends = np.cumsum([len(document) for documents in DOCUMENTS for document in documents])
    assert np.array_equal(store.document_ends(), ends)
    store.verify()


@given(spans=st.lists(st.tuples(st.integers(0, len(STREAM)), st.integers(0, 700)), max_size=8))
def test_any_ranges_are_read(store: TokenStore, spans: list[tuple[int, int]]) -> None:
    starts = np.array([start for start, _ in spans], np.int64)
    stops = np.minimum(starts + np.array([size for _, size in spans], np.int64), len(STREAM))
    tokens, weights = store.read(starts, stops, 700)
    assert tokens.dtype == np.int32 and tokens.shape == (len(spans), 700)
    for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        assert np.array_equal(tokens[row, : stop - start], STREAM[start:stop])
        assert not tokens[row, stop - start :].any()
        read = np.ones(700, np.uint8) if weights is None else weights[row]
        assert np.array_equal(read[: stop - start], WEIGHTS[start:stop])


def test_files_are_cut_at_the_shard_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SHARD", 1024)
    monkeypatch.setattr(store_module, "PIECE", 256)
    store = write(tmp_path, Bytes())
    files = [name for name in Folder(str(tmp_path)).names() if "/tokens/c/" in name]
    assert len(files) > 5
    tokens, weights = store.read(np.array([0]), np.array([len(STREAM)]), len(STREAM))
    assert np.array_equal(tokens[0], STREAM)
    assert weights is not None and np.array_equal(weights[0], WEIGHTS)
    assert sum("/weights/c/" in name for name in Folder(str(tmp_path)).names()) == 1  # the others are all ones
    store.verify()


def test_tokens_are_as_narrow_as_the_vocabulary_allows() -> None:
    sizes = {255: np.uint8, 256: np.uint16, 259: np.uint16, 65_535: np.uint16, 65_536: np.uint32, 256_000: np.uint32}
    assert {size: token_dtype(size) for size in sizes} == {size: np.dtype(kind) for size, kind in sizes.items()}


def test_equal_contents_have_equal_fingerprints(path: Path, store: TokenStore, tmp_path: Path) -> None:
    assert write(tmp_path / "same").fingerprint == store.fingerprint
    assert write(tmp_path / "other", Bytes()).fingerprint != store.fingerprint


def test_a_store_may_lie_at_a_url(tmp_path: Path, path: Path, store: TokenStore) -> None:
    """As one in a bucket does; file:// goes the same way through TensorStore as gs://."""
    url = f"file://{tmp_path}/bucket"
    assert not Folder(url).is_local
    remote = write(url)
    assert remote.path == url and remote.fingerprint == store.fingerprint
    assert remote.read(np.array([5]), np.array([50]), 45)[0].tolist() == [STREAM[5:50].tolist()]
    remote.verify()
    (tmp_path / "bucket/part-00000/documents/c/0").unlink()
    with pytest.raises(ConfigError, match="bucket/part-00000/documents/c/0 is damaged: it is missing"):
        TokenStore(url)


FILES = [
    "store.json",
    "vocabulary.model",
    *(f"{part_name(part)}/{kind}/zarr.json" for part in range(3) for kind in ("documents", "tokens")),
    *(f"{part_name(part)}/{kind}/c/0" for part in (0, 2) for kind in ("documents", "tokens")),
    "part-00002/weights/zarr.json",
    "part-00002/weights/c/0",
]


def test_the_files_damaged_below_are_all_there_are(path: Path) -> None:
    assert Folder(str(path)).names() == sorted(FILES)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\n")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, truncate, empty, lengthen, Path.unlink])
def test_damage_anywhere_is_refused_with_the_file_named(path: Path, tmp_path: Path, name: str, damage) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    damage(copy / name)
    if (name, damage) == ("store.json", lengthen):
        TokenStore(str(copy)).verify()  # white space behind JSON means nothing
        return
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        store = TokenStore(str(copy))
        assert damage is flip  # everything else is noticed when the store is opened
        store.verify()


@pytest.mark.parametrize("kind", ["tokens", "weights", "documents"])
def test_a_flipped_byte_is_noticed_when_it_is_read(path: Path, tmp_path: Path, kind: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    file = copy / "part-00002" / kind / "c" / "0"
    data = bytearray(file.read_bytes())
    data[8] ^= 1
    file.write_bytes(data)
    store = TokenStore(str(copy))
    with pytest.raises(ConfigError, match=f"part-00002/{kind}/c/0 is damaged.*\n.*the next start builds it again"):
        store.read(np.array([len(STREAM) - 4]), np.array([len(STREAM)]), 4)
        assert kind == "documents"
        store.document_ends()


def test_a_file_that_vanishes_while_the_store_is_open_is_noticed(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    store = TokenStore(str(copy))
    (copy / "part-00000/tokens/c/0").unlink()
    with pytest.raises(ConfigError, match="part-00000/tokens/c/0 is damaged: tokens are missing"):
        store.read(np.array([0]), np.array([4]), 4)


def test_an_unfinished_or_foreign_store_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no finished token store at .*store\.json is missing"):
        TokenStore(str(tmp_path))
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    manifest = json.loads((copy / "store.json").read_text()) | {"format": 99}
    manifest["checksum"] = store_module._checksum(manifest)
    (copy / "store.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="has format 99, this program reads format 1"):
        TokenStore(str(copy))


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    for bad in (-1, VOCABULARY.size):
        with pytest.raises(ConfigError, match=f"token id {bad} is outside the vocabulary of 277 ids"):
            PartWriter(Folder(str(tmp_path)), 0, VOCABULARY).add(np.array([5, bad]))


def test_a_half_written_part_is_discarded(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    folder.write("part-00000/tokens/c/7", b"left over")
    folder.write("part-00001/tokens/c/0", b"another's")
    writer = PartWriter(folder, 0, VOCABULARY)
    writer.add(np.arange(3, 9))
    assert set(writer.finish()["files"]) == {
        f"part-00000/{kind}/{file}" for kind in ("tokens", "documents") for file in ("zarr.json", "c/0")
    }
    assert folder.read("part-00001/tokens/c/0") == b"another's"


def test_a_manifest_is_not_written_over_missing_files(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    writer = PartWriter(folder, 0, VOCABULARY)
    writer.add(np.arange(3, 9))
    record = writer.finish()
    (tmp_path / "part-00000/tokens/c/0").unlink()
    with pytest.raises(ConfigError, match="part-00000/tokens/c/0 is damaged: it is missing"):
        write_manifest(folder, "a_task", "train", VOCABULARY, [record])
    assert not is_complete(str(tmp_path))


def test_the_store_is_plain_zarr(path: Path) -> None:
    """Anybody's zarr reader can open it: the metadata on disk is that of the data."""
    import tensorstore as ts

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/part-00000/tokens/"}}
    assert np.array_equal(ts.open(spec, open=True).result().read().result(), np.concatenate(DOCUMENTS[0]))
    assert isinstance(VOCABULARY, SentencePiece)
