"""What a plan reads, spelled out key by key, and what it ought to read."""

from collections import Counter

import numpy as np


def planned_reads(plan, num_sealed_pages=0) -> list[Counter]:
    """For each query token, how often each (page, offset in page, position) is read."""
    h, words = plan._header, np.array(plan.array)
    positions = words[h["positions"] :][: h["num_tokens"]]
    row_ends = words[h["row_ends"] :][: h["num_tokens"]]
    window = h["sliding_window"]
    reads = [Counter() for _ in range(h["num_tokens"])]
    items = words[h["items"] :][: 8 * sum(h["num_items"])].reshape(-1, 8)
    first_ids = [num_sealed_pages if item["open"] else 0 for item in plan.items]
    for item, first_id in zip(items, first_ids):
        row_begin, row_count, page_begin, page_count, first, key_begin, key_end, _ = item
        for token in words[h["row_tokens"] + row_begin :][:row_count]:
            for i in range(page_begin, page_begin + page_count):
                page = words[h["pages"] + i] + first_id
                start, length = first + (i - page_begin) * h["page_size"], h["page_size"]
                if h["page_starts"]:
                    start = words[h["page_starts"] + i]
                    length = words[h["page_lens"] + i]
                for key in range(max(start, key_begin), min(start + length, key_end)):
                    if key < row_ends[token] and not (window and key <= positions[token] - window):
                        reads[token][int(page), int(key - start), int(key)] += 1
    return reads


def expected_reads(
    tables, lens, page_size, cu=None, causal=True, window=None, starts=None, page_lens=None
):
    """The same from the definition."""
    cu = np.arange(len(lens) + 1) if cu is None else np.asarray(cu)
    reads = []
    for b, context_len in enumerate(lens):
        query_len = cu[b + 1] - cu[b]
        for t in range(query_len):
            position = context_len - query_len + t
            end = (position + 1 if causal else context_len) if context_len else 0
            begin = max(0, position - window + 1) if window else 0
            reads.append(Counter())
            for key in range(begin, end):
                if starts is None:
                    entry, offset = divmod(key, page_size)
                else:
                    entry = next(
                        e for e in range(len(starts[b])) if key < starts[b][e] + page_lens[b][e]
                    )
                    offset = key - starts[b][entry]
                reads[-1][int(tables[b][entry]), int(offset), int(key)] += 1
    return reads


def partial_slots(plan) -> tuple[Counter, dict[int, Counter], Counter]:
    """Partial slots written, slots merged for each token, tokens that an item finishes."""
    h, words = plan._header, np.array(plan.array)
    written, merged, finished = Counter(), {}, Counter()
    items = words[h["items"] :][: 8 * sum(h["num_items"])].reshape(-1, 8)
    for row_begin, row_count, *_, partial in items:
        tokens = words[h["row_tokens"] + row_begin :][:row_count]
        for i, token in enumerate(tokens):
            if partial < 0:
                finished[int(token)] += 1
            else:
                written[int(partial) + i] = int(token)
    for token, begin, count in words[h["merges"] :][: 3 * h["num_merges"]].reshape(-1, 3):
        merged[int(token)] = Counter(words[h["parts"] + begin :][:count].tolist())
    return written, merged, finished
