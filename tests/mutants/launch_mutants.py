"""Faults in the Metal launch code: ``(name, find, replace, seen_by)`` by file."""

from .mutant import Mutant

_FAULTS = {
    "launch_attention.cpp": [
        (
            "biases bound for scales",
            "encoder.set_pages(PAGED_MLX_BUFFER_V_SCALES, call.v_scales.scales);",
            "encoder.set_pages(PAGED_MLX_BUFFER_V_SCALES, call.v_scales.biases);",
            "formats",
        ),
        (
            "open pages are attended as sealed ones",
            "  call.formats = {};\n  return call;",
            "  return call;",
            "formats",
        ),
        (
            "items of open pages are attended in the sealed pages",
            "attend_items(encoder, call, partials, kind, begin, first_open);",
            "attend_items(encoder, call, partials, kind, begin, end);",
            "formats",
        ),
        (
            "what is rotated is merged as it is",
            '    variant.define("ROTATED", 1);\n',
            "",
            "formats",
        ),
        (
            "K's format for both sides",
            '.define("V_FORMAT", int(formats.v));\n  }\n  return variant;',
            '.define("V_FORMAT", int(formats.k));\n  }\n  return variant;',
            "formats",
        ),
        (
            "K bound in place of V",
            "encoder.set_pages(PAGED_MLX_BUFFER_V_PAGES, call.v_pages);",
            "encoder.set_pages(PAGED_MLX_BUFFER_V_PAGES, call.k_pages);",
            "tile",
        ),
        (
            "out and lse bound to each other's index",
            "encoder.set_output(PAGED_MLX_BUFFER_LSE, call.lse);\n  encoder.set_output(PAGED_MLX_BUFFER_PARTIAL_OUT",
            "encoder.set_output(PAGED_MLX_BUFFER_LSE, call.out);\n  encoder.set_output(PAGED_MLX_BUFFER_PARTIAL_OUT",
            "tile",
        ),
        (
            "sinks bound for ALiBi",
            "encoder.set_input(PAGED_MLX_BUFFER_ALIBI, call.alibi_slopes);",
            "encoder.set_input(PAGED_MLX_BUFFER_ALIBI, call.sinks);",
            "tile, options",
        ),
        (
            "the merge has no sinks bound",
            "  if (call.options.sinks) {\n    encoder.set_input(PAGED_MLX_BUFFER_SINKS, call.sinks);\n  }\n  encoder.dispatch({size_t(plan",
            "  encoder.dispatch({size_t(plan",
            "merge, sinks",
        ),
        (
            "a function constant without a value",
            "\n      .set(PAGED_MLX_CONSTANT_ALIBI, call.options.alibi)",
            "",
            "vector",
        ),
        (
            "no variant has a window",
            ".set(PAGED_MLX_CONSTANT_WINDOW, plan.sliding_window > 0)",
            ".set(PAGED_MLX_CONSTANT_WINDOW, plan.sliding_window > 1000)",
            "wide, window",
        ),
        (
            "ragged tables are read as full pages",
            ".set(PAGED_MLX_CONSTANT_RAGGED, plan.page_starts != 0)",
            ".set(PAGED_MLX_CONSTANT_RAGGED, false)",
            "tile, ragged",
        ),
        (
            "an additive mask is read as boolean",
            "call.options.mask == MaskKind::additive);",
            "call.options.mask == MaskKind::boolean);",
            "vector, options",
        ),
        (
            "the mask of head 0 for all heads",
            "a.mask_head_stride = call.mask_head_stride;",
            "a.mask_head_stride = 0;",
            "tile, options",
        ),
        ("scale in natural units", "float(o.scale * unit);", "o.scale;", "vector"),
        (
            "softcap in natural units",
            "float(o.softcap * unit);",
            "o.softcap;",
            "vector, options",
        ),
        (
            "items of every kind begin at the first",
            "arguments.items = header(call).items + first * int(sizeof(PlanItem) / sizeof(int32_t));",
            "arguments.items = header(call).items;",
            "every kind",
        ),
        (
            "the last item decides how many rows there are",
            "rows = std::max(rows, items(call)[i].row_count * gqa_factor(call));",
            "rows = items(call)[i].row_count * gqa_factor(call);",
            "every kind",
        ),
        (
            "one tile of rows of each item",
            "size_t(count), row_tiles},",
            "size_t(count), 1},",
            "wide, many tiles",
        ),
        (
            "an item too few in the grid",
            "size_t(count), row_tiles},",
            "size_t(count) - (count > 1), row_tiles},",
            "tile",
        ),
        (
            "heads and items swapped in the grid",
            "{size_t(arguments.num_kv_heads), size_t(count), row_tiles},",
            "{size_t(count), size_t(arguments.num_kv_heads), row_tiles},",
            "tile",
        ),
        (
            "half the threads of a threadgroup",
            "                   {size_t(32 * simdgroups)});",
            "                   {size_t(16 * simdgroups)});",
            "wide",
        ),
        (
            "partials of one head only",
            "size_t(plan.num_partials) * plan.num_q_heads;",
            "size_t(plan.num_partials);",
            "merge",
        ),
        (
            "room for maxima but not for sums",
            "encoder.temporary(rows * 2 * sizeof(float))};",
            "encoder.temporary(rows * sizeof(float))};",
            "merge",
        ),
        (
            "a single merge is skipped",
            "if (plan.num_merges > 0 &&",
            "if (plan.num_merges > 1 &&",
            "merge",
        ),
        (
            "the last rows are not merged",
            "encoder.dispatch({size_t(plan.num_merges) * plan.num_q_heads},",
            "encoder.dispatch({size_t(plan.num_merges) * plan.num_q_heads - 1},",
            "merge, sinks",
        ),
    ],
    "launch_pages.cpp": [
        (
            "what is rotated already is rotated as its page is sealed",
            "call.formats.rotates() && !call.rotated);",
            "call.formats.rotates());",
            "formats",
        ),
        (
            "open pages are written as codes",
            "      if (stored.has_open_pages()) {",
            "      if (false) {",
            "formats",
        ),
        (
            "the ids of open pages are not told from others",
            "0, 0}, call.num_sealed});",
            "0, 0}, 1 << 30});",
            "formats",
        ),
        (
            "K's tokens bound for V",
            "call.v ? call.v : call.k);",
            "call.k);",
            "pool",
        ),
        (
            "V's rows are as long as K's",
            "                v_row / unit};",
            "                call.row.k / unit};",
            "pool",
        ),
        (
            "units that V's rows are no multiple of",
            "const int unit = unit_of({call.row.k, v_row});",
            "const int unit = unit_of({call.row.k});",
            "odd rows",
        ),
        (
            "the last pool of a dispatch is the one before",
            "const size_t pool = first + std::min(i, count - 1);",
            "const size_t pool = first + std::min(i, count - 2);",
            "pool",
        ),
        (
            "as many units as the last pool has",
            "most = std::max<int64_t>(most, arguments.page_units[i]);",
            "most = arguments.page_units[i];",
            "pool",
        ),
        (
            "the grid has the sequences only",
            "size_t(call.batch) * call.num_kv_heads},\n                   {wide, high});",
            "size_t(call.batch)},\n                   {wide, high});",
            "gather",
        ),
        (
            "starts and lengths of pages swapped",
            "encoder.set_input(PAGED_MLX_BUFFER_PAGE_LENS, call.page_lens);",
            "encoder.set_input(PAGED_MLX_BUFFER_PAGE_LENS, call.page_starts);",
            "gather, ragged",
        ),
        (
            "the last threadgroup is dropped",
            "encoder.dispatch({(size_t(units) + threads - 1) / threads, y, z}, {threads});",
            "encoder.dispatch({std::max<size_t>(1, size_t(units) / threads), y, z}, {threads});",
            "gather",
        ),
        (
            "nothing is carried from dispatch to dispatch",
            "variant.set(PAGED_MLX_CONSTANT_HAS_CARRIED, first > 0)",
            "variant.set(PAGED_MLX_CONSTANT_HAS_CARRIED, false)",
            "30 states",
        ),
        (
            "no room for the carried lse",
            "size_t(call.rows) * (call.dim + 1) * sizeof(float)",
            "size_t(call.rows) * call.dim * sizeof(float)",
            "30 states",
        ),
        (
            "the parts of the first dispatch again",
            "const size_t part = first + std::min(i, count - 1);",
            "const size_t part = std::min(i, count - 1);",
            "30 states",
        ),
    ],
    "bodies.cpp": [
        (
            "what few rows need is launched for many",
            "if (kind == kVectorItem) {",
            "if (false) {",
            "every kind",
        ),
    ],
    "variant.cpp": [
        (
            "libraries share a name whatever their macros",
            'name += std::string("_") + macro.name + "_" + value_of(macro);',
            'name += std::string("_") + macro.name;',
            "pipeline names",
        ),
        (
            "pipelines share a name whatever their constants",
            'name += "_c" + std::to_string(constant.id) + "_" + std::to_string(constant.value);',
            'name += "_c" + std::to_string(constant.id);',
            "pipeline names",
        ),
        *(
            (f"a variant is the same whatever its {part}", find, "", "variants")
            for part, find in (
                ("kernel", "same(kernel, other.kernel) && "),
                ("macros", " && macros == other.macros"),
                ("constants", " && constants == other.constants"),
                ("words", " && same(word, other.word)"),
            )
        ),
        (
            "words are the same only where they lie",
            "return a == b || (a && b && std::strcmp(a, b) == 0);",
            "return a == b;",
            "variants",
        ),
    ],
}

MUTANTS = [
    Mutant(
        f"{file.partition('.')[0]}: {name}", "launch", f"csrc/metal/{file}", find, replace, seen_by
    )
    for file, faults in _FAULTS.items()
    for name, find, replace, seen_by in faults
]
