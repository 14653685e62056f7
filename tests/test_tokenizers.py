"""Tokenizers: text survives the round trip, and ours agrees with others' implementations."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer

from jaxdecoder.config import DataConfig
from jaxdecoder.data import tokenizers, vocabularies
from jaxdecoder.data.corpora import cut
from jaxdecoder.data.stories import stories
from jaxdecoder.data.tokenizers import Tokenizer
from jaxdecoder.errors import UserError

STRANGE = (
    "Ünïcödé 中文字 العربية 🤖👩\u200d🚀 'tis don't I'LL 12345  \n\n\t x=1;  \r\n"
    "<|endoftext|> e\u0301 \x00"
)


def build(tokenizer: str, *texts: str, **fields: object) -> Tokenizer:
    data = DataConfig(tokenizer=tokenizer, **fields)  # type: ignore[arg-type]
    return vocabularies.build(data, lambda: texts)


@pytest.fixture(scope="module")
def text() -> str:
    return "\n\n".join(stories(100_000, 0)) + STRANGE


@pytest.fixture(scope="module")
def bpe(text: str) -> Tokenizer:
    return build("bpe", text, vocab_size=1000)


@pytest.fixture(scope="module")
def theirs(text: str) -> HuggingFaceTokenizer:
    return vocabularies.train_bpe([text], 999)


@pytest.fixture(scope="module", params=["char", "byte", "bpe"])
def any_kind(request: pytest.FixtureRequest, text: str) -> Tokenizer:
    return build(request.param, text)


class TestEveryKind:
    def test_decode_inverts_encode(self, any_kind: Tokenizer, text: str) -> None:
        ids = any_kind.encode(text)
        assert ids.dtype == np.int32
        assert ids.min() >= 0
        assert ids.max() < any_kind.vocab_size
        assert any_kind.decode(ids) == text

    def test_an_empty_text_has_no_tokens(self, any_kind: Tokenizer) -> None:
        assert any_kind.encode("").shape == (0,)
        assert any_kind.decode([]) == ""

    def test_text_cannot_spell_the_end_token(self, any_kind: Tokenizer) -> None:
        ids = any_kind.encode("a<|endoftext|>b")
        assert any_kind.end_token not in ids
        assert any_kind.decode(ids) == "a<|endoftext|>b"

    def test_the_end_token_is_the_last_and_reads_as_such(self, any_kind: Tokenizer) -> None:
        assert any_kind.end_token == any_kind.vocab_size - 1
        assert any_kind.decode([any_kind.end_token]) == "<|endoftext|>"

    def test_saving_and_loading_gives_the_same_tokenizer(
        self, any_kind: Tokenizer, tmp_path: Path
    ) -> None:
        tokenizers.save(any_kind, tmp_path / "tokenizer.json")
        loaded = tokenizers.load(tmp_path / "tokenizer.json")
        assert loaded == any_kind
        np.testing.assert_array_equal(loaded.encode(STRANGE), any_kind.encode(STRANGE))

    def test_streaming_yields_only_whole_characters_and_all_of_them(
        self, any_kind: Tokenizer
    ) -> None:
        feed = tokenizers.stream_decoder(any_kind)
        yielded = [feed(i) for i in any_kind.encode(STRANGE).tolist()]
        assert not any("\ufffd" in piece for piece in yielded)
        assert "".join(yielded) + feed(final=True) == STRANGE

    def test_byte_lengths_add_up_to_the_text(self, any_kind: Tokenizer) -> None:
        ids = [*any_kind.encode(STRANGE), any_kind.end_token]
        assert any_kind.byte_lengths[ids].sum() == len(STRANGE.encode())

    def test_ids_that_only_the_model_has_read_as_unknown(self, any_kind: Tokenizer) -> None:
        assert any_kind.decode([any_kind.vocab_size, any_kind.vocab_size + 5]) == "\ufffd\ufffd"

    def test_a_broken_prompt_does_not_crash(self, any_kind: Tokenizer) -> None:
        half = "a\udc80"  # how Python gives a byte that is not text on the command line
        if any_kind.kind == "char":
            with pytest.raises(UserError, match="does not know"):
                any_kind.encode(half)
        else:
            assert any_kind.decode(any_kind.encode(half)) == "a?"


@given(st.binary(max_size=60))
def test_streaming_any_bytes_equals_decoding_them_at_once(content: bytes) -> None:
    byte = build("byte")
    feed = tokenizers.stream_decoder(byte)
    assert "".join(feed(i) for i in content) + feed(final=True) == byte.decode(list(content))


class TestChar:
    def test_ids_are_the_sorted_characters(self) -> None:
        char = build("char", "hello", " world", end_of_text=False)
        assert char.vocab_size == len(set("hello world"))
        assert char.end_token is None
        assert char.decode(range(char.vocab_size)) == " dehlorw"
        np.testing.assert_array_equal(char.encode("how"), [" dehlorw".index(c) for c in "how"])

    def test_a_limit_keeps_the_most_frequent_and_marks_the_rest(self) -> None:
        char = build("char", "aaaa bbb cc d", vocab_size=5)
        assert char.vocab_size == 5  # a, b, space, the unknown symbol, the end token
        assert char.decode(char.encode("abcd ")) == "ab\ufffd\ufffd "
        assert char.encode("c")[0] == char.unknown != char.end_token

    def test_a_generous_limit_keeps_every_character(self) -> None:
        char = build("char", "ab\ufffdé", vocab_size=100, end_of_text=False)
        assert char.decode(range(char.vocab_size)) == "abé\ufffd"

    def test_a_limit_with_no_room_for_a_character_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"data\.vocab_size = 2: at least 3 are needed"):
            build("char", "ab", vocab_size=2)

    def test_characters_never_seen_are_named(self) -> None:
        char = build("char", "abc")
        with pytest.raises(UserError, match='does not know "zé": its characters are "abc"'):
            char.encode("azéaz")


class TestBpe:
    def agrees(self, ours: Tokenizer, theirs: HuggingFaceTokenizer, text: str) -> None:
        np.testing.assert_array_equal(ours.encode(text), theirs.encode(text).ids)

    def test_it_agrees_with_the_tokenizers_library(
        self, bpe: Tokenizer, theirs: HuggingFaceTokenizer
    ) -> None:
        for story in stories(20_000, 1):
            self.agrees(bpe, theirs, story)
        self.agrees(bpe, theirs, STRANGE)
        self.agrees(bpe, theirs, " \n" * 50 + "    deep\n\n\n")

    @settings(max_examples=200)
    @given(sample=st.text(st.sampled_from("abcdehnorst '\n\tÉ中.1") | st.characters(codec="utf-8")))
    def test_it_agrees_on_any_text(
        self, bpe: Tokenizer, theirs: HuggingFaceTokenizer, sample: str
    ) -> None:
        self.agrees(bpe, theirs, sample)

    def test_the_count_is_as_asked_with_all_bytes_and_the_end(self, bpe: Tokenizer) -> None:
        assert bpe.vocab_size == 1000
        assert {bytes([value]) for value in range(256)} < set(bpe.vocabulary)
        assert len(set(bpe.vocabulary)) == 1000

    def test_it_is_deterministic(self, bpe: Tokenizer, text: str) -> None:
        assert build("bpe", text, vocab_size=1000) == bpe

    def test_it_shortens_text(self, bpe: Tokenizer, text: str) -> None:
        assert len(bpe.encode(text)) < len(text) / 2.5

    def test_a_small_corpus_gives_the_merges_it_has(self) -> None:
        bpe = build("bpe", "aaaa", vocab_size=4096, end_of_text=False)
        assert bpe.vocab_size == 258  # the bytes, aa, aaaa
        assert len(bpe.encode("aaaa")) == 1

    def test_fewer_entries_than_bytes_are_refused(self) -> None:
        with pytest.raises(UserError, match=r"data.vocab_size = 100: .* at least 257"):
            build("bpe", "aaaa", vocab_size=100)

    def test_it_learns_from_a_bounded_sample(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(vocabularies, "BPE_SAMPLE_BYTES", 10)
        read = []

        def texts():  # type: ignore[no-untyped-def]
            for number in range(100):
                read.append(number)
                yield "word word"

        vocabularies.build(DataConfig(tokenizer="bpe"), texts)
        assert len(read) < 5

    @pytest.mark.slow
    def test_110_000_entries(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        letters = rng.choice(list("etaoinshrdlucmfwypvbgkjqxz"), (40_000, 8))
        corpus = " ".join("".join(word) for word in letters)
        theirs = vocabularies.train_bpe([corpus], 109_999)
        ours = vocabularies.from_trained(theirs, end_of_text=True)
        assert ours.vocab_size == 110_000
        tokenizers.save(ours, tmp_path / "tokenizer.json")
        self.agrees(tokenizers.load(tmp_path / "tokenizer.json"), theirs, corpus[:100_000])


def synthetic_ranks() -> dict[bytes, int]:
    """All bytes, and merges that love white space and punctuation, where words could be cut."""
    merges = [
        b"\n\n",
        b"  ",
        b" \n",
        b"\r\n",
        b".\n",
        b".\n\n",
        b"./",
        b".\n/",
        b" a",
        b"\na",
        b"aa",
    ]
    merges += [b"\t\t", b" .", b"'s", b"11", b"111", b"\n "]
    return {entry: i for i, entry in enumerate([*(bytes([b]) for b in range(256)), *merges])}


@pytest.fixture(scope="module")
def published() -> dict[str, Tokenizer]:
    """The published encodings' own word patterns, over the synthetic ranks."""
    found = {}
    for name in ("gpt2", "cl100k_base", "o200k_base"):
        with pytest.MonkeyPatch.context() as patch:
            for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
                patch.setattr(tiktoken_ext.openai_public, loader, lambda *_, **__: {b"a": 0})
            pattern = getattr(tiktoken_ext.openai_public, name)()["pat_str"]
        found[name] = Tokenizer("bpe", name, tuple(synthetic_ranks()), pattern=pattern)
    found["bpe"] = Tokenizer(
        "bpe", "bpe", tuple(synthetic_ranks()), pattern=vocabularies.BPE_PATTERN
    )
    return found


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base", "bpe"])
@settings(max_examples=300)
@given(sample=st.text(st.sampled_from(" \n\r\t\x1c\xa0a'sÉ中.1/_\u0301"), max_size=40))
def test_a_text_tokenises_in_pieces_as_it_does_whole(
    published: dict[str, Tokenizer], name: str, sample: str
) -> None:
    tokenizer = published[name]
    pieces = [tokenizer.encode(piece) for piece in cut([sample], piece=4, longest=1000)]
    whole = tokenizer.encode(sample)
    np.testing.assert_array_equal(np.concatenate([*pieces, whole[:0]]), whole)


