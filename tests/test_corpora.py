"""Where text comes from: order, completeness, bounded pieces, and errors that say what to do."""

import hashlib
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from jaxdecoder.config import DataConfig
from jaxdecoder.data import corpora
from jaxdecoder.errors import UserError


def text_data(path: Path | str, **fields: object) -> DataConfig:
    return DataConfig(source="text", path=str(path), **fields)  # type: ignore[arg-type]


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = folder / f"{name.replace('__', '/')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())


class TestText:
    def test_a_file_is_one_document_byte_for_byte(self, tmp_path: Path) -> None:
        write(tmp_path, book="Grüße,\r\n\tWelt 🌍\n")
        assert list(corpora.documents(text_data(tmp_path / "book.txt"))) == [
            "Grüße,\r\n\tWelt 🌍\n"
        ]

    def test_a_folder_is_its_text_files_sorted_and_empty_ones_are_left_out(
        self, tmp_path: Path
    ) -> None:
        write(tmp_path, b="2", a="1", c__d="3", empty="")
        (tmp_path / "notes.md").write_text("not text")
        assert list(corpora.documents(text_data(tmp_path))) == ["1", "2", "3"]

    def test_a_glob_finds_files_of_any_ending(self, tmp_path: Path) -> None:
        write(tmp_path, a="1", deep__b="2")
        (tmp_path / "deep" / "c.md").write_text("3")
        found = corpora.documents(text_data(tmp_path / "**" / "*.*"))
        assert list(found) == ["1", "2", "3"]

    def test_a_large_file_comes_in_bounded_pieces_that_join_to_it(self, tmp_path: Path) -> None:
        text = "Ein schöner Tag. " * 100_000
        write(tmp_path, book=text, small="x")
        pieces = list(corpora.pieces(text_data(tmp_path)))
        assert "".join(piece.text for piece in pieces) == text + "x"
        assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 2) + [True, True]
        assert max(len(piece.text) for piece in pieces) <= corpora.LONGEST_PIECE

    @pytest.mark.parametrize("position", [0, 5, (1 << 20) - 1, (1 << 20) + 7])
    def test_bytes_that_are_not_utf8_are_named_by_file_and_offset(
        self, tmp_path: Path, position: int
    ) -> None:
        content = bytearray(b"a" * ((1 << 20) + 20))
        content[position] = 0xC3  # the first byte of two, and no second follows
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(UserError, match=rf"bad\.txt: not UTF-8 text: byte {position:,} \(0xc3"):
            list(corpora.documents(text_data(tmp_path / "bad.txt")))

    def test_a_character_across_two_reads_is_read_whole(self, tmp_path: Path) -> None:
        text = "a" * ((1 << 20) - 1) + "é" + "b"
        write(tmp_path, book=text)
        assert list(corpora.documents(text_data(tmp_path / "book.txt"))) == [text]

    def test_a_file_that_ends_inside_a_character_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "cut.txt").write_bytes("né".encode()[:-1])
        with pytest.raises(UserError, match=r"cut\.txt: not UTF-8 text: byte 1 "):
            list(corpora.documents(text_data(tmp_path / "cut.txt")))

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("missing.txt", "no such file or folder"),
            ("*.nothing", "no file matches"),
            ("bare", r"no \*\.txt file in this folder"),
            ("hollow", "the corpus is empty"),
        ],
    )
    def test_a_path_without_text_is_refused(self, tmp_path: Path, name: str, message: str) -> None:
        (tmp_path / "bare").mkdir()
        write(tmp_path, hollow__a="", hollow__b="")
        with pytest.raises(UserError, match=message) as raised:
            list(corpora.documents(text_data(tmp_path / name)))
        assert "data.path" in str(raised.value)
        assert name in str(raised.value)

    def test_the_fingerprint_follows_content_not_names_or_dates(self, tmp_path: Path) -> None:
        write(tmp_path, one__a="1", one__b="2", two__x="1", two__y="2", three__a="12")
        one, two, three = (
            corpora.fingerprint(text_data(tmp_path / name)) for name in ("one", "two", "three")
        )
        assert one == two
        assert one != three  # one document is not two
        os.utime(tmp_path / "one" / "a.txt", (0, 0))
        assert corpora.fingerprint(text_data(tmp_path / "one")) == one
        write(tmp_path, one__a="3")
        assert corpora.fingerprint(text_data(tmp_path / "one")) != one


