"""Faults in the operations and bindings: ``(name, find, replace, seen_by)`` by file."""

from .mutant import Mutant

_FAULTS = {
    "ops/attention.cpp": [
        (
            "sinks come before slopes",
            "    at.alibi = options_.alibi ? next++ : -1;\n    at.sinks = options_.sinks ? next++ : -1;\n",
            "    at.sinks = options_.sinks ? next++ : -1;\n    at.alibi = options_.alibi ? next++ : -1;\n",
            "input_layouts.all_options_together_are_each_in_its_place",
        ),
        (
            "options are dropped on the CPU",
            "  args.options = options_;\n",
            "  args.options.scale = options_.scale;\n",
            "compiled_graphs.attentions_of_a_pool_that_differ_in_an_option_stay_two",
        ),
        (
            "options are dropped by the launch",
            "  call.options = options_;\n",
            "  call.options.scale = options_.scale;\n",
            "input_layouts.an_option_of_any_layout_is_read_as_its_values",
        ),
        (
            "a mask that is sliced is read as it lies",
            "return mx::contiguous(m, false, s);",
            "return m;",
            "input_layouts.a_mask_of_one_head_is_the_mask_of_all",
        ),
        (
            "a mask of one head is the mask of head 0 alone",
            "return mask.shape(0) == 1 ? 0 :",
            "return mask.shape(0) == 0 ? 0 :",
            "compiled_graphs.attentions_that_differ_in_an_option_stay_two",
        ),
        (
            "attentions of other options are one",
            "return options_ == node.options_ && layer_",
            "return layer_",
            "compiled_graphs.attentions_that_differ_in_an_option_stay_two",
        ),
        (
            "the scale is 1 unless given",
            'scale.value_or(1.0f / std::sqrt(float(shape.at("head_dim"))))',
            "scale.value_or(1.0f)",
            "compiled_graphs.attentions_that_differ_in_an_option_stay_two",
        ),
        (
            "the softcap is dropped",
            "    options.softcap = *cap;\n",
            "",
            "compiled_graphs.attentions_of_a_pool_that_differ_in_an_option_stay_two",
        ),
        (
            "a scale that is no number is taken",
            '  check_number(kOp, "scale", options.scale, false);\n',
            "",
            "fast.a_bad_call_is_a_typed_error",
        ),
        (
            "K and V change places on the CPU",
            "args.k = layer_.k_side(inputs);\n  args.v = layer_.v_side(inputs);",
            "args.k = layer_.v_side(inputs);\n  args.v = layer_.k_side(inputs);",
            "chapter.a_block_of_positions_attends_causally_across_pages",
        ),
        (
            "sinks are dropped by the launch",
            "call.sinks = at.sinks < 0 ? nullptr : in(at.sinks);",
            "call.sinks = nullptr;",
            "input_layouts.an_option_of_any_layout_is_read_as_its_values",
        ),
        (
            "q that is sliced is read as it lies",
            "inputs = {mx::contiguous(q, false, s)};",
            "inputs = {q};",
            "fast.arrays_need_not_be_contiguous",
        ),
        (
            "pages that are sliced are read as they lie",
            "inputs.push_back(row_contiguous(array, s));",
            "inputs.push_back(array);",
            "fast.arrays_need_not_be_contiguous",
        ),
        (
            "a mask for too few keys is taken",
            "mask && mask->ndim() > 0 ? mask->shape(-1) : -1,",
            "-1,",
            "fast.a_bad_call_is_a_typed_error",
        ),
    ],
    "ops/page_arrays.cpp": [
        (
            "pages of another dtype are taken",
            "      return check_dtype(op, names.pages, pages[first], dtype, why);\n",
            "      return;\n",
            "fast.a_bad_call_is_a_typed_error",
        ),
        (
            "V of open pages is not rotated back",
            "dense_side(arrays[open_k() + 1], formats.rotates())",
            "dense_side(arrays[open_k() + 1])",
            "formats.a_gather_gives_what_the_pages_read_as",
        ),
    ],
    "ops/attention_checks.cpp": [
        (
            "slopes and sinks are read as they lie",
            "return mx::contiguous(mx::astype(a, mx::float32, s), false, s);",
            "return mx::astype(a, mx::float32, s);",
            "input_layouts.a_pool_reads_options_of_any_layout_as_their_values",
        ),
        (
            "a plan for other heads is taken",
            '  same("num_q_heads", plan.num_q_heads, g.num_q_heads, " of q");\n',
            "",
            "fast.a_plan_for_other_arrays_is_refused",
        ),
        (
            "a page behind the pool is read",
            "if (plan.max_page_id >= g.num_pages) {",
            "if (plan.max_page_id > g.num_pages) {",
            "pool_plans.a_plan_that_names_a_page_behind_the_pool_is_refused",
        ),
        (
            "a number that is not positive is taken",
            "(positive && value <= 0)",
            "(positive && value < 0)",
            "fast.a_bad_call_is_a_typed_error",
        ),
    ],
    "ops/pages.cpp": [
        (
            "tokens that are sliced are written as they lie",
            "k_rows = mx::contiguous(k, false, s), v_rows",
            "k_rows = k, v_rows",
            "input_layouts.tokens_of_any_layout_are_written_as_their_values",
        ),
        (
            "a copy of a buffer that somebody holds is left out",
            "return needed ? BufferCopy",
            "return false ? BufferCopy",
            "fast.arrays_need_not_be_contiguous",
        ),
        (
            "a page is copied the wrong way",
            "from = pairs[2 * i], to = pairs[2 * i + 1];",
            "from = pairs[2 * i + 1], to = pairs[2 * i];",
            "fast.copy_moves_whole_pages_in_every_array",
        ),
        (
            "the eighth array of a node is not copied",
            "                   pool.copy(pairs, count, num_pages);\n",
            "                   if (&pool < pools.data() + 7) pool.copy(pairs, count, num_pages);\n",
            "carried_state.a_copy_reaches_every_layer_of_many",
        ),
        (
            "the last pair is not copied",
            "for (int i = 0; i < count; i++) {",
            "for (int i = 0; i < count - 1; i++) {",
            "fast.copy_moves_whole_pages_in_every_array",
        ),
        (
            "tokens of another dtype are written",
            '  check_dtype("write_pages", "k", k, dtype, "the dtype of k_pages");\n',
            "",
            "fast.a_bad_write_is_refused",
        ),
        (
            "values that are rotated are rotated again as they are sealed",
            "    sealing.v_side.rotated &= !rotated_;\n",
            "",
            "formats.pages_are_sealed_as_a_whole",
        ),
        (
            "the last token of a sealed page has no say",
            "k + from * k_side.dim * itemsize, tokens);",
            "k + from * k_side.dim * itemsize, tokens - 1);",
            "formats.pages_are_sealed_as_a_whole",
        ),
    ],
    "ops/page_rows.cpp": [
        (
            "a slot behind the last one is written",
            "slots[t] >= writers[0].num_slots()",
            "slots[t] > writers[0].num_slots()",
            "fast.a_traced_slot_outside_the_pool_is_an_error_at_evaluation",
        ),
        (
            "slot -1 is written",
            "      if (slots[t] >= 0) {\n        writer.write(t, slots[t]);\n      }\n",
            "      writer.write(t, slots[t] < 0 ? 0 : slots[t]);\n",
            "fast.write_puts_each_token_in_its_slot_and_touches_nothing_else",
        ),
        (
            "heads of a token change places",
            "    tokens_.copy(from, h, static_cast<char*>(side_.pages)",
            "    tokens_.copy(from, heads - 1 - h, static_cast<char*>(side_.pages)",
            "fast.write_puts_each_token_in_its_slot_and_touches_nothing_else",
        ),
        (
            "a gather fills nothing with zeros",
            "  std::memset(out, 0, int64_t(batch) * num_kv_heads * length * row_bytes);\n",
            "",
            "fast.gather_makes_each_context_contiguous_and_zeroes_the_rest",
        ),
        (
            "a gather reads a page where there is none",
            "count > 0 && page >= 0; h++",
            "count > 0; h++",
            "carried_state.a_gather_leaves_zeros_where_a_table_has_no_page",
        ),
        (
            "a gather goes past the context",
            "const int end = std::min(lens[b], length);",
            "const int end = length;",
            "fast.gather_makes_each_context_contiguous_and_zeroes_the_rest",
        ),
        (
            "pages that are sliced are read as they lie",
            "  return mx::contiguous(pages, false, s);\n",
            "  return pages;\n",
            "fast.arrays_need_not_be_contiguous",
        ),
    ],
    "ops/step_plan.cpp": [
        (
            "starts and lengths of pages change places",
            "  in.page_starts = optional(step.page_starts);\n  in.page_lens = optional(step.page_lens);\n",
            "  in.page_starts = optional(step.page_lens);\n  in.page_lens = optional(step.page_starts);\n",
            "pool_plans.a_plan_follows_sealed_tables",
        ),
        (
            "a plan that is moved on takes the words of the one before",
            "  plan.words_ = words_for(header().num_words);\n",
            "",
            "previous.the_step_before_stays_what_it_was",
        ),
        (
            "lengths may be those of another batch",
            '{{"batch", batch}});\n  if (step.cu_seqlens_q) {',
            '{{"batch", -1}});\n  if (step.cu_seqlens_q) {',
            "previous.a_step_that_cannot_be_is_refused_after_one_that_can",
        ),
    ],
    "ops/gather_pages.cpp": [
        (
            "the next version of V is K",
            "outputs[2 + i].copy_shared_buffer(inputs[i]);",
            "outputs[2 + i].copy_shared_buffer(inputs[0]);",
            "pool_plans.every_option_reaches_pools_and_page_blocks_alike",
        ),
        (
            "starts and lengths of pages change places",
            "                            ragged ? tables[2].data<int32_t>() : nullptr,\n                            ragged ? tables[3]",
            "                            ragged ? tables[3].data<int32_t>() : nullptr,\n                            ragged ? tables[2]",
            "fast.gather_follows_ragged_pages",
        ),
        (
            "V is gathered from K",
            "gather.run(v, open_v, v_out);",
            "gather.run(k, open_v, v_out);",
            "fast.gather_makes_each_context_contiguous_and_zeroes_the_rest",
        ),
    ],
    "ops/merge_states.cpp": [
        (
            "an empty part has a weight",
            "    if (part.lse[row] == kNothing) {\n      continue;\n    }\n",
            "",
            "fast.merging_nothing_but_empty_parts_is_empty",
        ),
        (
            "weights forget the maximum",
            "std::exp(part.lse[row] - most)",
            "std::exp(part.lse[row])",
            "fast.an_empty_part_changes_no_bit",
        ),
        (
            "a join that is NaN saw nothing",
            "lse[row] = total == 0 ?",
            "lse[row] = !(total > 0) ?",
            "not_finite.only_minus_infinity_is_a_part_that_saw_nothing",
        ),
        (
            "a part that is sliced is read as it lies",
            "inputs.push_back(mx::contiguous(out, false, s));",
            "inputs.push_back(out);",
            "input_layouts.parts_of_any_layout_are_merged_as_their_values",
        ),
    ],
    "ops/write_attend.cpp": [
        (
            "new tokens are not written",
            '        write_slots(kOp, "slots", writers, slots);\n',
            "",
            "write_attend.one_node_has_the_bits_of_a_write_and_an_attention",
        ),
        (
            "V of a step is written as K",
            "{inputs[kV], args.v}};",
            "{inputs[kK], args.v}};",
            "write_attend.one_node_has_the_bits_of_a_write_and_an_attention",
        ),
        (
            "sinks are dropped by a step",
            "args.sinks = sinks_at() < 0 ? nullptr : inputs[sinks_at()].data<float>();",
            "args.sinks = nullptr;",
            "write_attend.sinks_are_the_attentions",
        ),
    ],
    "bindings/operations.cpp": [
        (
            "pools never write in place",
            "return alias ? WriteMode::alias : WriteMode::donate;",
            "return WriteMode::donate;",
            "pool.a_compiled_step_is_in_place_and_right",
        ),
        (
            "arrays that somebody holds are written in place",
            "return alias ? WriteMode::alias : WriteMode::donate;",
            "return WriteMode::alias;",
            "pool.raw_writes_donate_when_they_can_and_count_when_they_copy",
        ),
        (
            "copies are never in place",
            "return copy_pages(pools, pairs, write_mode(alias), s);",
            "return copy_pages(pools, pairs, WriteMode::donate, s);",
            "pool.copy_moves_a_page_in_all_layers_in_one_operation",
        ),
    ],
}

MUTANTS = [
    Mutant(
        f"ops {file.rpartition('/')[2].partition('.')[0]}: {name}"
        if file.startswith("ops")
        else f"bindings {file.rpartition('/')[2].partition('.')[0]}: {name}",
        "ops",
        f"csrc/{file}",
        find,
        replace,
        seen_by,
    )
    for file, faults in _FAULTS.items()
    for name, find, replace, seen_by in faults
]
