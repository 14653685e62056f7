"""Damaged files of the cache are made anew, and a damaged tokenizer of a run is refused by name."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxdecoder.config import DataConfig
from jaxdecoder.data import corpora, digests, hub, tokenizers, tokens, vocabularies
from jaxdecoder.data.stories import stories
from jaxdecoder.errors import UserError
from tests.mutations import KINDS, damaged, outcome

FILES = (
    *("train.bin", "validation.bin", "train_starts.npy", "validation_starts.npy"),
    *("meta.json", "tokenizer.json"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A small corpus that is in the cache."""
    folder = tmp_path_factory.mktemp("damage")
    for number, story in enumerate(stories(4000, 0)):
        (folder / f"{number}.txt").write_text(story)
    data = DataConfig(source="text", path=str(folder), cache=str(folder / ".cache"))
    tokens.prepare(data)
    return data


def same(one: tokens.Corpus, other: tokens.Corpus) -> bool:
    pairs = [(one.train, other.train), (one.validation, other.validation)]
    return one.tokenizer == other.tokenizer and all(
        np.array_equal(a.tokens, b.tokens)
        and np.array_equal(a.starts, b.starts)
        and a.n_bytes == b.n_bytes
        for a, b in pairs
    )


def in_memory(corpus: tokens.Corpus) -> tokens.Corpus:
    """The same, however its files change."""
    train, validation = (
        tokens.Split(np.array(split.tokens), np.array(split.starts), split.n_bytes)
        for split in (corpus.train, corpus.validation)
    )
    return dataclasses.replace(corpus, train=train, validation=validation)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_tokens_is_made_anew_and_said(
    data: DataConfig, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = in_memory(tokens.prepare(data))
    assert capsys.readouterr().err == ""
    folder = Path(data.cache) / "tokens" / before.key
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(damaged(content, kind, seed=1))
    assert same(tokens.prepare(data), before)
    said = capsys.readouterr().err
    if said:
        assert said == f"{folder}: these tokens are damaged; making them anew\n"
    else:  # JSON may say the same in other bytes
        assert json.loads((folder / name).read_bytes()) == json.loads(content)
    (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", [*FILES, ""])
def test_a_missing_file_of_tokens_is_made_anew(
    data: DataConfig, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = in_memory(tokens.prepare(data))
    path = Path(data.cache) / "tokens" / before.key / name
    if name:
        path.unlink()
    else:  # a file where the folder should be
        shutil.rmtree(path)
        path.write_text("in the way")
    assert same(tokens.prepare(data), before)
    assert "making them anew" in capsys.readouterr().err


def test_tokens_of_a_version_without_digests_are_taken_as_they_are(
    data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cache of an earlier version may be one that cannot be written."""
    before = in_memory(tokens.prepare(data))
    path = Path(data.cache) / "tokens" / before.key / "meta.json"
    content = path.read_text()
    meta = json.loads(content)
    path.write_text(json.dumps({key: meta[key] for key in ("dtype", "train", "validation")}))
    assert same(tokens.prepare(data), before)
    assert not capsys.readouterr().err
    path.write_text(content)


def test_tokens_that_nobody_may_read_are_named(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(tokens, "check_of", forbidden)
    with pytest.raises(UserError, match=r"train\.bin: Permission denied|\w: Permission denied"):
        tokens.prepare(data)


def test_of_large_files_blocks_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "WHOLE", 1000)
    monkeypatch.setattr(digests, "BLOCK", 10)
    monkeypatch.setattr(digests, "BLOCKS", 50)
    content = bytes(range(256)) * 8
    path = tmp_path / "large"

    def check(content: bytes) -> str:
        path.write_bytes(content)
        return digests.check_of(path)

    whole = check(content)
    assert check(content) == whole
    for kind in ("cut_off", "emptied", "twice", "garbage", "some_bytes", "left_out"):
        assert check(damaged(content, kind, seed=0)) != whole
    assert check(b"\1" + content[1:]) != whole
    assert check(content[:-1] + b"\1") != whole


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for kind in ("char", "byte", "bpe"):
        made = vocabularies.build(
            DataConfig(tokenizer=kind, vocab_size=300 if kind == "bpe" else None),
            lambda: ["Grüße, 中文 and more words, more words"],
        )
        tokenizers.save(made, folder / "tokenizer.json")
        found[kind] = (folder / "tokenizer.json").read_bytes()
    return found


@pytest.mark.parametrize("sealed", [True, False], ids=["with_digest", "without"])
@pytest.mark.parametrize("damage", KINDS)
@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_a_damaged_tokenizer_is_refused_by_name(
    tokenizer_files: dict[str, bytes], tmp_path: Path, kind: str, damage: str, sealed: bool
) -> None:
    path = tmp_path / "tokenizer.json"
    content = tokenizer_files[kind]
    path.write_bytes(content)
    right = tokenizers.load(path)
    if not sealed:  # as earlier versions wrote it
        values = json.loads(content)
        del values["digest"]
        content = json.dumps(values, ensure_ascii=False).encode()
    for seed in range(8):
        path.write_bytes(damaged(content, damage, seed))
        found, said = outcome(tokenizers.load, path)
        assert found or str(path) in said
        assert found in (None, right) or not sealed
        if found:  # what can be read can be used
            ids, said = outcome(found.encode, "more words")
            assert "tokenizer" in said if ids is None else ids.max() < found.vocab_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "odd"}, "KeyError: 'odd'"),
        ({"name": 7}, "wrong name or pattern"),
        ({"pattern": None}, "wrong name or pattern"),
        ({"end_token": 999}, "wrong end_token or unknown"),
        ({"end_token": True}, "wrong end_token or unknown"),
        ({"unknown": -1}, "wrong end_token or unknown"),
        ({"vocab_size": 3}, "wrong vocab_size"),
        ({"vocabulary": ["a", "bc"], "vocab_size": 2, "end_token": None}, "wrong vocabulary"),
        ({"vocabulary": 7}, "TypeError"),
        ({"digesu": 7}, "wrong entries"),
    ],
)
def test_a_tokenizer_with_a_wrong_value_is_refused(
    tokenizer_files: dict[str, bytes], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    values = json.loads(tokenizer_files["char"])
    del values["digest"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=message) as said:
        tokenizers.load(tmp_path / "tokenizer.json")
    assert str(tmp_path / "tokenizer.json") in str(said.value)


def test_a_tokenizer_of_an_earlier_version_loads(
    tokenizer_files: dict[str, bytes], tmp_path: Path
) -> None:
    values = json.loads(tokenizer_files["char"])
    del values["digest"]
    (tmp_path / "old.json").write_text(json.dumps(values))
    (tmp_path / "new.json").write_bytes(tokenizer_files["char"])
    old, new = (tokenizers.load(tmp_path / name) for name in ("old.json", "new.json"))
    assert old == new


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_note_of_a_revision_is_not_believed(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    class Info:
        sha = "0123456789abcdef" * 2 + "01234567"

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    data = DataConfig(source="huggingface", path="some/stories", cache=str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: Info)
    online = hub.fingerprint(data)
    (note,) = (tmp_path / "huggingface").iterdir()
    note.write_bytes(damaged(note.read_bytes(), kind, seed=0))
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    found, said = outcome(hub.fingerprint, data)
    assert found == online or "cannot be reached" in said


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_download_is_got_anew(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import hashlib

    play = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"
    monkeypatch.setattr(corpora, "TINY_SHAKESPEARE_SHA256", hashlib.sha256(play).hexdigest())
    monkeypatch.setattr(corpora, "_download_shakespeare", lambda _: play)
    path = tmp_path / "tinyshakespeare.txt"
    path.write_bytes(damaged(play, kind, seed=0))
    data = DataConfig(source="tiny_shakespeare", cache=str(tmp_path))
    assert list(corpora.documents(data)) == [play.decode()]
    assert capsys.readouterr().err == f"{path}: not Tiny Shakespeare, or damaged; getting it anew\n"
    assert path.read_bytes() == play
    assert os.listdir(tmp_path) == [path.name]
