"""Files given as text: read as what they are, or refused with the place and what to do."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdecoder.config import DataConfig
from jaxdecoder.data import corpora, formats, tokens
from jaxdecoder.errors import UserError
from tests.mutations import KINDS, damaged, outcome

TEXTS = ["Grüße,\r\n\tWelt 🌍", 'a "quoted", line\n\nand more', "中文"]


def text_data(path: Path | str, **fields: object) -> DataConfig:
    return DataConfig(**{"source": "text", "path": str(path), **fields})  # type: ignore[arg-type]


def documents(path: Path | str, **fields: object) -> list[str]:
    return list(corpora.documents(text_data(path, **fields)))


def as_jsonl(column: str = "text") -> bytes:
    return "".join(json.dumps({column: text, "n": 1}) + "\n" for text in TEXTS).encode()


def as_csv(column: str = "text") -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer).writerows([["n", column], *([i, text] for i, text in enumerate(TEXTS))])
    return buffer.getvalue().encode()


def as_parquet(column: str = "text") -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3], column: TEXTS}), buffer)
    return buffer.getvalue()


def zstd(content: bytes) -> bytes:
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(content)
    return buffer.getvalue().to_pybytes()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}
RECORDS = {
    ".jsonl": as_jsonl(),
    ".json": json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
    ".csv": as_csv(),
    ".parquet": as_parquet(),
}


class TestKinds:
    def test_every_kind_is_tested(self) -> None:
        assert COMPRESS.keys() == {"", *formats.COMPRESSIONS}
        assert RECORDS.keys() == formats.RECORDS.keys()

    @pytest.mark.parametrize("compression", COMPRESS)
    @pytest.mark.parametrize("kind", [kind for kind in RECORDS if kind != ".parquet"])
    def test_records_are_documents(self, tmp_path: Path, kind: str, compression: str) -> None:
        path = tmp_path / f"some.data{kind.upper()}{compression}"
        path.write_bytes(COMPRESS[compression](RECORDS[kind]))
        assert documents(path) == TEXTS
        assert documents(path, source="huggingface") == TEXTS

    @pytest.mark.parametrize("compression", COMPRESS)
    @pytest.mark.parametrize("kind", [".txt", ".md", ""])
    def test_any_other_ending_is_a_text(self, tmp_path: Path, kind: str, compression: str) -> None:
        path = tmp_path / f"book{kind}{compression}"
        path.write_bytes(COMPRESS[compression]("".join(TEXTS).encode()))
        assert documents(path) == ["".join(TEXTS)]

    def test_parquet_is_its_column(self, tmp_path: Path) -> None:
        (tmp_path / "some.parquet").write_bytes(as_parquet("story"))
        assert documents(tmp_path / "some.parquet", text_column="story") == TEXTS
        (tmp_path / "some.parquet.gz").write_bytes(gzip.compress(as_parquet("story")))
        with pytest.raises(UserError, match="compressed inside; unpack this file"):
            documents(tmp_path / "some.parquet.gz", text_column="story")

    def test_json_may_be_lines_too(self, tmp_path: Path) -> None:
        (tmp_path / "some.json").write_bytes(b"\n" + as_jsonl())
        assert documents(tmp_path / "some.json") == TEXTS

    @pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
    def test_another_column_can_be_named(self, tmp_path: Path, kind: str) -> None:
        make = {".jsonl": as_jsonl, ".csv": as_csv, ".parquet": as_parquet}[kind]
        (tmp_path / f"some{kind}").write_bytes(make("story"))
        assert documents(tmp_path / f"some{kind}", text_column="story") == TEXTS
        with pytest.raises(UserError, match=r'data.text_column = "text".*it has n, story') as said:
            documents(tmp_path / f"some{kind}")
        assert f"some{kind}" in str(said.value)

    def test_a_folder_is_its_texts_or_without_any_its_records(self, tmp_path: Path) -> None:
        names = ("a.txt", "b.jsonl", "c/d.txt.gz", "c/e.md", ".git/f.txt", "g.txt~", "h.py")
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            content = b'{"text": "b"}' if name == "b.jsonl" else path.name[:1].encode()
            path.write_bytes(gzip.compress(content, mtime=0) if name.endswith("gz") else content)
        assert documents(tmp_path) == ["a", "d"]
        assert documents(tmp_path / "**" / "*.*") == ["a", "b", "d", "e", "g", "h"]
        (tmp_path / "a.txt").unlink()
        (tmp_path / "c" / "d.txt.gz").unlink()
        assert documents(tmp_path) == ["b"]

    def test_the_key_of_a_file_follows_what_is_read_of_it(self, tmp_path: Path) -> None:
        def key(name: str, content: bytes, **fields: object) -> str:
            (tmp_path / name).write_bytes(content)
            return corpora.fingerprint(text_data(tmp_path / name, **fields))

        content = as_jsonl()
        keys = [
            key("a.txt", content),
            key("a.jsonl", content),
            key("a.jsonl", content, text_column="n"),
            key("a.jsonl", content * 2),
            key("a.jsonl.gz", content),
            key("a.gz", content),
        ]
        assert len(set(keys)) == len(keys)
        assert key("b.txt", content) == key("a.txt", content, text_column="n") == keys[0]
        assert key("b.jsonl", content) == key("a.jsonl", content, source="huggingface") == keys[1]

    def test_a_file_has_no_splits(self, tmp_path: Path) -> None:
        (tmp_path / "some.jsonl").write_bytes(as_jsonl())
        with pytest.raises(UserError, match=r'data.validation_split = "test": .* no splits'):
            documents(tmp_path / "some.jsonl", source="huggingface", validation_split="test")

    @pytest.mark.parametrize("kind", RECORDS)
    def test_an_empty_file_of_records_is_an_empty_corpus(self, tmp_path: Path, kind: str) -> None:
        (tmp_path / f"some{kind}").write_bytes(b"")
        message = "not parquet" if kind == ".parquet" else "the corpus is empty"
        with pytest.raises(UserError, match=message):
            documents(tmp_path / f"some{kind}")

    def test_a_long_cell_of_csv_is_read(self, tmp_path: Path) -> None:
        (tmp_path / "some.csv").write_text(f"text\n{'word ' * 100_000}\n")
        assert documents(tmp_path / "some.csv") == ["word " * 100_000]


GOOD = b'{"text": "one"}\n'


class TestBrokenRecords:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("x.jsonl", GOOD + b'{"text": "tw', "line 2: this is not JSON, or only half of it"),
            ("x.jsonl", GOOD + b"\n[3]\n", "line 3: this is list, not a record such as"),
            ("x.jsonl", GOOD + b'{"x": 1}', 'line 2: data.text_column = "text": there is no such'),
            ("x.jsonl", GOOD + b'{"text": 7}', "line 2: .* holds int there, not text"),
            ("x.jsonl", GOOD + b'{"text": "\xff"}', r"line 2: not UTF-8 .* byte 10 .* \(0xff\)"),
            ("x.jsonl", GOOD + b'{"text": "\\ud83d"}', "line 2: .* half a character"),
            ("x.jsonl", GOOD + b"[" * 100_000, "line 2: this is not JSON"),
            ("x.jsonl", GOOD + b"1" * 10_000, "line 2: this is not JSON"),
            ("x.jsonl", '{"text": "a"}'.encode("utf-16"), "line 1: .* looks like UTF-16"),
            ("x.json", b'[{"text": "a"},\n{"text": "b"\n', "line 3: this is not JSON"),
            ("x.json", b'[{"text": "a"}, {"x": 1}]', "record 2: .* no such column; it has x"),
            ("x.json", b'{\n"text": "a"\n}', r"line 2: this is not JSON.*a record is one line"),
            ("x.csv", b"text,n\na,1\nb\n", r"line 3: 1 cell\(s\), where the heading has 2"),
            ("x.csv", b'text,n\na,1\n"b,2\n', "line 3: not CSV: unexpected end of data"),
            ("x.csv", b"text\na\n\xe9t\xe9\n", r"line 3: not UTF-8 text: byte 0 .* \(0xe9\)"),
            ("x.parquet", b"text", "not parquet, or damaged"),
            ("x.parquet", RECORDS[".parquet"][:-9], "not parquet, or damaged"),
            ("x.txt.gz", b"text", "damaged or cut off"),
            ("x.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "damaged or cut off"),
            ("x.txt.bz2", bz2.compress(b"text" * 99)[:-9], "damaged or cut off"),
            ("x.txt.xz", lzma.compress(b"text" * 99)[:-9], "damaged or cut off"),
            ("x.txt.zst", zstd(b"text" * 99)[:-9], "damaged or cut off"),
            ("x.jsonl.gz", gzip.compress(GOOD + b"half", mtime=0), "line 2: this is not JSON"),
        ],
    )
    def test_they_are_named_by_file_and_place(
        self, tmp_path: Path, name: str, content: bytes, message: str
    ) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as said:
            documents(tmp_path / name)
        assert str(tmp_path / name) in str(said.value)

    def test_a_column_of_parquet_that_is_no_text_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "some.parquet").write_bytes(as_parquet())
        with pytest.raises(UserError, match=r"record 1: .* holds int there, not text"):
            documents(tmp_path / "some.parquet", text_column="n")

    def test_bytes_in_parquet_that_are_no_text_are_refused(self, tmp_path: Path) -> None:
        strange = pyarrow.array([b"fine", b"\xff"], pyarrow.binary()).view(pyarrow.string())
        table = pyarrow.table({"text": strange})
        pyarrow.parquet.write_table(table, tmp_path / "some.parquet")
        with pytest.raises(UserError, match="record 2: not UTF-8 text"):
            documents(tmp_path / "some.parquet")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (GOOD + b'{"text": "tw', r"train\.jsonl: line 2: this is not JSON"),
            (GOOD + b'{"text": "\xff"}', r"train\.jsonl: line 2: not UTF-8"),
            (b"\0\xff" * 50, r"train\.jsonl: line 1: not UTF-8"),
            (GOOD + b"[3]", "cannot be read beyond record"),
        ],
    )
    def test_a_folder_of_a_data_set_names_them_too(
        self, tmp_path: Path, content: bytes, message: str
    ) -> None:
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "train.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=message):
            documents(tmp_path / "set", source="huggingface", cache=str(tmp_path))

    @pytest.mark.parametrize("source", ["text", "huggingface"])
    def test_records_without_text_are_left_out_and_counted_once(
        self, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "set"
        folder.mkdir()
        content = GOOD + b'{"text": null}\n{"text": ""}\n{"text": "two"}\n{"text": null}\n'
        (folder / "train.jsonl").write_bytes(content)
        cache = str(tmp_path / "cache")
        corpus = tokens.prepare(text_data(folder, source=source, cache=cache))
        ids = [*corpus.train.tokens, *corpus.validation.tokens]
        assert corpus.tokenizer.decode(ids) == "one<|endoftext|>two<|endoftext|>"
        assert capsys.readouterr().err == (
            f'data.path = "{folder}": 2 record(s) without text are left out\n'
        )

    @pytest.mark.parametrize("damage", KINDS)
    @pytest.mark.parametrize("kind", [*RECORDS, ".txt", ".jsonl.gz", ".jsonl.zst"])
    def test_whatever_is_damaged_the_end_is_clear(
        self, tmp_path: Path, kind: str, damage: str
    ) -> None:
        path = tmp_path / f"some{kind}"
        kind, compression = formats.kind_of(path)
        content = COMPRESS[compression](RECORDS.get(kind, "".join(TEXTS).encode()))
        for seed in range(5):
            path.write_bytes(damaged(content, damage, seed))
            found, said = outcome(documents, path)
            assert found or str(path) in said


class TestSeparators:
    STORIES = "One.\n\nMore.\n<|endoftext|>\nTwo.\n<|endoftext|>\n\nThree.\r\n<|endoftext|>\r\n"

    def test_the_usual_marker_divides_a_text_into_documents(self, tmp_path: Path) -> None:
        (tmp_path / "stories.txt").write_bytes(self.STORIES.encode())
        assert documents(tmp_path / "stories.txt") == ["One.\n\nMore.", "Two.", "Three."]

    @pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
    def test_it_becomes_the_end_token_and_is_not_text(self, tmp_path: Path, tokenizer: str) -> None:
        (tmp_path / "stories.txt").write_bytes(self.STORIES.encode())
        data = text_data(
            tmp_path / "stories.txt", tokenizer=tokenizer, cache=str(tmp_path / "cache")
        )
        corpus = tokens.prepare(data)
        ids = [*corpus.train.tokens, *corpus.validation.tokens]
        assert ids.count(corpus.tokenizer.end_token) == 3
        text = corpus.tokenizer.decode([i for i in ids if i != corpus.tokenizer.end_token])
        assert text == "One.\n\nMore.Two.Three."
        if tokenizer == "char":
            assert b"|" not in corpus.tokenizer.vocabulary

    def test_without_end_tokens_the_line_breaks_stay(self, tmp_path: Path) -> None:
        (tmp_path / "stories.txt").write_bytes(b"One.\n<|endoftext|>\nTwo.\n")
        cache = str(tmp_path / "cache")
        data = text_data(tmp_path / "stories.txt", end_of_text=False, cache=cache)
        corpus = tokens.prepare(data)
        ids = [*corpus.train.tokens, *corpus.validation.tokens]
        assert corpus.tokenizer.decode(ids) == "One.\n\nTwo.\n"

    @pytest.mark.parametrize(
        ("separator", "expected"),
        [
            ("", ["a\n---\nb<|endoftext|>\n\n\nc.c\n"]),
            ("---", ["a", "b<|endoftext|>\n\n\nc.c\n"]),
            ("\n\n", ["a\n---\nb<|endoftext|>", "c.c\n"]),
            ("\n", ["a", "---", "b<|endoftext|>", "c.c"]),
            (".", ["a\n---\nb<|endoftext|>\n\n\nc", "c\n"]),
        ],
    )
    def test_another_one_can_be_named(
        self, tmp_path: Path, separator: str, expected: list[str]
    ) -> None:
        (tmp_path / "some.txt").write_bytes(b"a\n---\nb<|endoftext|>\n\n\nc.c\n")
        assert documents(tmp_path / "some.txt", separator=separator) == expected
        (tmp_path / "some.jsonl").write_text(
            json.dumps({"text": "a\n---\nb<|endoftext|>\n\n\nc.c\n"})
        )
        assert documents(tmp_path / "some.jsonl", separator=separator) == expected

    @given(
        st.lists(st.text("ab\r\n<|>", max_size=12) | st.just("<||>"), max_size=10),
        st.sampled_from(["<||>", "\n", "\n\n", "a"]),
        st.sampled_from([0, 1, 2]),
    )
    def test_how_a_text_comes_in_does_not_matter(
        self, chunks: list[str], separator: str, breaks: int
    ) -> None:
        def together(chunks: list[str]) -> dict[int, str]:
            found: dict[int, str] = {}
            for number, text in corpora.split(chunks, separator, breaks):
                found[number] = found.get(number, "") + text
            return found

        text = "".join(chunks)
        whole = together([text])
        assert together(chunks) == together(list(text)) == whole
        assert not any(separator in document for document in whole.values())
        if not breaks:
            assert separator.join(whole[number] for number in range(len(whole))) == text

    def test_a_marker_across_two_reads_is_found(self, tmp_path: Path) -> None:
        first = "a" * ((1 << 20) - 5)
        (tmp_path / "some.txt").write_text(f"{first}\n<|endoftext|>\nb")
        assert documents(tmp_path / "some.txt") == [first, "b"]

    def test_no_separator_and_no_line_break_is_lost_or_slow(self) -> None:
        for text in ("\n" * 300_000, "<|endoftext|" * 30_000, "a" * 300_000):
            assert "".join(part for _, part in corpora.split([text], "<|endoftext|>")) == text


class TestOddFiles:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "the corpus is empty"),
            (b" \n\t\r\n ", "the corpus is empty; there is no text in it but white space"),
            (b"\xef\xbb\xbf", "the corpus is empty"),
            (b"<|endoftext|>\n" * 3, "the corpus is empty"),
            ("Grüße".encode("utf-16"), r"byte 0 \(0xff\).*UTF-16; .*`iconv -f UTF-16 -t UTF-8"),
            ("Hello".encode("utf-16-le"), "byte 1 is NUL; if it is UTF-16"),
            ("é".encode() + b"text\0", "byte 6 is NUL.*remove"),
            ("Grüße".encode("latin-1"), r"byte 2 \(0xfc\).*Latin-1, with `iconv -f LATIN1"),
            (
                gzip.compress(b"text", mtime=0),
                r"byte 1 \(0x8b\).*looks like gzip; let its name end in \.gz",
            ),
            (as_parquet(), r"byte .*looks like parquet; let its name end in \.parquet"),
        ],
    )
    def test_they_are_refused_with_the_place_and_what_to_do(
        self, tmp_path: Path, content: bytes, message: str
    ) -> None:
        (tmp_path / "some.txt").write_bytes(content)
        with pytest.raises(UserError, match=message) as said:
            documents(tmp_path / "some.txt")
        assert str(tmp_path / "some.txt") in str(said.value)

    def test_a_byte_order_mark_is_not_text(self, tmp_path: Path) -> None:
        for name, content in {".txt": b"Gr\xc3\xbc\xc3\x9fe\xef\xbb\xbf", **RECORDS}.items():
            if name != ".parquet":
                (tmp_path / f"some{name}").write_bytes(b"\xef\xbb\xbf" + content)
        assert documents(tmp_path / "some.txt") == ["Grüße\ufeff"]
        for name in (".jsonl", ".json"):
            assert documents(tmp_path / f"some{name}") == TEXTS
        assert documents(tmp_path / "some.csv", text_column="text") == TEXTS

    def test_what_is_no_file_is_said_to_be_so(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(UserError, match=r"data.path = .*pipe.*: this is a named pipe; write"):
            documents(tmp_path / "pipe")
        with pytest.raises(UserError, match=r"/dev/null.*: this is a device; write"):
            documents("/dev/null")
        with socket.socket(socket.AF_UNIX) as bound:
            where = Path.cwd()
            os.chdir(tmp_path)  # the name of a socket must be short
            bound.bind("socket")
            os.chdir(where)
        with pytest.raises(UserError, match="this is a socket"):
            documents(tmp_path / "socket")

    @pytest.mark.parametrize("source", ["text", "huggingface", "tiny_shakespeare"])
    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("~nobody-of-this-name/x", "no such home folder"),
            ("a" * 5000, "File name too long|no such file"),
            ("a\0b", "no such file|neither a folder or file nor a hub id"),
        ],
    )
    def test_paths_that_cannot_be_are_refused(
        self, tmp_path: Path, source: str, path: str, message: str
    ) -> None:
        with pytest.raises(UserError, match=message) as said:
            documents(path, source=source, cache=str(tmp_path))
        assert len(str(said.value)) < 1000