class TestCutting:
    @given(st.lists(st.text("a é.\n中", max_size=12), max_size=8), st.integers(1, 9))
    def test_pieces_join_to_the_text_and_keep_their_bound(
        self, chunks: list[str], piece: int
    ) -> None:
        cut = list(corpora.cut(chunks, piece=piece, longest=3 * piece))
        assert "".join(cut) == "".join(chunks)
        assert all(0 < len(text) <= 4 * piece for text in cut)

    def test_a_text_without_spaces_is_cut_all_the_same(self) -> None:
        assert [len(text) for text in corpora.cut(["a" * 25], piece=5, longest=10)] == [10, 10, 5]

    def test_words_stay_whole(self) -> None:
        pieces = list(corpora.cut(["the quick brown fox jumps"], piece=8, longest=80))
        assert [text.strip() for text in pieces] == ["the quick brown", "fox", "jumps"]


class TestStories:
    def test_they_are_as_many_bytes_as_asked_for(self) -> None:
        data = DataConfig(stories_bytes=20_000, seed=3)
        stories = list(corpora.documents(data))
        assert len(stories) > 5
        assert abs(sum(len(story.encode()) for story in stories) - 20_000) < 5_000

    def test_the_fingerprint_depends_on_seed_and_amount(self) -> None:
        configs = [DataConfig(), DataConfig(seed=1), DataConfig(stories_bytes=5)]
        assert len({corpora.fingerprint(data) for data in configs}) == 3


