"""The names of pages: a SHA-256 chain over tokens and typed keys."""

import hashlib

import numpy as np
import pytest
from paged_mlx.pages.tokens import pack_tokens
from paged_mlx.prefix.hash import ExtraKey, page_hashes, root_hash


@pytest.mark.parametrize(
    "tokens", [["a"], [1.5], [2**31], np.array([1.0]), np.array([2**40]), [[1, 2]], 7, None]
)
def test_tokens_that_are_no_token_ids_are_errors(tokens):
    with pytest.raises(
        ValueError, match=r"^\[pack_tokens\] tokens must be a sequence of token ids"
    ):
        pack_tokens(tokens)


def test_tokens_may_be_lists_tuples_ranges_or_arrays():
    lists = page_hashes(list(range(8)), 4)
    for tokens in (
        tuple(range(8)),
        range(8),
        np.arange(8),
        np.arange(8, dtype=np.int32),
        np.arange(8, dtype=np.uint16),
    ):
        assert page_hashes(tokens, 4) == lists


def test_a_page_hash_is_sha256_of_parent_tokens_and_keys():
    first, second = page_hashes([1, 2, 3, 4], 2)
    packed = np.array([1, 2, 3, 4], "<i4").tobytes()
    assert first == hashlib.sha256(root_hash(2) + packed[:8]).digest()
    assert second == hashlib.sha256(first + packed[8:]).digest()


def test_page_hashes_do_not_change_between_versions_of_this_project():
    assert page_hashes([1, 2], 2, [ExtraKey("salt", "x")])[0].hex()[:16] == "fb0c6a2579a92178"


def test_page_hashes_depend_on_position_page_size_and_everything_before():
    a = page_hashes([1, 2, 1, 2, 5, 6], 2)
    b = page_hashes([3, 2, 1, 2, 5, 6], 2)
    assert len({*a, *b}) == 6
    assert page_hashes([1, 2, 1, 2], 4)[0] not in a


def test_extra_keys_cannot_be_confused_by_how_they_are_split():
    splits = [
        [ExtraKey("a", "bc")],
        [ExtraKey("ab", "c")],
        [ExtraKey("a", "b"), ExtraKey("c", "")],
        [ExtraKey("a", 1)],
        [ExtraKey("a", "1")],
        [ExtraKey("a", b"1")],
        [ExtraKey("a", "1", position=1)],
    ]
    assert len({page_hashes([1, 2], 2, keys)[0] for keys in splits}) == len(splits)


def test_the_order_of_extra_keys_makes_no_difference():
    keys = [ExtraKey("salt", "x"), ExtraKey("adapter", "y")]
    assert page_hashes([1, 2], 2, keys) == page_hashes([1, 2], 2, keys[::-1])


def test_extra_keys_of_other_types_are_errors():
    for keys in (["foo"], [ExtraKey("a", 1.5)], [ExtraKey("a", "b", position=-1)]):
        with pytest.raises(ValueError, match=r"^\[pack_keys\] .* must be"):
            page_hashes([1, 2, 3], 4, keys)
