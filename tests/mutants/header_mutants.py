"""Faults in what the Metal kernels include: ``(name, find, replace, seen_by)`` by file."""

from .mutant import Mutant

_FAULTS = {
    "arguments.h": [
        (
            "heads and pages of the pool swapped",
            "(long(page_id) * num_kv_heads + kv_head) * page_size + offset",
            "(long(kv_head) * num_kv_heads + page_id) * page_size + offset",
            "vector",
        ),
    ],
    "page_walk.h": [
        (
            "a step of one page's scales goes on into the next",
            "(STEP == 1 || slot % page_slots() + count <= kPageSize) &&",
            "",
            "formats, tile, window",
        ),
        (
            "the page before is read in place of the next",
            "return page_row(pages[page], kv_head,",
            "return page_row(pages[max(page - 1, 0)], kv_head,",
            "vector",
        ),
        (
            "every head reads KV head 0",
            "return page_row(pages[page], kv_head,",
            "return page_row(pages[page], 0,",
            "tile",
        ),
        (
            "keys of the slot after",
            "slot - page * page_slots(), num_kv_heads, kPageSize);",
            "min(slot - page * page_slots() + 1, kPageSize - 1), num_kv_heads, kPageSize);",
            "vector",
        ),
        (
            "one token too many is read",
            "position(slot) >= key_begin && position(slot) < key_end;",
            "position(slot) >= key_begin && position(slot) <= key_end;",
            "tile",
        ),
        (
            "a part-filled page is read one slot too far",
            "offset < page_lens[page] &&",
            "offset <= page_lens[page] &&",
            "vector, ragged",
        ),
        (
            "positions of a ragged page start at its slot in the item",
            "return page_starts[page] + slot - page * page_slots();",
            "return page_starts[page] + slot;",
            "tile, ragged",
        ),
        (
            "a masked step counts as whole",
            "return !kRagged && !kHasMask &&",
            "return !kRagged &&",
            "tile, mask hides NaN",
        ),
        (
            "a ragged step counts as full",
            "return !kRagged && !kHasMask &&",
            "return !kHasMask &&",
            "tile, ragged",
        ),
        (
            "the last step, part-filled, is dropped",
            "return int2(all.x / size, (all.y + size - 1) / size) * size;",
            "return int2(all.x / size, all.y / size) * size;",
            "vector",
        ),
        (
            "steps begin where the first key lies",
            "int2(slot_of(low - first_position), slot_of(high - first_position - 1) + 1);",
            "int2(slot_of(low), slot_of(high - 1) + 1);",
            "vector, window",
        ),
        (
            "a page of 16 is taken for one of 32",
            "kPageSize % 16 == 0 ? 16 : 8;",
            "kPageSize % 16 == 0 ? 32 : 8;",
            "tile, pages of 16",
        ),
        (
            "the row of a later page counts its slots twice",
            "first = walk.row(slot + i) - i;",
            "first = walk.row(slot + i);",
            "vector, whole steps",
        ),
        (
            "the page behind the item's last is looked up",
            "return min(slot / page_slots(), page_count - 1);",
            "return slot / page_slots();",
            "vector, ragged",
        ),
    ],
    "scores.h": [
        (
            "query heads of the next KV head",
            "return kv_head * arguments.gqa_factor + row % arguments.gqa_factor;",
            "return kv_head + row % arguments.gqa_factor;",
            "tile",
        ),
        (
            "rows of a token taken for tokens",
            "row_begin + row / arguments.gqa_factor];",
            "row_begin + row % arguments.gqa_factor];",
            "wide",
        ),
        (
            "the window is one key too wide",
            "r.position - arguments.sliding_window + 1)",
            "r.position - arguments.sliding_window)",
            "vector, window",
        ),
        (
            "the window is one key too narrow",
            "r.position - arguments.sliding_window + 1)",
            "r.position - arguments.sliding_window + 2)",
            "tile, window",
        ),
        (
            "early rows see the keys of later ones",
            "r.high = min(key_end, plan[arguments.row_ends + r.token]);",
            "r.high = key_end;",
            "wide",
        ),
        (
            "a row sees one key too few",
            "r.high = min(key_end, plan[arguments.row_ends + r.token]);",
            "r.high = min(key_end, plan[arguments.row_ends + r.token]) - 1;",
            "vector",
        ),
        (
            "ALiBi in natural units",
            "natural_to_score(alibi_slopes[r.head]) : 0;",
            "alibi_slopes[r.head] : 0;",
            "vector, options",
        ),
        (
            "the mask of head 0 for all heads",
            "r.head * arguments.mask_head_stride + r.token",
            "0 * arguments.mask_head_stride + r.token",
            "tile, options",
        ),
        (
            "the mask of token 0 for all tokens",
            "+ r.token * arguments.mask_token_stride;",
            "+ 0 * arguments.mask_token_stride;",
            "wide, options",
        ),
        (
            "a row sees the key at its end",
            "!(position >= row.low && position < row.high)",
            "!(position >= row.low && position <= row.high)",
            "wide",
        ),
        (
            "the softcap turns the sign",
            "score = arguments.softcap * precise::tanh(score);",
            "score = -arguments.softcap * precise::tanh(score);",
            "vector, options",
        ),
        (
            "ALiBi of the opposite sign",
            "row.slope * float(position - row.position);",
            "row.slope * float(row.position - position);",
            "tile, options",
        ),
        (
            "the boolean mask is ignored",
            "return visible ? score : kHidden;",
            "return score;",
            "tile, options",
        ),
        (
            "the additive mask in natural units",
            "kHidden : score + bias;",
            "kHidden : score + bias * kLn2;",
            "vector, options",
        ),
        (
            "an infinite bias hides nothing for good",
            "return is_minus_infinity(bias) ? kHidden :",
            "return",
            "vector, not finite",
        ),
        (
            "a mask of huge values in base-2 units",
            "return kMaskAdds ? x : x * kLog2E;",
            "return x * kLog2E;",
            "wide, options",
        ),
        (
            "lse of a row with a mask in base-2 units",
            "return kMaskAdds ? x : x * kLn2;",
            "return x * kLn2;",
            "vector, options",
        ),
    ],
    "softmax.h": [
        ("sums are not rescaled", "    sum *= factor;\n", "", "vector"),
        (
            "the weight of a hidden key is like that of a far one",
            "return EDGE && is_minus_infinity(score) ? kNoWeight : weight;",
            "return weight;",
            "wide, not finite",
        ),
        (
            "a row whose sum is NaN saw nothing",
            "  if (sum != 0) {",
            "  if (sum > 0) {",
            "vector, not finite",
        ),
        (
            "a sink above the maximum does not rescale the sum",
            "sum = sum * scale + weight_at(score - top);",
            "sum = sum + weight_at(score - top);",
            "tile, options",
        ),
        (
            "a sink above the maximum does not rescale the values",
            "f.factor = scale / sum;",
            "f.factor = 1 / sum;",
            "tile, options",
        ),
        (
            "the sink counts once per partition",
            "partial_state[2 * at + 1] = sum;",
            "partial_state[2 * at + 1] = sum + (kHasSinks ? fast::exp2(sink(head) * kLog2E - most) : 0);",
            "merge, sinks",
        ),
        ("lse in base 2", "+ log2(sum) * kLn2;", "+ log2(sum);", "vector"),
        (
            "a row that sees nothing divides by 0",
            "  if (sum != 0) {",
            "  if (true) {",
            "vector, empty",
        ),
        (
            "all tokens of an item write the first partial state",
            "const long at = element(partial + slot, head);",
            "const long at = element(partial, head);",
            "merge",
        ),
        (
            "partial values are finished already",
            "* DV + column, values, 1.0f);",
            "* DV + column, values, factor);",
            "merge",
        ),
        (
            "results of all heads go to head 0",
            "store(out + element(token, head) * DV + column, values, factor);",
            "store(out + element(token, 0) * DV + column, values, factor);",
            "tile",
        ),
    ],
    "merge.metal": [
        (
            "the result is not rotated back",
            "    rotate_quads<DV>(totals, lane);\n",
            "",
            "formats, tile, channels",
        ),
        (
            "the result is rotated back twice",
            "    rotate_quads<DV>(totals, lane);\n",
            "    rotate_quads<DV>(totals, lane);\n    rotate_quads<DV>(totals, lane);\n",
            "formats, vector, channels",
        ),
        (
            "the sum of parts forgets their maxima",
            "all.sum += part.y * weight_at(part.x - all.most);",
            "all.sum += part.y;",
            "merge, 40 parts",
        ),
        (
            "values of parts forget their maxima",
            "weight_at(states[writer.element(slot, head)].x - all.most);",
            "1;",
            "merge",
        ),
        (
            "the last part is dropped",
            "const int end = merge.part_count * (simdgroup + 1) / num_simdgroups;",
            "const int end = (merge.part_count - 1) * (simdgroup + 1) / num_simdgroups;",
            "merge",
        ),
        (
            "parts are numbered from 0 in every merge",
            "plan + arguments.parts + merge.part_begin;",
            "plan + arguments.parts;",
            "merge",
        ),
        (
            "lanes skip every second part",
            "  for (int p = lane; p < merge.part_count; p += 32) {",
            "  for (int p = lane; p < merge.part_count; p += 64) {",
            "merge, 40 parts",
        ),
        ("a lane's sum taken for the row's", "  all.sum = simd_sum(all.sum);\n", "", "merge"),
        (
            "no barrier before the simdgroups' sums are read",
            "  threadgroup_barrier(mem_flags::mem_threadgroup);\n\n  const float factor = finish(all.most",
            "  const float factor = finish(all.most",
            "merge",
        ),
        (
            "the sums of the last simdgroup are dropped",
            "for (int s = 0; s < num_simdgroups; s++) {",
            "for (int s = 0; s + 1 < num_simdgroups; s++) {",
            "merge",
        ),
    ],
    "merge_simdgroups.h": [
        (
            "the sums of simdgroups forget their maxima",
            "(s * ROWS + row) + 1] * weight_at(most - all.most);",
            "(s * ROWS + row) + 1];",
            "vector",
        ),
        (
            "values of simdgroups forget their maxima",
            "const float weight = weight_at(states[2 * (s * ROWS + row)] - all.most);",
            "const float weight = 1;",
            "vector",
        ),
        (
            "the last simdgroup is not merged",
            "      for (int s = 0; s < num_simdgroups; s++) {\n        const float weight",
            "      for (int s = 0; s + 1 < num_simdgroups; s++) {\n        const float weight",
            "vector",
        ),
        (
            "a window of columns overlaps the next",
            "writer.write_values(token, head, slot, begin + column, factor, sums);",
            "writer.write_values(token, head, slot, column, factor, sums);",
            "vector, head_dim 512",
        ),
    ],
    "matrices.h": [
        (
            "the maximum of a row misses a lane",
            "return max(x, simd_shuffle_xor(x, 8));",
            "return x;",
            "wide, far apart",
        ),
        (
            "the sum of a row takes a wrong lane",
            "return x + simd_shuffle_xor(x, 8);",
            "return x + simd_shuffle_xor(x, 4);",
            "tile",
        ),
        (
            "the columns of a lane are those of its neighbour",
            "column((lane_ & 8) / 2 + (lane_ & 1) * 2)",
            "column((lane_ & 8) / 4 + (lane_ & 1) * 4)",
            "tile",
        ),
        (
            "the second half of a run repeats the first",
            "elements(keys) = vec<T, 2>(first[g].get(part + i), second[g].get(part + i));",
            "elements(keys) = vec<T, 2>(first[g].get((part + i) / 2), second[g].get((part + i) / 2));",
            "tile",
        ),
        (
            "a NaN in V reaches the rows that do not see it",
            "if (EDGE) {\n      split_off",
            "if (false) {\n      split_off",
            "wide, not finite",
        ),
        (
            "infinities in V change places",
            "const float minus = codes >= 64 ?",
            "const float minus = codes < 64 ?",
            "wide, not finite",
        ),
        (
            "a NaN in V is lost",
            "(fmod(codes, 64.0f) > 0 ?",
            "(fmod(codes, 64.0f) > 1 ?",
            "wide, not finite",
        ),
    ],
}

MUTANTS = [
    Mutant(
        f"{file.partition('.')[0]}: {name}", "kernels", f"kernels/{file}", find, replace, seen_by
    )
    for file, faults in _FAULTS.items()
    for name, find, replace, seen_by in faults
]
