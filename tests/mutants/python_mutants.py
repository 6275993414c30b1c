"""Faults in the Python package: ``(name, find, replace, seen_by)`` by file. They need no build."""

from .mutant import Mutant
from .page_faults import FAULTS

_FAULTS = {
    "formats/open_pages.py": [
        (
            "an open page is read as a sealed one",
            "np.where(slots >= 0, len(self._slot) + slots, tables)",
            "np.where(slots < _UNKNOWN, len(self._slot) + slots, tables)",
            "quantised_pool.pages_read_as_the_oracle_quantises_them",
        ),
        (
            "tokens that are written again count as written",
            "                np.minimum(self._written[:, slot], offset, out=self._written[:, slot])\n",
            "                pass\n",
            "quantised_pool.a_rewind_in_an_open_page_writes_over_it",
        ),
        (
            "the slot of a page that is sealed or free is lost",
            "            self._free.append(slot)\n",
            "",
            "quantised_pool.a_freed_page_is_unknown_again_and_its_slot_another_s",
        ),
        (
            "the copy of an open page has its slot too",
            "            fresh = self._free.pop()\n",
            "            fresh = int(slot)\n",
            "quantised_pool.a_fork_of_an_open_page_copies_it_open_and_one_of_sealed_pages_copies_nothing",
        ),
        (
            "a page counts as written when its first layer is",
            "(self._written.min(0) == self.page_size)",
            "(self._written[0] == self.page_size)",
            "quantised_pool.a_page_is_full_when_every_layer_has_written_it",
        ),
    ],
    "formats/page_format.py": [
        (
            "the formats are no key of the prefix cache",
            'return () if self.are_dense else (ExtraKey("format", str(self)),)',
            "return ()",
            "raw_pages.the_formats_are_an_extra_key_of_the_prefix_cache",
        ),
    ],
    "formats/stored.py": [
        (
            "V is quantised as it comes",
            "return rotate(x).astype(self.dtype) if self.is_rotated else x",
            "return x",
            "raw_pages.mlxs_own_operations_store_and_read_what_native_ones_do",
        ),
        (
            "an open page is not told from a sealed one",
            "is_open = (page_ids >= self.num_pages)",
            "is_open = (page_ids > self.num_pages)",
            "raw_pages.mlxs_own_operations_store_and_read_what_native_ones_do",
        ),
    ],
    "fast.py": [
        (
            "log-sum-exp is always returned",
            "    return (out, lse) if return_lse else out\n",
            "    return (out, lse)\n",
            "fast.a_plan_for_other_arrays_is_refused",
        ),
        (
            "softcap and scale change places",
            "options = AttentionOptions(scale, softcap, alibi_slopes, sinks, mask)",
            "options = AttentionOptions(softcap, scale, alibi_slopes, sinks, mask)",
            "fast.a_bad_call_is_a_typed_error",
        ),
        (
            "slopes are taken for sinks",
            "options = AttentionOptions(scale, softcap, alibi_slopes, sinks, mask)",
            "options = AttentionOptions(scale, softcap, sinks, alibi_slopes, mask)",
            "fast.a_bad_call_is_a_typed_error",
        ),
        (
            "a mask is dropped",
            "options = AttentionOptions(scale, softcap, alibi_slopes, sinks, mask)",
            "options = AttentionOptions(scale, softcap, alibi_slopes, sinks, None)",
            "fast.a_bad_call_is_a_typed_error",
        ),
        (
            "written K and V change places",
            "written = operations.write_pages([k, v], pages, slots",
            "written = operations.write_pages([v, k], pages, slots",
            "fast.a_bad_write_is_refused",
        ),
        (
            "a plan for another window is taken",
            "        plan.check_agrees(op, causal, sliding_window)\n",
            "        pass\n",
            "pool_plans.a_plan_of_another_pool_or_window_is_refused",
        ),
    ],
    "pool.py": [
        (
            "a page that is written again is quantised first",
            "self._seal(self.open_pages.due(page_ids))",
            "self._seal(self.open_pages.due())",
            "quantised_pool.a_rewind_in_an_open_page_writes_over_it",
        ),
        (
            "pages are sealed while a step waits to be written",
            "        if not self.open_pages.is_awaiting:\n            self._seal",
            "        if True:\n            self._seal",
            "quantised_pool.full_pages_wait_while_another_step_has_not_been_written",
        ),
        (
            "V of a page that a step fills is taken for rotated",
            "rotated=False",
            "rotated=True",
            "quantised_pool.a_page_that_a_step_fills_is_quantised_as_it_is_written",
        ),
        (
            "memory for open pages is taken before cached ones are sealed",
            "        if num_pages > open_pages.num_free:\n            self.seal()\n",
            "",
            "quantised_pool.pages_that_only_a_cache_holds_are_sealed_when_slots_run_short",
        ),
        (
            "a copy is done in the first layer alone",
            "flat = [array for arrays in newest for array in arrays[part]]",
            "flat = [array for arrays in newest for array in newest[0][part]]",
            "pool.copy_moves_a_page_in_all_layers_in_one_operation",
        ),
        (
            "a copied page forgets its tokens",
            "            self._tokens_stored[target] = self._tokens_stored[source]\n",
            "            pass\n",
            "carried_state.tokens_stored_follows_copies_growth_and_shrinking",
        ),
        (
            "a copy is counted the wrong way",
            "            self._tokens_stored[target] = self._tokens_stored[source]\n",
            "            self._tokens_stored[source] = self._tokens_stored[target]\n",
            "carried_state.tokens_stored_follows_copies_growth_and_shrinking",
        ),
        (
            "copies of a step come in another order",
            "arrays[part] = copies[i * width : (i + 1) * width]\n",
            "arrays[part] = copies[i * width : (i + 1) * width][::-1]\n",
            "pool.copy_moves_a_page_in_all_layers_in_one_operation",
        ),
        (
            "every layer is layer 0",
            "return PoolLayer(self, layer)",
            "return PoolLayer(self, 0)",
            "carried_state.a_copy_on_write_that_runs_out_of_pages_changes_nothing",
        ),
        (
            "tokens stored is one too few",
            "np.maximum.at(self._tokens_stored, pages, offsets + 1)",
            "np.maximum.at(self._tokens_stored, pages, offsets)",
            "carried_state.tokens_stored_counts_layer_0_alone_and_every_write_of_many",
        ),
        (
            "tokens that are skipped are counted",
            "            slots = slots[slots >= 0]\n",
            "",
            "carried_state.tokens_stored_is_the_last_token_of_the_last_write_to_each_page",
        ),
        (
            "writes are counted twice over",
            "        self._writes.clear()\n",
            "",
            "carried_state.freed_pages_that_are_wiped_store_nothing",
        ),
        (
            "tokens stored never gets less",
            "            self._tokens_stored[pages] = 0\n",
            "",
            "carried_state.tokens_stored_is_the_last_token_of_the_last_write_to_each_page",
        ),
        (
            "slots for a larger pool are taken",
            "if slot_mapping.num_slots > num_slots:",
            "if slot_mapping.num_slots < 0:",
            "pool_plans.slots_for_a_larger_pool_are_refused_and_for_a_smaller_one_taken",
        ),
        (
            "versions are not reset",
            "            arrays[:] = base\n",
            "            pass\n",
            "pool.a_plan_captured_by_compile_is_refused",
        ),
        (
            "one page too few is wiped",
            "slots = SlotMapping((first + np.arange(size, dtype=np.int32)).ravel(), newest)",
            "slots = SlotMapping((first + np.arange(size, dtype=np.int32)).ravel()[:-1], newest)",
            "carried_state.freed_pages_that_are_wiped_store_nothing",
        ),
        (
            "wiped pages keep their tokens",
            "self._tokens_stored[list(page_ids)] = 0",
            "pass",
            "carried_state.freed_pages_that_are_wiped_store_nothing",
        ),
        (
            "layers but the first are not wiped",
            "for layer in range(self.num_layers):\n            self.write_values(self.state[layer]",
            "for layer in range(1):\n            self.write_values(self.state[layer]",
            "carried_state.freed_pages_that_are_wiped_store_nothing",
        ),
        (
            "a pool of another allocator is attached",
            "            if not self._owns_allocator:\n",
            "            if False:\n",
            "pool_memory.a_pool_belongs_to_one_allocator",
        ),
        (
            "growth forgets the counts",
            "self._tokens_stored = np.pad(self._tokens_stored, (0, num_pages - before))",
            "self._tokens_stored = np.zeros(num_pages, np.int32)",
            "carried_state.tokens_stored_follows_copies_growth_and_shrinking",
        ),
        (
            "a plan is remembered whatever the tables",
            "if remembered is not None and remembered[0] is packed and previous is None:",
            "if remembered is not None and previous is None:",
            "pool_plans.a_plan_follows_its_tables",
        ),
        (
            "a plan is remembered whatever the window",
            "kind = num_q_heads, sliding_window, causal, kernels, _ext.num_threads()",
            "kind = num_q_heads, causal, kernels, _ext.num_threads()",
            "pool_plans.a_plan_follows_sealed_tables",
        ),
        (
            "a plan is remembered whether causal or not",
            "kind = num_q_heads, sliding_window, causal, kernels, _ext.num_threads()",
            "kind = num_q_heads, sliding_window, kernels, _ext.num_threads()",
            "pool_plans.each_window_and_causality_has_a_plan_of_its_own",
        ),
        (
            "tables of another allocator are taken",
            "if packed.allocator is not None and packed.allocator is not self._allocator:",
            "if False:",
            "pool_plans.a_plan_of_another_pool_or_window_is_refused",
        ),
        (
            "tables of other pages are taken",
            "        if packed.page_size != self.page_size:\n",
            "        if False:\n",
            "pool_plans.a_plan_of_another_pool_or_window_is_refused",
        ),
    ],
    "pool_storage.py": [
        (
            "a pool may pass its memory limit",
            "    if active + nbytes > memory_limit:\n",
            "    if active > memory_limit:\n",
            "pool_memory.a_pool_past_its_memory_limit_is_refused_before_it_is_made",
        ),
        (
            "growth counts no page that is added",
            "added = (num_pages - self.num_pages) * self.page_nbytes",
            "added = 0 * (num_pages - self.num_pages) * self.page_nbytes",
            "pool_memory.growth_past_the_memory_limit_is_typed_and_changes_nothing",
        ),
        (
            "versions stay in the old memory",
            "base[:] = newest[:] = resized",
            "base[:] = resized",
            "pool_memory.a_pool_grows_in_slabs_on_demand_and_shrinks_when_idle",
        ),
        (
            "K is kept for V",
            "self._specs[i], None if kept is None else kept[i]\n",
            "self._specs[i], None if kept is None else kept[0]\n",
            "carried_state.a_pool_that_may_not_grow_is_as_it_was",
        ),
        (
            "pages are filled with 0 whatever is asked",
            "fill, resized = self._fills[i], None",
            "fill, resized = 0.0, None",
            "pool_memory.a_pool_grows_in_slabs_on_demand_and_shrinks_when_idle",
        ),
    ],
    "attention.py": [
        (
            "the mask is dropped for pools",
            "            mask=mask, return_lse=True,\n        )  # fmt: skip\n    if len",
            "            mask=None, return_lse=True,\n        )  # fmt: skip\n    if len",
            "pool_plans.every_option_reaches_pools_and_page_blocks_alike",
        ),
        (
            "the scale is dropped for pools",
            "q, plan, scale=scale,",
            "q, plan, scale=None,",
            "pool_plans.every_option_reaches_pools_and_page_blocks_alike",
        ),
        (
            "the window is dropped for PageBlocks",
            "            sliding_window=sliding_window, softcap=softcap, alibi_slopes=alibi_slopes,\n            sinks=sinks, mask=mask,\n        )  # fmt: skip\n    else",
            "            softcap=softcap, alibi_slopes=alibi_slopes,\n            sinks=sinks, mask=mask,\n        )  # fmt: skip\n    else",
            "pool_plans.every_option_reaches_pools_and_page_blocks_alike",
        ),
        (
            "heads and tokens stay in each other's place",
            "query.swapaxes(1, 2).reshape(batch * length, heads, head_dim), [length] * batch",
            "query.reshape(batch * length, heads, head_dim), [length] * batch",
            "pool_plans.every_option_reaches_pools_and_page_blocks_alike",
        ),
        (
            "the canary is not asked",
            "        if pool.canary is not None:\n            pool.canary.read(page_blocks.index, page_tables)\n",
            "",
            "carried_state.attention_by_tables_asks_the_canary_and_the_layer_that_was_not_written_is_refused",
        ),
    ],
    "attention_plan.py": [
        (
            "a plan is advanced whatever its options",
            "previous.options == options",
            "True",
            "previous.a_plan_of_other_options_is_not_the_step_before",
        ),
    ],
    "forward/group.py": [
        (
            "a layer that waits for its attention is brought from before its tokens",
            "        written = [each for each in places if",
            "        written = [each for each in places if True or",
            "threads.a_layer_attends_after_another_thread_has_gone_before",
        ),
    ],
    "forward/passes.py": [
        (
            "what a pass has written stays in the memory of before",
            "            if goes_on and is_moved and window in steps:\n",
            "            if goes_on and not is_moved and window in steps:\n",
            "threads.a_layer_attends_after_another_thread_has_gone_before",
        ),
        (
            "what other threads have built is lost with a pool of another dtype",
            "                branch.parts[fresh] = branch.parts.pop(pool)\n",
            "                branch.parts.pop(pool)\n",
            "threads.a_pass_goes_on_after_another_thread_has_changed_the_dtype",
        ),
    ],
    "mlx_lm/speculative.py": [
        (
            "every row is cut to the shortest",
            "        layers[0].trim(over)\n",
            "        layers[0].trim([max(over)] * len(over))\n",
            "speculative_batch.a_row_keeps_as_many_drafts_as_alone",
        ),
        (
            "a draft is kept unseen",
            "drafted[accepted] == chosen[accepted]",
            "(drafted[accepted] == chosen[accepted] or accepted == 1)",
            "speculative_batch.a_row_keeps_as_many_drafts_as_alone",
        ),
        (
            "padding is written as tokens",
            "prepare(lengths=counts, right_padding=padding)",
            "prepare(lengths=counts, right_padding=[0] * len(counts))",
            "speculative_batch.prompts_come_and_go_at_any_time_and_pages_go_with_them",
        ),
        (
            "a draft continues the first of several tokens",
            "logits[mx.arange(len(new)), mx.array(counts) - 1]",
            "logits[mx.arange(len(new)), 0 * mx.array(counts)]",
            "speculative_batch.a_row_keeps_as_many_drafts_as_alone",
        ),
        (
            "pages of rejected tokens are kept",
            "                    row.truncate(window, length)\n",
            "                    pass\n",
            "speculative_batch.a_known_beginning_is_reused_and_a_rollback_copies_no_page",
        ),
        (
            "tokens behind a stop token are answered",
            "new = new[: stops[0] + 1] if stops else new",
            "new = new",
            "speculative_batch.a_stop_token_ends_a_row_also_among_accepted_drafts",
        ),
        (
            "prompts join without pages",
            "while rows and not self._have_pages(rows) and",
            "while not rows and",
            "speculative_batch.on_a_limited_pool_prompts_wait_and_none_is_lost",
        ),
        (
            "a repetition ends with the prompt",
            "(tokens[end : end + most] * most)[:most]",
            "tokens[end : end + most]",
            "speculative_batch.look_up_copies_what_followed_the_longest_match_last",
        ),
        (
            "tokens that the model cannot read are drafted",
            "counts)[..., : self._vocabulary]",
            "counts)",
            "speculative_batch.a_vocabulary_that_is_padded_further_gives_no_draft_that_the_model_cannot_read",
        ),
    ],
}

MUTANTS = [
    Mutant(
        f"python {file.removesuffix('.py')}: {name}",
        "python",
        f"python/paged_mlx/{file}",
        find,
        replace,
        seen_by,
    )
    for file, faults in [*_FAULTS.items(), *FAULTS.items()]
    for name, find, replace, seen_by in faults
]
