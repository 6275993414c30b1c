"""Faults in the Metal kernels themselves: ``(name, find, replace, seen_by)`` by file."""

from .mutant import Mutant

_BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

_FAULTS = {
    "attend_vector.metal": [
        (
            "the scale of the neighbour group",
            "return (BEGIN + 4 * kWidth * (part / 4)) / Rows::kGroup;",
            "return (N - 1 - BEGIN - 4 * kWidth * (part / 4)) / Rows::kGroup;",
            "formats, vector",
        ),
        (
            "sums of q of a lane taken for the quad's",
            "sums[RUN] = over_quad(sum);",
            "sums[RUN] = sum;",
            "formats, vector",
        ),
        (
            "every key of a step has the scale of the first",
            "return kPageSize % kStep == 0 ? first - key + own : walk.row(slot + own);",
            "return first;",
            "formats, vector",
        ),
        (
            "the bias of a key counts in every lane",
            "hidden || part % 4 != 0 ? 0.0f",
            "hidden ? 0.0f",
            "formats, vector",
        ),
        (
            "a scale of NaN reaches the row that does not see its token",
            "own[r] = hidden ? 0.0f : weights[r] * scale.x;",
            "own[r] = weights[r] * scale.x;",
            "formats, vector, hidden",
        ),
        (
            "all pages have the first one's scales",
            "walk.page_of(slot) == page) {",
            "page >= 0) {",
            "formats, vector, channels",
        ),
        (
            "a NaN in V reaches the row that does not see it",
            "const bool hidden = EDGE && !Rows::kIsCoded && is_no_weight(weights[r]);",
            "const bool hidden = false;",
            "vector, not finite",
        ),
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
            "simd_shuffle_xor(odd ? even_sum : odd_sum, 1);",
            "simd_shuffle_xor(odd ? even_sum : odd_sum, 3);",
            "vector, whole steps",
        ),
        (
            "a dot product misses the other quad of its key",
            "distance = 4; distance < kLanes;",
            "distance = 8; distance < kLanes;",
            "vector",
        ),
        (
            "values take the weights of other keys",
            "quad_broadcast(weights[r], t);",
            "quad_broadcast(weights[r], 3 - t);",
            "vector, whole steps",
        ),
        (
            "weights are counted by both quads of their key",
            "true, part < 4, weights);",
            "true, true, weights);",
            "vector, whole steps",
        ),
        ("values are not rescaled", "        out[r][i] *= factor;\n", "", "vector"),
        (
            "the maximum of a lane taken for the simdgroup's",
            "raise(max(states[r].most, simd_max(score)));",
            "raise(max(states[r].most, score));",
            "vector",
        ),
        (
            "V offsets in 32 bits",
            "VRows::template at<DV>(v_pages, v_rows.row(kKeys * t) + key)",
            "v_pages + int((v_rows.row(kKeys * t) + key) * DV)",
            "vector, far pages",
        ),
        (
            "the values of one of a simdgroup's keys are dropped",
            "distance = kLanes; distance < 32;",
            "distance = 2 * kLanes; distance < 32;",
            "vector",
        ),
    ],
    "attend_tile.metal": [
        (
            "all simdgroups' scales of V lie in one place",
            "own_v_scales.stage(staged_v_scales + 8 * GROUPS * simdgroup, kStep, at.lane);",
            "own_v_scales.stage(staged_v_scales, kStep, at.lane);",
            "formats, tile",
        ),
        (
            "sums of weight * bias are not rescaled",
            "      out_biases[m][u] *= factor;\n",
            "",
            "formats, tile, far apart",
        ),
        (
            "a lane's sum of weight * bias taken for the row's",
            "const float bias = row_sum(out_biases[m][u]);",
            "const float bias = out_biases[m][u];",
            "formats, tile",
        ),
        (
            "a scale of NaN reaches rows that do not see its token",
            "no_second = EDGE && is_no_weight(two.y);",
            "no_second = false;",
            "formats, tile, hidden",
        ),
        (
            "K of a page is scaled as the page before",
            "    tile.enter_page(slot);\n",
            "    tile.enter_page(slots.x);\n",
            "formats, tile, channels",
        ),
        (
            "values of dead slots are read",
            "VRows::template at<DV>(v_pages, walk.row(value)), walk.is_live(value), g);",
            "VRows::template at<DV>(v_pages, walk.row(value)), true, g);",
            "tile, one key",
        ),
        (
            "K offsets in 32 bits",
            "{KRows::template at<D>(k_pages, walk.row(first)),",
            "{k_pages + int(walk.row(first) * D),",
            "tile, far pages",
        ),
        (
            "both keys of a lane are the first",
            "{key, KRows::template at<D>(key, 1), true, true};",
            "{key, key, true, true};",
            "tile, pages of 16",
        ),
        (
            "the second key is scored at the position of the first",
            "kRagged ? walk.position(slot + 1) : first + 1;",
            "kRagged ? walk.position(slot + 1) : first;",
            "wide",
        ),
        (
            "no barrier before the maxima are read",
            f"    put_maxima(scores);\n    {_BARRIER}\n",
            "    put_maxima(scores);\n",
            "wide",
        ),
        (
            "no barrier before the weights are read",
            f"kStep, at.lane);\n    {_BARRIER}\n",
            "kStep, at.lane);\n",
            "wide",
        ),
        (
            "no barrier before Q is read",
            f"    {_BARRIER}\n  }}\n\n  // To be called",
            "  }\n\n  // To be called",
            "wide",
        ),
        ("values are not rescaled", "      elements(out[m][i]) *= factor;\n", "", "wide"),
        (
            "the maximum of a simdgroup taken for the step's",
            "      most = max(most, maxima[s * kRows + 8 * m + at.row]);\n",
            "      most = max(most, maxima[simdgroup * kRows + 8 * m + at.row]);\n",
            "wide",
        ),
        (
            "a lane's sum taken for the row's",
            "sum = row_sum(states[m].sum);",
            "sum = states[m].sum;",
            "wide",
        ),
        (
            "rows behind the last are written",
            "      if (row >= reader.num_rows) {\n        continue;\n      }\n",
            "",
            "wide, partitions",
        ),
    ],
    "write_pages.metal": [
        (
            "a token goes to slot 0 of its page",
            "slot % arguments.page_size,\n",
            "0,\n",
            "write",
        ),
        ("slot -1 is written", "if (slot < 0 || at >=", "if (at >=", "write"),
        (
            "V is written with the rows of K",
            "is_key ? arguments.k_row : arguments.v_row;",
            "arguments.k_row;",
            "pool",
        ),
        (
            "the values of the token before",
            "v_tokens[long(token) * v_units + unit];",
            "v_tokens[long(max(token - 1, 0)) * v_units + unit];",
            "pool",
        ),
        (
            "offsets in 32 bits",
            "const long to = row * row_units",
            "const int to = row * row_units",
            "write, far pages",
        ),
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
        (
            "pages of all pools are as large as the first's",
            "page_units[group.z];",
            "page_units[0];",
            "pool",
        ),
        ("every pair is the first", "pairs[group.y];", "pairs[0];", "copy"),
    ],
    "gather_pages.metal": [
        (
            "every sequence has the first's table",
            "long(sequence) * arguments.max_pages;",
            "0;",
            "gather",
        ),
        (
            "what no page holds is not zeroed",
            "k_out[to] = slot.page >= 0 ? k_pages[from] : Unit(0);",
            "if (slot.page >= 0) { k_out[to] = k_pages[from]; }",
            "gather",
        ),
    ],
    "page_formats.h": [
        (
            "codes of a word in another order",
            "const int left = MANTISSA - BITS - BITS * k;",
            "const int left = MANTISSA - BITS - BITS * (16 / BITS - 1 - k);",
            "formats, tile, channels",
        ),
        (
            "the bias is dropped",
            "float(bias) + Numbers::kMiddle * float(scale));",
            "Numbers::kMiddle * float(scale));",
            "formats, vector",
        ),
        (
            "codes are not counted from the middle of them",
            "- half(1.5f);",
            "- half(1.0f);",
            "formats, tile, channels",
        ),
        (
            "scales of the key beside",
            "from_lane(loaded, key +",
            "from_lane(loaded, (key ^ 1) +",
            "formats, tile",
        ),
        (
            "groups of a long row have the scales of its first ones",
            "loaded = group / kStride == i ? own[i] : loaded;",
            "loaded = own[0];",
            "formats, tile, long rows",
        ),
    ],
    "tile_queries.h": [
        (
            "no barrier before Q times scales is read",
            f"    {_BARRIER}\n#pragma clang loop unroll(full)\n    for (int m = 0; m < ROW_TILES; m++) {{\n      biases",
            "#pragma clang loop unroll(full)\n    for (int m = 0; m < ROW_TILES; m++) {\n      biases",
            "formats, tile, channels",
        ),
        (
            "scales of the page before",
            "const long channels = walk.page_head(page) * D;",
            "const long channels = walk.page_head(max(page - 1, 0)) * D;",
            "formats, tile, channels",
        ),
        (
            "q . bias of one simdgroup's share",
            "biases[m] += sums[s * kRows",
            "biases[m] = sums[s * kRows",
            "formats, tile, channels",
        ),
    ],
    "rotation.h": [
        (
            "the difference of a butterfly turned round",
            "? other - quads[i] : quads[i] + other;",
            "? quads[i] - other : quads[i] + other;",
            "formats, write",
        ),
        (
            "the rotation is not its own inverse",
            "    quads[i] *= inverse_root(kSize);\n",
            "",
            "formats, gather",
        ),
    ],
    "row_quads.h": [
        (
            "the edge that is nearer to 0 is met",
            "const bool from_low = fabs(edges.low) > fabs(edges.high);",
            "const bool from_low = fabs(edges.low) < fabs(edges.high);",
            "formats, write",
        ),
        (
            "a group with a value that is not finite has a scale",
            "T(edges.finite ? scale : NAN);",
            "T(scale);",
            "formats, write",
        ),
        (
            "edges of half a group",
            "for (int distance = 1; distance < kLanes; distance *= 2) {",
            "for (int distance = 1; distance < kLanes / 2; distance *= 2) {",
            "formats, write",
        ),
    ],
    "quantise_pages.metal": [
        ("slot -1 is written", "    if (slot < 0) {\n      return;\n    }\n", "", "formats, write"),
        ("rotated values are not rounded", "    row.round();\n", "", "formats, write"),
        (
            "values that a page does not hold are written",
            "    if (offset >= place[2]) {\n      return;\n    }\n",
            "",
            "formats, seal",
        ),
    ],
    "seal_keys.metal": [
        (
            "tokens that a page does not hold count",
            "for (int t = 0; t < tokens; t++) {",
            "for (int t = 0; t < page_size; t++) {",
            "formats, seal",
        ),
        (
            "codes by the scale before it is rounded",
            "scales[j] = float(scale);",
            "scales[j] = (edges[j].high - edges[j].low) / 15;",
            "formats, seal",
        ),
    ],
    "dequantise_pages.metal": [
        (
            "the rotation is forgotten",
            "    row.rotate();\n",
            "",
            "formats, gather",
        ),
        (
            "an open page is read as the one after it",
            "slot.page -= is_open ? arguments.num_sealed : 0;",
            "slot.page -= is_open ? arguments.num_sealed - 1 : 0;",
            "formats, gather",
        ),
    ],
    "slot_lookup.h": [
        (
            "one token too many",
            "if (position >= context_len) {",
            "if (position > context_len) {",
            "gather",
        ),
        (
            "a ragged page is read from its position on",
            "slot.offset = position - starts[e];",
            "slot.offset = position % arguments.page_size;",
            "gather, ragged",
        ),
    ],
    "copy_buffer.metal": [
        (
            "the last unit stays behind",
            "  if (at < units) {",
            "  if (at + 1 < units) {",
            "kept pages",
        ),
    ],
    "merge_states.metal": [
        (
            "what is carried has no weight",
            "? 0 : carried_weight * carry[column];",
            "? 0 : carry[column];",
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
        ("lse in base 2", "most + log2(sum) * kLn2;", "most + log2(sum);", "states"),
        (
            "a part whose lse is NaN saw nothing",
            "return is_minus_infinity(lse) ? kNoWeight",
            "return !(lse > kLowest) ? kNoWeight",
            "states, not finite",
        ),
        (
            "values of an empty part are read",
            "if (!is_no_weight(weights[i])) {",
            "if (true) {",
            "states, not finite",
        ),
        (
            "a join that is NaN saw nothing",
            "const float total = sum == 0 ?",
            "const float total = !(sum > 0) ?",
            "states, not finite",
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
