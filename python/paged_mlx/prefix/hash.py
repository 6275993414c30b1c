"""The name of a page's content: a SHA-256 chain over tokens.

    hash of page i = SHA-256(hash of page i - 1, tokens of page i, extra keys of page i)

so equal hashes mean equal tokens from position 0 on, and equal keys. The hash does not
depend on process, machine or Python version.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256

from paged_mlx.errors import as_list, fail, kind_of, whole_number
from paged_mlx.pages.tokens import TOKEN_BYTES, Tokens, pack_tokens

HashPage = Callable[[bytes, bytes, bytes], bytes]


@dataclass(frozen=True, slots=True)
class ExtraKey:
    """Something besides tokens that K and V depend on.

    Attributes:
        kind: Kind of the value, such as ``"adapter"``, ``"salt"`` or ``"image"``. Equal
            values of different kinds never match.
        value: The adapter's name, the salt, the digest of the image.
        position: The first position it bears on; pages from there on have other hashes.
    """

    kind: str
    value: str | bytes | int
    position: int = 0


def root_hash(page_size: int) -> bytes:
    """The parent hash of every first page."""
    return sha256(b"paged_mlx pages of %d int32 tokens" % page_size).digest()


def hash_page(parent_hash: bytes, tokens: bytes, keys: bytes) -> bytes:
    """Return a page's hash from its parent's, its packed tokens and its packed keys."""
    return sha256(parent_hash + tokens + keys).digest()


def page_hashes(tokens: Tokens, page_size: int, keys: Iterable[ExtraKey] = ()) -> list[bytes]:
    """Return the hash of each full page of a sequence, 32 bytes each."""
    packed, page_keys = pack_tokens(tokens), pack_keys(keys, page_size)
    width = page_size * TOKEN_BYTES
    hashes, parent, new_hash = [], root_hash(page_size), sha256().copy
    for start in range(0, len(packed) // width * width, width):
        page_hash = new_hash()
        page_hash.update(parent + packed[start : start + width])
        if page_keys:
            page_hash.update(page_keys.get(start // width, b""))
        parent = page_hash.digest()
        hashes.append(parent)
    return hashes


def pack_keys(
    keys: Iterable[ExtraKey], page_size: int, function: str = "pack_keys"
) -> dict[int, bytes]:
    """Return, for each page that keys bear on first, their packed form; order does not matter.

    Every part has its type and length before it, so no two sets of keys pack alike.
    """
    packed: dict[int, list[bytes]] = {}
    for key in as_list(function, "keys", keys, "ExtraKeys"):
        if not isinstance(key, ExtraKey):
            fail(function, "keys must be ExtraKey objects", kind_of(key))
        position = whole_number(function, "position", key.position)
        parts = [_packed_value(function, value) for value in (key.kind, key.value, position)]
        packed.setdefault(position // page_size, []).append(b"".join(parts))
    return {index: b"".join(sorted(parts)) for index, parts in packed.items()}


def _packed_value(function: str, value: str | bytes | int) -> bytes:
    if isinstance(value, str):
        kind, data = b"s", value.encode()
    elif isinstance(value, bytes):
        kind, data = b"b", value
    elif isinstance(value, int):
        kind, data = b"i", b"%d" % value
    else:
        fail(function, "an extra key's value must be a str, bytes or int", repr(value))
    return kind + struct.pack("<Q", len(data)) + data
