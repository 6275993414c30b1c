"""Faults in the planner: ``(name, find, replace, seen_by)`` by file."""

from .mutant import Mutant

# fmt: off
_FAULTS = {
    "planner.cpp": [
        (
            "positions are one too large",
            "        const int position = context_len - len + t;\n        const int end",
            "        const int position = context_len - len + t + 1;\n        const int end",
            "prefill",
        ),
        (
            "a token does not see itself",
            "in_.causal ? position + 1 : context_len;",
            "in_.causal ? position : context_len;",
            "decode",
        ),
        (
            "without causality a token sees up to itself",
            "in_.causal ? position + 1 : context_len;",
            "position + 1;",
            "prefill, not causal",
        ),
        (
            "every item begins at position 0",
            "count ? entry_start(in_, range.sequence, range.entry_begin) : 0;",
            "0;",
            "partitions",
        ),
        (
            "pages of a piece are the first of the table",
            "int64_t(range.sequence) * in_.max_pages + range.entry_begin;",
            "int64_t(range.sequence) * in_.max_pages;",
            "partitions",
        ),
        (
            "an item is final when one of its tokens has no other",
            "      if (part_counts_[all[i]] != 1) {\n        return false;\n      }\n    }\n    return true;",
            "      if (part_counts_[all[i]] == 1) {\n        return true;\n      }\n    }\n    return false;",
            "some need the prefix alone",
        ),
        (
            "partials are merged in the order of the items",
            "return a->range.entry_begin < b->range.entry_begin;",
            "return a < b;",
            "merged in the order of keys",
        ),
        (
            "tokens of an item share a partial slot",
            "parts_[next[t]++] = partial++;",
            "parts_[next[t]++] = partial;",
            "prefill, partitions",
        ),
        (
            "a set of tokens is taken for a run of them",
            "if (tokens.is_run()) {",
            "if (tokens.size() > 0) {",
            "first and third share",
        ),
        (
            "merges begin at the first part",
            "*merge++ = {t, begin, count};",
            "*merge++ = {t, 0, count};",
            "partitions",
        ),
        (
            "the largest page id is the smallest",
            "most = std::max(most, to[i]);",
            "most = std::min(most, to[i]);",
            "a plan for a larger pool",
        ),
        (
            "the longest context is the last",
            "h.max_row_end = std::max(h.max_row_end, end);",
            "h.max_row_end = end;",
            "a mask that is too short",
        ),
        (
            "lengths of ragged pages are their starts",
            "std::copy_n(in_.page_lens + from,",
            "std::copy_n(in_.page_starts + from,",
            "ragged",
        ),
        (
            "shorter items first",
            "a.range.open, -a.cost) < std::tuple(b.kind, b.range.open, -b.cost)",
            "a.range.open, a.cost) < std::tuple(b.kind, b.range.open, b.cost)",
            "longest first",
        ),
        (
            "kinds are not kept apart",
            "std::tuple(a.kind, a.range.open, -a.cost) < std::tuple(b.kind, b.range.open, -b.cost)",
            "a.cost > b.cost",
            "every kind",
        ),
        (
            "open pages are listed among the sealed",
            "h.num_open_items[draft.kind] += draft.range.open;",
            "",
            "open pages",
        ),
        (
            "an open page keeps the id that tables give it",
            "to[i] = pages[i] - first;",
            "to[i] = pages[i];",
            "open pages",
        ),
        (
            "rotated values are finished where they are attended",
            "if (merges_all_) {",
            "if (false) {",
            "rotated values",
        ),
    ],
    "partition.cpp": [
        (
            "pieces overlap by a page",
            "const int begin = range.entry_begin + int(int64_t(entries) * i / count);",
            "const int begin = range.entry_begin + std::max(0, int(int64_t(entries) * i / count) - 1);",
            "16 workers",
        ),
        (
            "a page between two pieces is dropped",
            "      add_pieces(input, range, begin, e, pieces);\n      begin = e;\n",
            "      add_pieces(input, range, begin, e, pieces);\n      begin = e + (e < range.entry_end);\n",
            "partitions",
        ),
        (
            "open and sealed pages are one item",
            "e == entry_end || input.is_open(pages[e]) != input.is_open(pages[begin])",
            "e == entry_end",
            "open pages",
        ),
        (
            "a piece ends where the whole begins",
            "range.key_end = std::min(whole.key_end, entry_end(",
            "range.key_end = std::min(whole.key_begin, entry_end(",
            "16 workers",
        ),
        (
            "pieces end with their first page",
            "entry_end(input, whole.sequence, entry_end_ - 1)",
            "entry_end(input, whole.sequence, entry_begin)",
            "16 workers",
        ),
        (
            "fixed partitions depend on where the range begins",
            "entry_start(input, range.sequence, e) / partition !=\n            entry_start(input, range.sequence, begin) / partition;",
            "(entry_start(input, range.sequence, e) - range.key_begin) / partition !=\n"
            "            (entry_start(input, range.sequence, begin) - range.key_begin) / partition;",
            "partitions of a window",
        ),
    ],
    "cost.cpp": [
        (
            "nothing is ever cut",
            "if (cost <= 1.5 * budget) {",
            "if (cost <= 1e30 * budget) {",
            "16 workers",
        ),
        (
            "short steps are cut",
            "total < 2.0 * t.min_item_cost",
            "total < 0.0 * t.min_item_cost",
            "a short step",
        ),
        (
            "a short step on a GPU is not cut for its cores",
            "return least > 1 ?",
            "return least > 1e9 ?",
            "a short step of a large GPU",
        ),
        (
            "KV heads of a GPU's item are forgotten",
            "target.heads_in_parallel ? num_kv_heads : 1;",
            "1;",
            "a short step of a large GPU",
        ),
    ],
    "sharing.cpp": [
        (
            "the last key of a tile is lost",
            "range.key_end = token_end + offset;",
            "range.key_end = token_end + offset - 1;",
            "decode",
        ),
        (
            "a tile's tokens begin again with the next",
            "add_own(b, begin + t, begin + std::min(len, t + item_tokens()), 0);",
            "add_own(b, begin + t, begin + len, 0);",
            "two tiles",
        ),
        (
            "a prefix is as long as the longest pair's",
            "      end = e;\n",
            "      end = i == 1 ? e : std::max(end, e);\n",
            "three share unequally",
        ),
        (
            "contexts that end apart in a page share it",
            "const bool alike = in_",
            "const bool alike = true || in_",
            "contexts that end in a shared page",
        ),
        (
            "ragged pages are equal when their ids are",
            "return !in_.ragged() ||",
            "return true ||",
            "a page filled differently",
        ),
        (
            "a shared page ends with the shortest context",
            "range.key_end = std::max(range.key_end, in_.context_lens[b]);",
            "range.key_end = std::max(1, std::min(range.key_end ? range.key_end : INT32_MAX, in_.context_lens[b]));",
            "same pages, other lengths",
        ),
        (
            "a shared page begins with the last window",
            "range.key_begin = std::min(range.key_begin, window_begin(in_, position));",
            "range.key_begin = std::max(range.key_begin % INT32_MAX, window_begin(in_, position));",
            "shared window",
        ),
        (
            "what is not worth sharing is not read",
            "in_.query_begin(b) + in_.query_len(b), first);",
            "in_.query_begin(b) + in_.query_len(b), compared);",
            "not worth sharing",
        ),
        (
            "a shared prefix is read alone, too",
            "share(group, run_end, run_end);",
            "share(group, first, run_end);",
            "shared prefix",
        ),
        (
            "tokens of a full item are attended again",
            "          segment.tokens.clear();\n",
            "",
            "100 sequences share",
        ),
        (
            "sequences whose window begins before the others' are shared",
            "sharing.first_entry(b) == first && sharing.end_entry(b) > first",
            "sharing.end_entry(b) > first",
            "other windows",
        ),
        (
            "every shared run is worth it",
            "decision.cost_shared < kWorthwhile * decision.cost_alone;",
            "decision.cost_alone > 0;",
            "not worth sharing",
        ),
        (
            "no shared run is worth it",
            "decision.cost_shared < kWorthwhile * decision.cost_alone;",
            "decision.cost_alone < 0;",
            "shared prefix",
        ),
        (
            "an entry of a ragged table ends a page later",
            "while (entry_end(input, sequence, entry) <= position) {",
            "while (entry_end(input, sequence, entry) < position) {",
            "ragged",
        ),
    ],
    "validate.cpp": [
        ("the last entry is not checked", "first; entry <= last; entry++) {\n    bad", "first; entry < last; entry++) {\n    bad", "bad steps"),
        ("query offsets may decrease", "if (in.cu_seqlens_q[b + 1] < in.cu_seqlens_q[b]) {", "if (in.cu_seqlens_q[b + 1] < 0) {", "bad steps"),
        ("a gap between pages is allowed", "in.page_starts[i] != expected_start) {", "in.page_starts[i] < expected_start) {", "bad steps"),
        ("pages may hold more than fits", "in.page_lens[i] > in.page_size) {", "in.page_lens[i] > 2 * in.page_size) {", "bad steps"),
        ("a table may be too short", "* in.page_size < context_len) {", "* in.page_size < 0) {", "bad steps"),
        ("a query may be longer than its context", "if (context_len > 0 && in.query_len(b) > context_len) {", "if (false) {", "bad steps"),
    ],
    "advance.cpp": [
        (
            "a prompt that goes on is a fresh one",
            "notes.fresh_prompt && sees_whole_prompts(next);",
            "notes.fresh_prompt;",
            "a fresh prompt",
        ),
        (
            "a chunk of a prompt is the whole",
            "(len != input.context_lens[b] || clipped)",
            "(len > input.context_lens[b] || clipped)",
            "a fresh prompt",
        ),
        (
            "a new page goes unnoticed",
            "entry_of(next, s, before - 1) == entry_of(next, s, after - 1);",
            "after > 0;",
            "advance",
        ),
        (
            "another last page goes unnoticed",
            "std::equal(pages, pages + item.page_count, row,",
            "std::equal(pages, pages + item.page_count - 1, row,",
            "advance",
        ),
        (
            "contexts of a shared item may part in its last page",
            "if (item.page_count > 0 && keys_end(s) !=",
            "if (item.page_count < 0 && keys_end(s) !=",
            "contexts that end in a shared page",
        ),
        (
            "a token does not see itself",
            "in.causal ? position + 1 : context_len;",
            "in.causal ? position : context_len;",
            "advance",
        ),
        (
            "positions stay",
            "      words[h.positions + at] = position;\n",
            "",
            "advance in a window",
        ),
        (
            "key ranges stay",
            "      item->key_end = std::min(key_end, pages_end);\n",
            "",
            "advance",
        ),
    ],
}
# fmt: on

MUTANTS = [
    Mutant(
        f"{file.partition('.')[0]}: {name}", "planner", f"csrc/plan/{file}", find, replace, seen_by
    )
    for file, faults in _FAULTS.items()
    for name, find, replace, seen_by in faults
]
