"""How much memory, and how long, it takes to tokenise a corpus of a given size.

    python -m benchmarks.tokenize_memory --megabytes 2000 --tokenizer bpe

The corpus is made of invented words, in one file (the hard case: one document larger than what
may be held in memory; harder still: in one line, or without white space) or in documents of a page
each. Memory is the sum over this process and its
helpers, sampled 20 times a second from /proc, so it runs on Linux.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from jaxdecoder.config import DataConfig
from jaxdecoder.data import tokens
from jaxdecoder.errors import friendly

PAGE = 3000
LETTERS = np.array(list("etaoinshrdlucmfw"))


BETWEEN = {"lines": (" ", "\n"), "line": (" ", " "), "nothing": ("", "")}
"""What is between words and between every ten of them."""


def write_corpus(path: Path, n_bytes: int, pages: bool, between: str, seed: int = 0) -> None:
    """Words with the frequencies of a language (Zipf's law)."""
    word_end, line_end = BETWEEN[between]
    rng = np.random.default_rng(seed)
    words = np.array(["".join(rng.choice(LETTERS, rng.integers(1, 10))) for _ in range(50_000)])
    path.mkdir()
    written = number = 0
    while written < n_bytes:
        ranks = np.minimum(rng.zipf(1.2, 1_000_000), len(words)) - 1
        text = line_end.join(word_end.join(line) for line in np.split(words[ranks], 100_000))
        text = text[: n_bytes - written]
        if pages:
            for start in range(0, len(text), PAGE):
                (path / f"{number:08d}.txt").write_text(text[start : start + PAGE])
                number += 1
        else:
            with (path / "book.txt").open("a") as file:
                file.write(text)
        written += len(text)


def resident_bytes() -> int:
    """Resident memory of this process and its children."""
    total = 0
    for process in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        try:
            total += int(Path(f"/proc/{process}/statm").read_text().split()[1])
        except FileNotFoundError:
            continue  # it has just ended
    return total * os.sysconf("SC_PAGE_SIZE")


@friendly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--tokenizer", default="bpe")
    parser.add_argument("--tokenizer-path", default="")
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--pages", action="store_true", help="many documents instead of one")
    parser.add_argument("--between", choices=BETWEEN, default="lines", help="what divides words")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        write_corpus(corpus, arguments.megabytes * 1_000_000, arguments.pages, arguments.between)
        data = DataConfig(
            source="text",
            path=str(corpus),
            tokenizer=arguments.tokenizer,
            tokenizer_path=arguments.tokenizer_path,
            vocab_size=arguments.vocab_size,
            processes=arguments.processes,
            cache=str(Path(folder) / "cache"),
        )
        peak = before = resident_bytes()
        finished = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not finished.wait(0.05):
                peak = max(peak, resident_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        began = time.perf_counter()
        prepared = tokens.prepare(data)
        seconds = time.perf_counter() - began
        finished.set()
        watcher.join()
    n = len(prepared.train.tokens) + len(prepared.validation.tokens)
    print(f"corpus       {arguments.megabytes:,} MB, {arguments.tokenizer}")
    print(f"vocabulary   {prepared.tokenizer.vocab_size:,}")
    print(f"tokens       {n:,}")
    print(f"time         {seconds:.1f} s, {arguments.megabytes / seconds:.1f} MB/s")
    print(f"peak memory  {peak / 1e6:,.0f} MB, of which {before / 1e6:,.0f} MB before the start")


if __name__ == "__main__":
    main()
