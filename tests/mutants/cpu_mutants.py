"""Faults in the CPU backend: ``(name, find, replace, seen_by)`` by file."""

from .mutant import Mutant

# fmt: off
_FAULTS = {
    "page_codes.h": [
        (
            "a scale of the neighbour group",
            "const int64_t at = row * (dim / group) + g;",
            "const int64_t at = row * (dim / group) + (g + 1) % (dim / group);",
            "codes by token",
        ),
        (
            "the minimum of a group is dropped",
            "splat(scale), splat(bias)));",
            "splat(scale), Vec{}));",
            "codes by token",
        ),
        (
            "codes of the neighbour nibble",
            "shifts[i] = 4 * (i % 8);",
            "shifts[i] = 4 * (i % 8 ^ 1);",
            "codes by token",
        ),
        (
            "channels keep the scales of the first page",
            "if (page != page_) {",
            "if (page_ < 0) {",
            "codes by channel",
        ),
        (
            "the minimum of the channel beside",
            "load(scales + d), load(biases + d)",
            "load(scales + d), load(biases + (d ^ kLanes))",
            "codes by channel",
        ),
    ],
    "walk.h": [
        (
            "every key of small pages lies in the first",
            "first_row(job_, item_, span.first_page + key / job_.page_size, 0) + key % job_.page_size;",
            "first_row(job_, item_, span.first_page, 0) + key % job_.page_size;",
            "pages of 5",
        ),
        (
            "the last span, part-filled, is dropped",
            "count_ = (lead_ + item.page_count + pages_ - 1) / pages_;",
            "count_ = (lead_ + item.page_count) / pages_;",
            "pages of 5",
        ),
        (
            "ragged pages are full",
            "page_start(job_, item_, first), page_len(job_, item_, first)};",
            "page_start(job_, item_, first), job_.page_size};",
            "tile, ragged",
        ),
        (
            "the page before",
            "return first_row(job_, item_, span.first_page, 0) + key;",
            "return first_row(job_, item_, max_int(span.first_page - 1, 0), 0) + key;",
            "tile",
        ),
    ],
    "rows.h": [
        (
            "rotated values are not rotated back",
            "if (job.rotated) {",
            "if (false) {",
            "codes by token",
        ),
        (
            "the window is one key too wide",
            "row.position - job.sliding_window + 1);",
            "row.position - job.sliding_window);",
            "tile, window",
        ),
        (
            "the window is one key too narrow",
            "row.position - job.sliding_window + 1);",
            "row.position - job.sliding_window + 2);",
            "wide, window",
        ),
        (
            "early rows see the keys of later ones",
            "min_int(item.key_end, job.row_ends[row.token]) : row.begin;",
            "item.key_end : row.begin;",
            "wide",
        ),
        (
            "query heads of the next KV head",
            "row.head = kv_head * job.gqa_factor + r % job.gqa_factor;",
            "row.head = kv_head + r % job.gqa_factor;",
            "wide",
        ),
        (
            "all tokens of an item write the first partial state",
            "item.partial < 0 ? -1 : item.partial + t;",
            "item.partial < 0 ? -1 : item.partial;",
            "partitions",
        ),
        (
            "the length of a ragged page is that of the item's first",
            "job.page_lens[item.page_begin + i] : job.page_size;",
            "job.page_lens[item.page_begin] : job.page_size;",
            "wide, ragged",
        ),
        (
            "every page is the item's first",
            "page_row(job.pages[item.page_begin + i], kv_head",
            "page_row(job.pages[item.page_begin], kv_head",
            "tile",
        ),
        (
            "the mask of head 0 for all heads",
            "row.head * job.mask->head_stride + row.token",
            "0 * job.mask->head_stride + row.token",
            "tile, options",
        ),
        (
            "a boolean mask shows what it should hide",
            "return mask[key] ? 0.0f : kNegInf;",
            "return mask[key] ? kNegInf : 0.0f;",
            "tile, options",
        ),
        (
            "the softcap turns the sign",
            "s = cap * tanh(s / cap);",
            "s = splat(0.0f) - cap * tanh(s / cap);",
            "tile, options",
        ),
        (
            "the softcap is not scaled back",
            "s = cap * tanh(s / cap);",
            "s = tanh(s / cap);",
            "wide, options",
        ),
        ("ALiBi of the opposite sign", "s = fma(slope, distance, s);", "s = s - slope * distance;", "wide, options"),
        ("ALiBi is ignored", "s = fma(slope, distance, s);", "", "tile, options"),
        (
            "a sink above the maximum does not rescale the sum",
            "sum = sum * weight + exp2((sink - top) * kLog2e);",
            "sum = sum + exp2((sink - top) * kLog2e);",
            "tile, options",
        ),
        (
            "the sink counts twice",
            "sum = sum * weight + exp2((sink - top) * kLog2e);",
            "sum = sum * weight + 2 * exp2((sink - top) * kLog2e);",
            "tile, options",
        ),
        ("lse in units of the scale", "  most *= job.score_unit;\n", "", "tile"),
        (
            "a row that sees nothing divides by 0",
            "const bool nothing = most == kNegInf && sum == 0.0f;",
            "const bool nothing = false;",
            "empty",
        ),
        ("the maximum of a partial state is stale", "  job.partial_max[at] = most;\n", "", "partitions"),
    ],
    "merge.h": [
        (
            "parts are merged without their maxima",
            "const float weight = exp2((job.partial_max[at(i)] - most) * exponent_unit(job));",
            "const float weight = 1;",
            "partitions",
        ),
        (
            "a part that saw nothing is merged",
            "if (job.partial_max[at(i)] == kNegInf && part_sum == 0.0f) {",
            "if (false) {",
            "a hidden partition",
        ),
        (
            "the last part is dropped",
            "i < merge.part_count; i++) {\n    const float part_sum",
            "i + 1 < merge.part_count; i++) {\n    const float part_sum",
            "partitions",
        ),
        (
            "parts are numbered from 0 in every merge",
            "job.parts + merge.part_begin;",
            "job.parts;",
            "partitions",
        ),
    ],
    "attention.cpp": [
        (
            "an open page is read as a sealed one",
            "is_open(item) ? open : job;",
            "job;",
            "codes by channel",
        ),
        (
            "open items are taken for the first of their kind",
            "return item >= end - job.plan->num_open_items[kind];",
            "return item < end - job.plan->num_items[kind] + job.plan->num_open_items[kind];",
            "codes by channel",
        ),
        (
            "every wide item is the first",
            "wide ? other_items + unit / job.num_kv_heads :",
            "wide ? other_items :",
            "wide",
        ),
        (
            "one merge of each unit is dropped",
            "const int end = std::min(begin + kMergesPerUnit, job.plan->num_merges);",
            "const int end = std::min(begin + kMergesPerUnit - 1, job.plan->num_merges);",
            "20 merges",
        ),
        (
            "a mask is ignored where nothing else is asked",
            "job.plain = job.options.is_plain() &&",
            "job.plain = !job.options.alibi &&",
            "mask alone",
        ),
        (
            "sums of partial states lie over their maxima",
            "job.partial_sum = job.partial_max + states;",
            "job.partial_sum = job.partial_max;",
            "partitions",
        ),
    ],
    "attend_tile.h": [
        (
            "rows of other tokens see alike",
            "    block.seen_alike = range",
            "    block.seen_alike = true || range",
            "tile, not finite",
        ),
        (
            "a group of rows ends with its shortest",
            "min_int(a.begin, b.begin), max_int(a.end, b.end),",
            "min_int(a.begin, b.begin), min_int(a.end, b.end),",
            "several tokens",
        ),
        (
            "every head reads KV head 0",
            "states[h], h, int64_t(h) * job.page_size, ahead);",
            "states[h], h, 0, ahead);",
            "tile",
        ),
        (
            "a block that ends too late for a row counts as seen by all",
            "range.all_end >= block.position + block.high;",
            "range.all_end >= block.position + block.high - 2;",
            "several tokens",
        ),
        (
            "queries of the next KV head",
            "row.head + h * job.gqa_factor;",
            "row.head + h;",
            "tile",
        ),
        (
            "rows behind the first pass are the first again",
            "rows[r] = make_row(job, item, 0, first + r);",
            "rows[r] = make_row(job, item, 0, r);",
            "two passes",
        ),
    ],
    "tile_block.h": [
        (
            "a NaN in V reaches the rows that do not see it",
            "const bool hides = job.mask || !block.seen_alike;",
            "const bool hides = false;",
            "tile, not finite",
        ),
        (
            "a mask hides no NaN in V",
            "const bool hides = job.mask || !block.seen_alike;",
            "const bool hides = !block.seen_alike;",
            "vector, not finite",
        ),
        (
            "a NaN that some rows see reaches all",
            "apart |= rows > 0 && rows < kRows",
            "apart |= rows > kRows && rows < kRows",
            "tile, not finite",
        ),
        (
            "sums are not rescaled",
            "store(sums + r * kLanes, load(sums + r * kLanes) * shrink);",
            "",
            "tile",
        ),
        ("values are not rescaled", "store(at, load(at) * shrink);", "", "tile"),
        (
            "a row that saw nothing yet is NaN",
            "const Vec base = splat(most[r] == kNegInf ? 0.0f : most[r]);",
            "const Vec base = splat(most[r]);",
            "several tokens in a window",
        ),
    ],
    "tile_values.h": [
        (
            "every row has the weights of the first",
            "const Vec weight = splat(weights[r * kBlockKeys + j]);",
            "const Vec weight = splat(weights[j]);",
            "tile",
        ),
        (
            "a whole block ends with its third quad",
            "quad < kBlockQuads; quad++) {\n      for",
            "quad < kBlockQuads - 1; quad++) {\n      for",
            "tile",
        ),
    ],
    "tile_scores.h": [
        ("a mask hides no NaN", "(key < end) & shown;", "(key < end);", "vector, not finite"),
        (
            "a row sees keys behind its end",
            "splat_int(min_int(row.end, block.position + block.high));",
            "splat_int(block.position + block.high);",
            "several tokens",
        ),
        (
            "a row sees keys before its window",
            "splat_int(max_int(row.begin, block.position + block.low));",
            "splat_int(block.position + block.low);",
            "several tokens in a window",
        ),
    ],
    "attend_wide.h": [
        (
            "rows of a panel are finished with the first's sum",
            "pass.most[r + i], pass.sums[r + i]);",
            "pass.most[r + i], pass.sums[r]);",
            "wide",
        ),
    ],
    "wide_tiles.h": [
        (
            "a page gives one key too many",
            "while (key >= end_ && page_ + 1",
            "while (key > end_ && page_ + 1",
            "wide",
        ),
        (
            "the first KV head's keys for all",
            "kv_head_(kv_head)",
            "kv_head_(0 * kv_head)",
            "wide",
        ),
        (
            "the last key of a tile is the tile before's",
            "while (at_ < due) {",
            "while (at_ < due - 1) {",
            "two tiles of keys",
        ),
    ],
    "wide_panel.h": [
        (
            "a NaN in V reaches the rows that do not see it",
            "const bool apart = !seen_by_all &&",
            "const bool apart = false &&",
            "wide, not finite",
        ),
        (
            "rows that see a NaN in V do not get it",
            "select(seen.lanes[j][x], splat(",
            "select(VecI{}, splat(",
            "wide, not finite",
        ),
        (
            "a tile that ends too late for a row counts as whole",
            "pass.begins[r] <= keys.begin && pass.ends[r] >= keys.end;",
            "pass.begins[r] <= keys.begin && pass.ends[r] >= keys.begin;",
            "wide",
        ),
        (
            "values are not rescaled",
            "store(at, fma(load(at), shrink[x], sum[d][x]));",
            "store(at, load(at) + sum[d][x]);",
            "two tiles of keys",
        ),
        (
            "sums are not rescaled",
            "fma(load(sums + x * kLanes), shrink[x], even + odd));",
            "load(sums + x * kLanes) + even + odd);",
            "two tiles of keys",
        ),
        (
            "the last elements of V are forgotten",
            "add_dims(d, Dims<kRest>{});",
            "next.advance(++done, pass.num_panels * steps);",
            "wide",
        ),
        (
            "of the last elements of V only the first",
            "add_dims(d, Dims<2 * kRest>{});",
            "add_dims(d, Dims<kRest>{});",
            "panels of 4 vectors",
        ),
        (
            "ALiBi counts from the key",
            "splat(float(key)) - at) + bias;",
            "at - splat(float(key))) + bias;",
            "wide, options",
        ),
    ],
}
# fmt: on

MUTANTS = [
    Mutant(
        f"cpu {file.partition('.')[0]}: {name}", "cpu", f"csrc/cpu/{file}", find, replace, seen_by
    )
    for file, faults in _FAULTS.items()
    for name, find, replace, seen_by in faults
]
