"""Faults in the text of the Metal kernels: ``(name, find, replace, seen_by)`` by file."""

from .mutant import Mutant

_BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

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
            "slot - page * kPageSize, num_kv_heads, kPageSize);",
            "min(slot - page * kPageSize + 1, kPageSize - 1), num_kv_heads, kPageSize);",
            "vector",
        ),
        (
            "one token too many is read",
            "    return position >= key_begin && position < key_end;",
            "    return position >= key_begin && position <= key_end;",
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
            "return page_starts[page] + slot - page * kPageSize;",
            "return page_starts[page] + slot;",
            "tile, ragged",
        ),
        (
            "a ragged step counts as full",
            "return !kRagged && first >= key_begin",
            "return first >= key_begin",
            "tile, ragged",
        ),
        (
            "the last step, part-filled, is dropped",
            "return int2(slots.x / size, (slots.y + size - 1) / size);",
            "return int2(slots.x / size, slots.y / size);",
            "vector",
        ),
        (
            "steps begin where the first key lies",
            "kRagged ? int2(0, page_count * kPageSize) : int2(low, high) - first_position;",
            "kRagged ? int2(0, page_count * kPageSize) : int2(low, high);",
            "vector, window",
        ),
        (
            "a page of 16 is taken for one of 32",
            "kPageSize % 16 == 0                        ? 2",
            "kPageSize % 16 == 0                        ? 4",
            "tile, pages of 16",
        ),
        (
            "the row of a later page counts its groups twice",
            "first = walk.row(slot + 8 * g) - 8 * g;",
            "first = walk.row(slot + 8 * g);",
            "vector",
        ),
        (
            "the page behind the item's last is looked up",
            "return min(slot / kPageSize, page_count - 1);",
            "return slot / kPageSize;",
            "vector, ragged",
        ),
    ],
    "key_groups.h": [
        (
            "K offsets in 32 bits",
            "pair.first = k_pages + slots.row(at.column) * D;",
            "pair.first = k_pages + int(slots.row(at.column) * D);",
            "tile, far pages",
        ),
        (
            "both keys of a lane are the first",
            "pair.second = k_pages + slots.row(at.column + 1) * D;",
            "pair.second = k_pages + slots.row(at.column) * D;",
            "tile",
        ),
        (
            "the second key is scored at the position of the first",
            "kRagged ? walk.position(first_slot + 1) : first + 1;",
            "kRagged ? walk.position(first_slot + 1) : first;",
            "wide",
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
            "alibi_slopes[r.head] * kLog2E : 0;",
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
            "max(score + bias * kLog2E, kLeastScore);",
            "max(score + bias, kLeastScore);",
            "vector, options",
        ),
        (
            "an infinite bias hides nothing for good",
            "return is_minus_infinity(bias) ? kHidden :",
            "return",
            "wide, options",
        ),
    ],
    "softmax.h": [
        ("sums are not rescaled", "    sum *= factor;\n", "", "vector"),
        (
            "a hidden key has the weight of the maximum",
            "return (EDGE || kHasMask) && score == kHidden ? 0.0f : weight;",
            "return weight;",
            "wide, window",
        ),
        (
            "a mask hides keys in edge steps only",
            "return (EDGE || kHasMask) && score == kHidden ? 0.0f : weight;",
            "return EDGE && score == kHidden ? 0.0f : weight;",
            "tile, all masked",
        ),
        (
            "a sink above the maximum does not rescale the sum",
            "sum = sum * scale + fast::exp2(sink2 - top);",
            "sum = sum + fast::exp2(sink2 - top);",
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
        ("lse in base 2", "(most + log2(sum)) * kLn2;", "most + log2(sum);", "vector"),
        ("a row that sees nothing divides by 0", "  if (sum > 0) {", "  if (sum >= 0) {", "vector, empty"),
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
            "the sum of parts forgets their maxima",
            "* fast::exp2(partial_state[2 * at] - most);\n  }\n  sum",
            ";\n  }\n  sum",
            "merge",
        ),
        (
            "values of parts forget their maxima",
            "const float weight = fast::exp2(partial_state[2 * at] - most);",
            "const float weight = 1;",
            "merge",
        ),
        (
            "the last part is dropped",
            "for (int p = 0; p < merge.part_count; p++) {",
            "for (int p = 0; p + 1 < merge.part_count; p++) {",
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
            "  for (int p = lane; p < merge.part_count; p += 32) {\n    const long at",
            "  for (int p = lane; p < merge.part_count; p += 64) {\n    const long at",
            "merge, 40 parts",
        ),
        ("a lane's sum taken for the row's", "  sum = simd_sum(sum);\n", "", "merge"),
    ],
    "merge_simdgroups.h": [
        (
            "the sums of simdgroups forget their maxima",
            "(s * ROWS + row) + 1] * fast::exp2(most - all.most);",
            "(s * ROWS + row) + 1];",
            "vector",
        ),
        (
            "values of simdgroups forget their maxima",
            "const float weight = fast::exp2(states[2 * (s * ROWS + row)] - all.most);",
            "const float weight = 1;",
            "tile",
        ),
        (
            "the last simdgroup is not merged",
            "      for (int s = 0; s < num_simdgroups; s++) {\n        const float weight",
            "      for (int s = 0; s + 1 < num_simdgroups; s++) {\n        const float weight",
            "vector",
        ),
        (
            "one of the sums of a simdgroup is dropped",
            "for (int k = 0; k < SUMS; k++) {",
            "for (int k = 1; k < SUMS; k++) {",
            "vector",
        ),
        (
            "a window of columns overlaps the next",
            "writer.write_values(token, head, slot, begin + column, factor, sums);",
            "writer.write_values(token, head, slot, column, factor, sums);",
            "tile, head_dim 256",
        ),
    ],
    "matrices.h": [
        (
            "the maximum of a row misses a lane",
            "return max(x, simd_shuffle_xor(x, 8));",
            "return x;",
            "wide",
        ),
        (
            "the sum of a row takes a wrong lane",
            "return x + simd_shuffle_xor(x, 8);",
            "return x + simd_shuffle_xor(x, 4);",
            "tile",
        ),
        (
            "the columns of a lane are those of its neighbour",
            "column((lane & 8) / 2 + (lane & 1) * 2)",
            "column((lane & 8) / 4 + (lane & 1) * 4)",
            "tile",
        ),
        (
            "the second half of a run repeats the first",
            "elements(keys) = vec<T, 2>(runs[g][0].v[i], runs[g][1].v[i]);",
            "elements(keys) = vec<T, 2>(runs[g][0].v[i / 2], runs[g][1].v[i / 2]);",
            "tile",
        ),
    ],
    "attend_vector.metal": [
        (
            "no barrier before the merge of simdgroups",
            f"    {_BARRIER}\n    merge.write_window",
            "    merge.write_window",
            "vector",
        ),
        (
            "no barrier before the next window of columns",
            f"    if (begin > 0) {{\n      {_BARRIER}\n    }}\n",
            "",
            "vector, head_dim 512",
        ),
        (
            "a dot product takes a wrong lane's part",
            "simd_shuffle_xor(upper ? two[0] : two[1], 1);",
            "simd_shuffle_xor(upper ? two[0] : two[1], 3);",
            "vector",
        ),
        (
            "values take the weights of other keys",
            "simd_shuffle(weights[r], 8 * at.key + t);",
            "simd_shuffle(weights[r], 8 * at.key + 7 - t);",
            "vector",
        ),
        ("values are not rescaled", "        out[r][i] *= factor;\n", "", "vector"),
        (
            "the maximum of a lane taken for the simdgroup's",
            "raise(max(states[r].most, simd_max(weights[r])));",
            "raise(max(states[r].most, weights[r]));",
            "vector",
        ),
        (
            "V offsets in 32 bits",
            "(v_pages + slots.row(i) * DV, at.part,",
            "(v_pages + int(slots.row(i) * DV), at.part,",
            "vector, far pages",
        ),
    ],
    "attend_tile.metal": [
        (
            "values of dead slots are read",
            "          !EDGE || slots.is_live(at.row),\n",
            "          true,\n",
            "tile, one key",
        ),
        (
            "no barrier before the merge of simdgroups",
            f"    {_BARRIER}\n    merge.write_window",
            "    merge.write_window",
            "tile",
        ),
        (
            "no barrier before the next window of columns",
            f"    if (begin > 0) {{\n      {_BARRIER}\n    }}\n",
            "",
            "tile, head_dim 256",
        ),
        ("values are not rescaled", "        elements(out[m][i]) *= factor;\n", "", "tile"),
        (
            "steps that do not divide evenly are dropped",
            "const int end = steps.x + count * (simdgroup + 1) / num_simdgroups;",
            "const int end = steps.x + count / num_simdgroups * (simdgroup + 1);",
            "tile",
        ),
    ],
    "attend_wide.metal": [
        (
            "no barrier before the maxima are read",
            f"    put_maxima();\n    {_BARRIER}\n",
            "    put_maxima();\n",
            "wide",
        ),
        (
            "no barrier before the weights are read",
            f"    weigh<EDGE>();\n    {_BARRIER}\n",
            "    weigh<EDGE>();\n",
            "wide",
        ),
        (
            "no barrier before Q is read",
            f"  wide.begin(reader, first_row);\n  {_BARRIER}\n",
            "  wide.begin(reader, first_row);\n",
            "wide",
        ),
        ("values are not rescaled", "        elements(out[m][i]) *= factor;\n", "", "wide"),
        (
            "the maximum of a simdgroup taken for the step's",
            "        most = max(most, maxima[s * kRows + row]);\n",
            "        most = max(most, maxima[simdgroup * kRows + row]);\n",
            "wide",
        ),
        (
            "a simdgroup's sum taken for the row's",
            "states[m].sum += maxima[s * kRows + 8 * m + at.row];",
            "states[m].sum = maxima[s * kRows + 8 * m + at.row];",
            "wide",
        ),
        (
            "rows behind the last are written",
            "    if (row >= reader.num_rows) {\n      continue;\n    }\n",
            "",
            "wide, partitions",
        ),
    ],
    "write_pages.metal": [
        (
            "a token goes to slot 0 of its page",
            "      slot % arguments.page_size,\n",
            "      0,\n",
            "write",
        ),
        ("slot -1 is written", "if (slot < 0 || at >=", "if (at >=", "write"),
        ("V is written with the rows of K", "is_key ? arguments.k_row : arguments.v_row;", "arguments.k_row;", "pool"),
        (
            "the values of the token before",
            "v_tokens[long(token) * v_units + unit];",
            "v_tokens[long(max(token - 1, 0)) * v_units + unit];",
            "pool",
        ),
        ("offsets in 32 bits", "const long to = row * row_units", "const int to = row * row_units", "write, far pages"),
    ],
    "copy_pages.metal": [
        (
            "source and target swapped",
            "pool[pair.y * units + unit] = pool[pair.x * units + unit];",
            "pool[pair.x * units + unit] = pool[pair.y * units + unit];",
            "copy",
        ),
        (
            "the page after the source is copied",
            "pool[pair.x * units + unit];",
            "pool[pair.x * units + units + unit];",
            "copy",
        ),
        ("pages of all pools are as large as the first's", "page_units[group.z];", "page_units[0];", "pool"),
        ("every pair is the first", "pairs[group.y];", "pairs[0];", "copy"),
    ],
    "gather_pages.metal": [
        ("one token too many", "if (position >= context_len) {", "if (position > context_len) {", "gather"),
        (
            "a ragged page is read from its position on",
            "slot.offset = position - starts[e];",
            "slot.offset = position % arguments.page_size;",
            "gather, ragged",
        ),
        ("every sequence has the first's table", "long(sequence) * arguments.max_pages;", "0;", "gather"),
        (
            "what no page holds is not zeroed",
            "k_out[to] = slot.page >= 0 ? k_pages[from] : Unit(0);",
            "if (slot.page >= 0) { k_out[to] = k_pages[from]; }",
            "gather",
        ),
    ],
    "copy_buffer.metal": [
        ("the last unit stays behind", "  if (at < units) {", "  if (at + 1 < units) {", "kept pages"),
    ],
    "merge_states.metal": [
        (
            "what is carried has no weight",
            "float value = carried_weight > 0 ? carried_weight * carry[column] : 0;",
            "float value = carried_weight > 0 ? carry[column] : 0;",
            "30 states",
        ),
        (
            "parts behind the last count",
            "weights[i] = i < arguments.parts ? lse##i[row] : minus_infinity();",
            "weights[i] = lse##i[row];",
            "states",
        ),
        (
            "values of the next row",
            "const long at = row * dim + column;",
            "const long at = (row + 1) % arguments.rows * dim + column;",
            "states",
        ),
        (
            "no barrier before the carried lse is replaced",
            "  simdgroup_barrier(mem_flags::mem_device); // all have read what lane 0 overwrites\n",
            "",
            "30 states",
        ),
        ("lse in base 2", "most + log2(sum) * kLn2 :", "most + log2(sum) :", "states"),
    ],
}

MUTANTS = [
    Mutant(f"{file.partition('.')[0]}: {name}", "kernels", f"kernels/{file}", find, replace, seen_by)
    for file, faults in _FAULTS.items()
    for name, find, replace, seen_by in faults
]
