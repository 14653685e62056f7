"""Damage files as disks, crashes and people do: bytes and a seed in, other bytes out."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from jaxdecoder.errors import UserError

Damage = Callable[[bytes, random.Random], bytes]


def _cut_off(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _emptied(content: bytes, rng: random.Random) -> bytes:
    return b""


def _one_bit(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def _some_bytes(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(1 + len(content) // 50):
        damaged[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(damaged)


def _zeros(content: bytes, rng: random.Random) -> bytes:
    """A block that was never written reads as zeros."""
    start = rng.randrange(len(content))
    length = rng.randint(1, min(512, len(content) - start))
    return content[:start] + bytes(length) + content[start + length :]


def _left_out(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.randint(1, 64) :]


def _twice(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return content + content[start:]


def _digit(content: bytes, rng: random.Random) -> bytes:
    """Another number: what stays readable is the hardest to notice."""
    places = [i for i, byte in enumerate(content) if 48 <= byte <= 57]
    if not places:
        return _one_bit(content, rng)
    place = rng.choice(places)
    return content[:place] + str(rng.randrange(10)).encode() + content[place + 1 :]


def _letter(content: bytes, rng: random.Random) -> bytes:
    places = [i for i, byte in enumerate(content) if chr(byte).isascii() and chr(byte).isalpha()]
    if not places:
        return _one_bit(content, rng)
    place = rng.choice(places)
    return content[:place] + rng.choice("aeiouxyz").encode() + content[place + 1 :]


def _garbage(content: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(len(content))


def _other_text(content: bytes, rng: random.Random) -> bytes:
    return rng.choice(
        [b"{}", b"[]", b"null", b"<html>please log in</html>", b"[" * 100_000, b"\xef\xbb\xbf{"]
    )


KINDS: dict[str, Damage] = {
    "cut_off": _cut_off,
    "emptied": _emptied,
    "one_bit": _one_bit,
    "some_bytes": _some_bytes,
    "zeros": _zeros,
    "left_out": _left_out,
    "twice": _twice,
    "digit": _digit,
    "letter": _letter,
    "garbage": _garbage,
    "other_text": _other_text,
}


def damaged(content: bytes, kind: str, seed: int) -> bytes:
    """Return other bytes than `content`, which must not be empty; the same for the same seed."""
    rng = random.Random(f"{kind} {seed}")
    while (found := KINDS[kind](content, rng)) == content:
        pass
    return found


def outcome(function: Callable[..., Any], *arguments: object) -> tuple[Any, str]:
    """What a function returned, or else what it told the user."""
    try:
        return function(*arguments), ""
    except UserError as error:
        return None, str(error)