def test_a_large_document_is_encoded_in_pieces_and_pathological_ones_end(bpe: Tokenizer) -> None:
    text = "The cat sat on the mat.\n" * 20_000
    assert bpe.decode(bpe.encode(text)) == text
    for character in ("a", " ", "\n", "."):
        assert bpe.decode(bpe.encode(character * 600_000)) == character * 600_000


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
@pytest.mark.parametrize("line", ["a", " ", "中", "\t.", f"{'a' * 5000}{' ' * 5000}"])
def test_one_endless_line_takes_seconds(kind: str, line: str) -> None:
    text = "x" + line * (300_000 // len(line))
    began = time.process_time()
    made = build(kind, text)
    assert made.decode(made.encode(text)) == text
    assert time.process_time() - began < 20  # dividing no words, bpe takes a minute and more


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base", "bpe"])
@pytest.mark.parametrize("character", [" ", "\n", "a", "1", "\u3000"])
def test_no_run_is_too_long_for_a_pattern(
    published: dict[str, Tokenizer], name: str, character: str
) -> None:
    text = f"x{character * 1_500_000}x"
    assert published[name].decode(published[name].encode(text)) == text


def test_words_of_ordinary_length_are_learned_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = list(stories(50_000, 0))
    learned = build("bpe", *texts, vocab_size=600)
    monkeypatch.setattr(vocabularies, "BPE_LONGEST_WORD", 10**9)
    assert build("bpe", *texts, vocab_size=600) == learned


def test_text_without_spaces_is_learned_from_a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(text: str) -> int:
        texts = iter([text] * 1000)
        list(vocabularies._sample(texts, 1_000_000))
        return 1000 - len(list(texts))

    assert read("ACGT" * 2500) == 10
    assert read("some " * 2000) == 100


class TestTiktoken:
    def test_a_published_encoding_becomes_a_value(self, tmp_path: Path) -> None:
        encoding = tiktoken.Encoding(
            "gapped",
            pat_str=vocabularies.BPE_PATTERN,
            mergeable_ranks=synthetic_ranks(),
            special_tokens={"<|endoftext|>": 280, "<|other|>": 285},
        )
        ours = vocabularies.from_tiktoken(encoding)
        assert ours.vocab_size == encoding.n_vocab == 286
        assert ours.end_token == encoding.eot_token == 280
        tokenizers.save(ours, tmp_path / "tokenizer.json")
        ours = tokenizers.load(tmp_path / "tokenizer.json")
        assert ours.encode(STRANGE).tolist() == encoding.encode_ordinary(STRANGE)

    def test_without_a_network_the_way_round_is_named(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreachable(_: str) -> None:
            raise ConnectionError("no route to host")

        monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
        with pytest.raises(UserError, match=r"data.tokenizer_path to a folder with GPT-2's vocab"):
            build("gpt2")
        with pytest.raises(UserError, match=r"downloaded once.*TIKTOKEN_CACHE_DIR"):
            build("cl100k_base")

    def test_an_unknown_name_gets_a_suggestion(self) -> None:
        with pytest.raises(UserError, match=r"data.tokenizer = .*did you mean gpt2\?"):
            build("gtp2")

    def test_a_fixed_vocabulary_cannot_be_resized(self) -> None:
        with pytest.raises(UserError, match="byte always has 257 entries"):
            build("byte", vocab_size=1000)


def write_gpt2_files(folder: Path, merges: list[str], **changes: int) -> Path:
    """A small vocabulary in GPT-2's format, its byte alphabet taken from another library."""
    from tokenizers.pre_tokenizers import ByteLevel

    order = sorted(ByteLevel.alphabet())
    entries = [*order, *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"]
    vocab = {entry: i for i, entry in enumerate(entries)} | changes
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    text = "#version: 0.2\n" + "\n".join(merges) + "\n"
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    return folder


class TestGpt2Files:
    MERGES = ("Ġ t", "h e", "Ġt he", "Ã ©", "# #", "Ċ Ċ")

    def test_they_give_the_tokenizer_they_describe(self, tmp_path: Path) -> None:
        from tokenizers import models, pre_tokenizers

        folder = write_gpt2_files(tmp_path, list(self.MERGES))
        ours = build("gpt2", tokenizer_path=str(folder))
        theirs = HuggingFaceTokenizer(
            models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        )
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        for text in (STRANGE.replace("<|endoftext|>", ""), "the the café ## \n\n the"):
            assert ours.encode(text).tolist() == theirs.encode(text).ids
            assert ours.decode(ours.encode(text)) == text
        assert ours.name == "gpt2"
        assert ours.vocab_size == 256 + len(self.MERGES) + 1
        assert ours.end_token == ours.vocab_size - 1

    def test_a_folder_without_them_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"vocab\.json: No such file.*it should be a folder"):
            build("gpt2", tokenizer_path=str(tmp_path))

    def test_files_that_do_not_match_are_refused(self, tmp_path: Path) -> None:
        folder = write_gpt2_files(tmp_path, ["h e"])
        (folder / "merges.txt").write_text("x y\n")
        with pytest.raises(UserError, match=r"not a pair in GPT-2's format \(KeyError: 'xy'\)"):
            build("gpt2", tokenizer_path=str(folder))

    def test_another_numbering_is_refused(self, tmp_path: Path) -> None:
        folder = write_gpt2_files(tmp_path, ["h e", "t h"], he=257, th=256)
        with pytest.raises(UserError, match="not numbered as GPT-2's"):
            build("gpt2", tokenizer_path=str(folder))

    def test_they_are_for_gpt2_only(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="describe gpt2, not cl100k_base"):
            build("cl100k_base", tokenizer_path=str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"kind": "odd", "name": "x"}'])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
        tokenizers.load(path)


def test_a_missing_tokenizer_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.json: the tokenizer cannot be read: No such file"):
        tokenizers.load(tmp_path / "gone.json")