def hub_data(path: Path | str, cache: Path, **fields: object) -> DataConfig:
    return DataConfig(source="huggingface", path=str(path), cache=str(cache), **fields)  # type: ignore[arg-type]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    """A folder with two splits and rows that have no text."""
    folder = tmp_path / "jsonl"
    folder.mkdir()
    splits: dict[str, list[str | None]] = {
        "train": ["one", None, "", "two"],
        "validation": ["three"],
    }
    for split, texts in splits.items():
        rows = [json.dumps({"text": text, "number": 7}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return folder


class TestHuggingFace:
    def test_a_folder_of_jsonl_is_its_text_column(self, jsonl: Path, tmp_path: Path) -> None:
        assert list(corpora.documents(hub_data(jsonl, tmp_path))) == ["one", "two"]

    def test_a_named_split_is_for_validation(self, jsonl: Path, tmp_path: Path) -> None:
        data = hub_data(jsonl, tmp_path, validation_split="validation")
        assert [piece.text for piece in corpora.pieces(data)] == ["one", "two"]
        assert [piece.text for piece in corpora.pieces(data, "validation")] == ["three"]

    def test_a_folder_of_parquet_with_another_column(self, tmp_path: Path) -> None:
        folder = tmp_path / "parquet"
        folder.mkdir()
        texts = [f"story {i}" for i in range(500)]
        pyarrow.parquet.write_table(pyarrow.table({"story": texts}), folder / "data.parquet")
        data = hub_data(folder, tmp_path, text_column="story")
        assert list(corpora.documents(data)) == texts

    def test_the_fingerprint_follows_content_and_column(self, jsonl: Path, tmp_path: Path) -> None:
        before = corpora.fingerprint(hub_data(jsonl, tmp_path))
        assert corpora.fingerprint(hub_data(jsonl, tmp_path, text_column="x")) != before
        with (jsonl / "train.jsonl").open("a") as file:
            file.write('\n{"text": "more", "number": 1}')
        assert corpora.fingerprint(hub_data(jsonl, tmp_path)) != before

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"text_column": "story"}, r'data.text_column = "story".*it has number, text'),
            ({"text_column": "number"}, r'data.text_column = "number".*int there, not text'),
            ({"validation_split": "dev"}, r'"dev".*no such split; it has train, validation'),
        ],
    )
    def test_wrong_names_are_refused_with_the_right_ones(
        self, jsonl: Path, tmp_path: Path, fields: dict[str, str], message: str
    ) -> None:
        with pytest.raises(UserError, match=message):
            list(corpora.documents(hub_data(jsonl, tmp_path, **fields)))

    def test_a_folder_without_a_data_set_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "bare").mkdir()
        with pytest.raises(UserError, match="not a data set that can be read"):
            list(corpora.documents(hub_data(tmp_path / "bare", tmp_path)))

    def test_a_path_that_is_neither_folder_nor_id_is_refused(self, tmp_path: Path) -> None:
        for path in (tmp_path / "missing", "missing.jsonl", "some/missing.txt.gz"):
            with pytest.raises(UserError, match="neither a folder or file nor a hub id"):
                corpora.fingerprint(hub_data(path, tmp_path))

    def test_without_a_network_the_hub_is_refused_with_a_way_round(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import huggingface_hub

        def unreachable(*_: object, **__: object) -> None:
            raise OSError("no route to host")

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
        data = hub_data("some/stories", tmp_path)
        with pytest.raises(UserError, match=r"no route to host.*hf download some/stories"):
            corpora.fingerprint(data)

    def test_without_a_network_the_last_known_revision_still_names_the_corpus(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import huggingface_hub

        class Info:
            sha = "abc123"

        data = hub_data("some/stories", tmp_path)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: Info)
        online = corpora.fingerprint(data)

        def unreachable(*_: object, **__: object) -> None:
            raise OSError("no route to host")

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
        assert corpora.fingerprint(data) == online


class TestTinyShakespeare:
    TEXT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"

    @pytest.fixture(autouse=True)
    def a_short_play(self, monkeypatch: pytest.MonkeyPatch) -> None:
        digest = hashlib.sha256(self.TEXT).hexdigest()
        monkeypatch.setattr(corpora, "TINY_SHAKESPEARE_SHA256", digest)

    def serve(self, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> list[str]:
        asked = []

        def get(url: str, timeout: float) -> requests.Response:
            asked.append(url)
            if content is None:
                raise requests.ConnectionError("name resolution failed")
            response = requests.Response()
            response.status_code, response._content = 200, content
            return response

        monkeypatch.setattr(requests, "get", get)
        return asked

    def data(self, cache: Path, path: str = "") -> DataConfig:
        return DataConfig(source="tiny_shakespeare", cache=str(cache), path=path)

    def test_it_is_downloaded_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = self.serve(monkeypatch, self.TEXT)
        data = self.data(tmp_path / "cache")
        assert list(corpora.documents(data)) == [self.TEXT.decode()]
        assert list(corpora.documents(data)) == [self.TEXT.decode()]
        assert asked == [corpora.TINY_SHAKESPEARE_URL]
        assert [p.name for p in (tmp_path / "cache").iterdir()] == ["tinyshakespeare.txt"]

    def test_offline_says_where_to_put_the_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.serve(monkeypatch, None)
        with pytest.raises(UserError) as raised:
            list(corpora.documents(self.data(tmp_path)))
        assert str(tmp_path / "tinyshakespeare.txt") in str(raised.value)
        assert corpora.TINY_SHAKESPEARE_URL in str(raised.value)

    def test_a_wrong_download_is_not_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.serve(monkeypatch, b"<html>please log in</html>")
        with pytest.raises(UserError, match="not Tiny Shakespeare"):
            list(corpora.documents(self.data(tmp_path)))
        assert list(tmp_path.iterdir()) == []

    def test_a_local_copy_will_do(self, tmp_path: Path) -> None:
        (tmp_path / "copy.txt").write_bytes(self.TEXT)
        data = self.data(tmp_path, str(tmp_path / "copy.txt"))
        assert list(corpora.documents(data)) == [self.TEXT.decode()]

    @pytest.mark.parametrize("use", [corpora.fingerprint, lambda data: list(corpora.pieces(data))])
    def test_another_text_is_refused(self, tmp_path: Path, use: object) -> None:
        (tmp_path / "copy.txt").write_bytes(self.TEXT + b"\n")
        data = self.data(tmp_path, str(tmp_path / "copy.txt"))
        with pytest.raises(UserError, match=r"data.path = .*not Tiny Shakespeare"):
            use(data)  # type: ignore[operator]

    def test_a_missing_copy_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no such file"):
            list(corpora.documents(self.data(tmp_path, str(tmp_path / "copy.txt"))))
