"""Tokenising once: the split, the bytes, the cache, and what happens when it goes wrong."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdecoder.config import DataConfig
from jaxdecoder.data import corpora, tokenizers, tokens
from jaxdecoder.data.stories import stories
from jaxdecoder.errors import UserError


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def book(tmp_path: Path, text: str) -> str:
    (tmp_path / "book.txt").write_bytes(text.encode())
    return str(tmp_path / "book.txt")


def library(tmp_path: Path, *texts: str) -> str:
    (tmp_path / "books").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "books" / f"{number:04d}.txt").write_bytes(text.encode())
    return str(tmp_path / "books")


def text_of(corpus: tokens.Corpus) -> str:
    everything = np.concatenate([corpus.train.tokens, corpus.validation.tokens])
    return corpus.tokenizer.decode(everything)


class TestSplit:
    @given(st.integers(2, 10_000), st.sampled_from([0.1, 0.2, 0.3, 0.05, 0.9, 0.7, 1e-5]))
    def test_one_document_is_cut_where_decimal_arithmetic_says(self, n: int, share: float) -> None:
        place = tokens.place_to_split(np.array([0]), n, share)
        hundred_thousandths = round(share * 100_000)
        expected = n * (100_000 - hundred_thousandths) // 100_000
        assert place == min(max(expected, 1), n - 1)

    def test_tiny_shakespeare_is_cut_where_everyone_cuts_it(self) -> None:
        assert tokens.place_to_split(np.array([0]), 1_115_394, 0.1) == 1_003_854

    def test_many_documents_are_cut_at_the_nearest_start(self) -> None:
        starts = np.array([0, 500, 880, 915, 990])
        assert tokens.place_to_split(starts, 1000, 0.1) == 915

    def test_a_start_too_far_away_is_not_worth_it(self) -> None:
        assert tokens.place_to_split(np.array([0, 500]), 1000, 0.1) == 900

    def test_less_text_to_train_on_is_its_start(self, cache: str) -> None:
        data = DataConfig(stories_bytes=20_000, cache=cache)
        whole = tokens.prepare(data)
        part = tokens.prepare(dataclasses.replace(data, train_fraction=0.3))
        n = len(part.train.tokens)
        assert abs(n - 0.3 * len(whole.train.tokens)) < 500  # a story at most
        assert n in whole.train.starts
        np.testing.assert_array_equal(part.train.tokens, whole.train.tokens[:n])
        np.testing.assert_array_equal(part.train.starts, whole.train.starts[whole.train.starts < n])
        assert part.train.n_bytes == pytest.approx(
            len(part.tokenizer.decode(part.train.tokens).encode()), rel=0.05
        )
        np.testing.assert_array_equal(part.validation.tokens, whole.validation.tokens)

    def test_the_splits_are_the_corpus_in_order(self, tmp_path: Path, cache: str) -> None:
        texts = [f"Document {i} sagt: Grüße! " * (1 + i % 3) for i in range(40)]
        data = DataConfig(source="text", path=library(tmp_path, *texts), cache=cache)
        corpus = tokens.prepare(data)
        for tokenizer in ("char", "byte", "bpe"):
            corpus = tokens.prepare(dataclasses.replace(data, tokenizer=tokenizer))
            assert text_of(corpus) == "".join(text + "<|endoftext|>" for text in texts)
            found = []
            for split in (corpus.train, corpus.validation):
                stops = [*split.starts[1:], len(split.tokens)]
                rows = [split.tokens[a:b] for a, b in zip(split.starts, stops, strict=True)]
                assert all(row[-1] == corpus.tokenizer.end_token for row in rows)
                decoded = [corpus.tokenizer.decode(row[:-1]) for row in rows]
                assert split.n_bytes == sum(len(text.encode()) for text in decoded)
                found += decoded
            assert found == texts

    def test_without_end_of_text_documents_follow_each_other(
        self, tmp_path: Path, cache: str
    ) -> None:
        path = library(tmp_path, "abc", "de", "fghi", "j")
        data = DataConfig(source="text", path=path, cache=cache, end_of_text=False)
        corpus = tokens.prepare(data)
        assert text_of(corpus) == "abcdefghij"
        assert corpus.train.starts.tolist() == [0, 3, 5]
        assert corpus.validation.starts.tolist() == [0]
        assert corpus.tokenizer.end_token is None

    @pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
    def test_a_document_cut_in_the_middle_shares_out_its_bytes(
        self, tmp_path: Path, cache: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = "Füße, Äpfel und 中文. " * 500
        monkeypatch.setattr(corpora.cut, "__defaults__", (1000, 8000))  # many pieces
        data = DataConfig(
            source="text",
            path=book(tmp_path, text),
            tokenizer=tokenizer,
            validation_fraction=0.37,
            cache=cache,
        )
        corpus = tokens.prepare(data)
        n = len(corpus.train.tokens) + len(corpus.validation.tokens)
        assert len(corpus.train.tokens) == n * 63 // 100
        assert corpus.train.n_bytes == len(corpus.tokenizer.to_bytes(corpus.train.tokens))
        assert corpus.train.n_bytes + corpus.validation.n_bytes == len(text.encode())

    def test_unknown_characters_count_as_the_bytes_they_were(
        self, tmp_path: Path, cache: str
    ) -> None:
        data = DataConfig(
            source="text", path=book(tmp_path, "a" * 50 + "é" * 10), vocab_size=3, cache=cache
        )
        corpus = tokens.prepare(data)
        assert corpus.train.n_bytes + corpus.validation.n_bytes == 70

    def test_a_separate_validation_split_is_used_whole(self, tmp_path: Path, cache: str) -> None:
        (tmp_path / "hub").mkdir()
        (tmp_path / "hub" / "train.jsonl").write_text('{"text": "abc"}\n{"text": "d"}\n')
        (tmp_path / "hub" / "test.jsonl").write_text('{"text": "xyz"}\n{"text": "abcz"}\n')
        data = DataConfig(
            source="huggingface", path=str(tmp_path / "hub"), validation_split="test", cache=cache
        )
        corpus = tokens.prepare(data)
        decode = corpus.tokenizer.decode
        assert decode(corpus.train.tokens) == "abc<|endoftext|>d<|endoftext|>"
        assert decode(corpus.validation.tokens) == "xyz<|endoftext|>abcz<|endoftext|>"
        assert corpus.validation.starts.tolist() == [0, 4]
        assert (corpus.train.n_bytes, corpus.validation.n_bytes) == (4, 7)

    @pytest.mark.parametrize("text", ["", "a"])
    def test_a_corpus_too_small_to_split_is_refused(
        self, tmp_path: Path, cache: str, text: str
    ) -> None:
        data = DataConfig(source="text", path=book(tmp_path, text), cache=cache, end_of_text=False)
        with pytest.raises(UserError, match=r"empty|1 token\(s\), and 2 are the least"):
            tokens.prepare(data)
        assert no_remains(cache)

    def test_the_real_tiny_shakespeare(self, cache: str) -> None:
        named = os.environ.get("JAXDECODER_TINY_SHAKESPEARE", "")
        path = named or ".cache/tinyshakespeare.txt"
        if not Path(path).is_file():
            pytest.skip("JAXDECODER_TINY_SHAKESPEARE names no copy and .cache has none")
        data = DataConfig(source="tiny_shakespeare", path=path, end_of_text=False, cache=cache)
        corpus = tokens.prepare(data)
        assert corpus.tokenizer.vocab_size == 65
        assert (len(corpus.train.tokens), len(corpus.validation.tokens)) == (1_003_854, 111_540)
        assert text_of(corpus) == Path(path).read_bytes().decode()


class TestFiles:
    def test_a_second_call_opens_the_same_tokens_without_reading_the_text(
        self, cache: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = DataConfig(stories_bytes=20_000, cache=cache)
        first = tokens.prepare(data)
        monkeypatch.setattr(corpora, "pieces", None)
        second = tokens.prepare(data)
        np.testing.assert_array_equal(first.train.tokens, second.train.tokens)
        np.testing.assert_array_equal(first.validation.starts, second.validation.starts)
        assert first.tokenizer == second.tokenizer

    @pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(DataConfig)])
    def test_the_key_follows_what_changes_tokens_and_nothing_else(
        self, tmp_path: Path, cache: str, field: str
    ) -> None:
        """A new field must say here which it is."""
        (tmp_path / "hub").mkdir()
        for name in ("train", "test"):
            (tmp_path / "hub" / f"{name}.jsonl").write_text('{"text": "abc", "other": "def"}\n')
        made = tokens.prepare(DataConfig(stories_bytes=3000, cache=cache))
        tokenizers.save(made.tokenizer, tmp_path / "tokenizer.json")
        stories = DataConfig(stories_bytes=3000, cache=cache)
        hub = DataConfig(source="huggingface", path=str(tmp_path / "hub"), cache=cache)
        lines = dataclasses.replace(hub, source="text")
        changes: dict[str, tuple[DataConfig, object]] = {
            "source": (lines, "huggingface"),
            "path": (lines, str(tmp_path / "hub" / "test.jsonl")),
            "text_column": (lines, "other"),
            "separator": (lines, ""),
            "validation_split": (hub, "test"),
            "validation_fraction": (stories, 0.2),
            "stories_bytes": (stories, 4000),
            "stories_plots": (stories, ("lost",)),
            "stories_names": (stories, 3),
            "stories_paragraphs": (stories, False),
            "seed": (stories, 1),
            "tokenizer": (stories, "byte"),
            "tokenizer_path": (stories, str(tmp_path / "tokenizer.json")),
            "vocab_size": (stories, 20),
            "end_of_text": (stories, False),
        }
        keeps: dict[str, object] = {
            "train_fraction": 0.5,
            "mode": "padded",
            "sampling": "random",
            "cache": str(tmp_path / "another"),
            "processes": 3,
        }
        data, value = changes[field] if field in changes else (stories, keeps[field])
        changed = dataclasses.replace(data, **{field: value})  # type: ignore[arg-type]
        assert (tokens.cache_key(data) == tokens.cache_key(changed)) == (field in keeps)

    def test_corpora_without_separators_keep_the_key_they_had(self, cache: str) -> None:
        """So that runs of earlier versions can go on."""
        data = DataConfig(stories_bytes=3000, cache=cache)
        assert tokens.cache_key(data) == "0c20e5b6bfa21f48af1ffde34f37e906"

    @pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
    @given(texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1))
    def test_any_documents_come_back_from_their_tokens(
        self, tmp_path_factory: pytest.TempPathFactory, tokenizer: str, texts: list[str]
    ) -> None:
        folder = tmp_path_factory.mktemp("any")
        (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
        data = DataConfig(
            source="text",
            path=str(folder / "texts.jsonl"),
            tokenizer=tokenizer,
            vocab_size=300 if tokenizer == "bpe" else None,
            cache=str(folder),
        )
        if not "".join(texts).strip():
            with pytest.raises(UserError, match="no text in it but white space"):
                tokens.prepare(data)
            return
        corpus = tokens.prepare(data)
        ids = np.concatenate([corpus.train.tokens, corpus.validation.tokens])
        ends = np.flatnonzero(ids == corpus.tokenizer.end_token)
        documents = np.split(ids, ends + 1)[:-1]
        assert [corpus.tokenizer.decode(document[:-1]) for document in documents] == texts
        assert corpus.train.n_bytes + corpus.validation.n_bytes == len("".join(texts).encode())

    def test_large_vocabularies_take_four_bytes_and_small_ones_two(
        self, tmp_path: Path, cache: str
    ) -> None:
        data = DataConfig(source="text", path=book(tmp_path, "abc"), cache=cache)
        assert tokens.prepare(data).train.tokens.dtype == np.uint16
        rare = "".join(map(chr, range(0x20000, 0x20000 + 70_000)))
        data = DataConfig(source="text", path=book(tmp_path, rare), cache=cache)
        corpus = tokens.prepare(data)
        assert corpus.train.tokens.dtype == np.uint32
        assert text_of(corpus) == rare + "<|endoftext|>"


def no_remains(cache: str) -> bool:
    """Whether there is neither a finished nor an unfinished folder of tokens."""
    return not [path for path in Path(cache).glob("tokens/*") if path.is_dir()]


def run_script(script: str, *arguments: str) -> subprocess.Popen[str]:
    """Runs a script given on standard input, which helpers cannot import as a main module."""
    process = subprocess.Popen(
        [sys.executable, "-", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdin is not None
    process.stdin.write(textwrap.dedent(script))
    process.stdin.close()
    process.stdin = None
    return process


class TestWhenThingsGoWrong:
    def test_an_error_half_way_leaves_nothing_and_the_next_call_succeeds(
        self, cache: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = DataConfig(stories_bytes=20_000, cache=cache)
        with monkeypatch.context() as patch:

            def fail(*_: object) -> None:
                raise RuntimeError("lightning")

            patch.setattr(tokens, "_divide", fail)
            with pytest.raises(RuntimeError, match="lightning"):
                tokens.prepare(data)
        assert no_remains(cache)
        assert len(tokens.prepare(data).train.tokens) > 10_000

    def test_a_full_disk_is_reported_with_the_folder_and_the_room_needed(
        self, tmp_path: Path, cache: str
    ) -> None:
        resource = pytest.importorskip("resource")
        # Words, so that the tokens outgrow the limit but nothing else that is written does.
        data = DataConfig(
            source="text",
            path=book(tmp_path, "some words " * 20_000),
            tokenizer="char",
            cache=cache,
        )
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(UserError) as raised:
                tokens.prepare(data)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert str(Path(cache) / "tokens") in str(raised.value)
        assert "about 0.5 MB" in str(raised.value)
        assert no_remains(cache)

    def test_a_cache_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        data = DataConfig(stories_bytes=3000, cache=str(tmp_path / "file"))
        with pytest.raises(UserError, match=r"data\.cache = .*file.*cannot be written"):
            tokens.prepare(data)

    def test_a_kill_half_way_leaves_no_corpus_and_the_next_call_succeeds(self, cache: str) -> None:
        script = """
            import os, signal, sys
            from jaxdecoder.config import DataConfig
            from jaxdecoder.data import tokens
            tokens._divide = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            tokens.prepare(DataConfig(stories_bytes=20_000, cache=sys.argv[1]))
        """
        process = run_script(script, cache)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        data = DataConfig(stories_bytes=20_000, cache=cache)
        left = [path.name for path in Path(cache).glob("tokens/*") if path.is_dir()]
        assert left == [tokens.cache_key(data) + ".partial"]
        assert len(tokens.prepare(data).train.tokens) > 10_000
        left = [path.name for path in Path(cache).glob("tokens/*") if path.is_dir()]
        assert left == [tokens.cache_key(data)]

    def test_two_processes_with_helpers_make_one_corpus_like_one_process_alone(
        self, tmp_path: Path, cache: str
    ) -> None:
        text = "\n".join(stories(60_000, 0))
        path = book(tmp_path, text)
        script = """
            import sys
            from jaxdecoder.config import DataConfig
            from jaxdecoder.data import encoding, tokens
            encoding.JOB, encoding.JOBS_ALONE = 10_000, 1
            tokens.corpora.cut.__defaults__ = (5_000, 40_000)
            wrote, write = [], tokens._write
            tokens._write = lambda *a: (wrote.append(1), write(*a))
            corpus = tokens.prepare(DataConfig(
                source="text", path=sys.argv[1], tokenizer="bpe", vocab_size=400, processes=2,
                cache=sys.argv[2]))
            print(len(wrote), len(corpus.train.tokens), len(corpus.validation.tokens))
        """
        two = [run_script(script, path, cache) for _ in range(2)]
        answers = [process.communicate(timeout=120) for process in two]
        assert [process.returncode for process in two] == [0, 0], answers
        counts = sorted(answer[0].split() for answer in answers)
        assert [count[0] for count in counts] == ["0", "1"]  # one wrote, the other waited
        alone = tokens.prepare(
            DataConfig(
                source="text",
                path=path,
                tokenizer="bpe",
                vocab_size=400,
                processes=1,
                cache=str(tmp_path / "other"),
            )
        )
        together = tokens.prepare(
            DataConfig(source="text", path=path, tokenizer="bpe", vocab_size=400, cache=cache)
        )
        np.testing.assert_array_equal(together.train.tokens, alone.train.tokens)
        np.testing.assert_array_equal(together.validation.tokens, alone.validation.tokens)
        assert together.train.n_bytes == alone.train.n_bytes
        assert text_of(together) == text + "<|endoftext|>"
