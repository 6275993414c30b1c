"""Faults in the Python package: ``(name, find, replace, seen_by)`` by file. They need no build."""

from .mutant import Mutant
from .page_faults import FAULTS

_FAULTS = {
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
            "operations.write_pages([k, v], [k_pages, v_pages], slots, stream=stream)",
            "operations.write_pages([v, k], [k_pages, v_pages], slots, stream=stream)",
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
            "a copy is done in the first layer alone",
            "        for arrays in self.state:\n            flat += arrays\n        copies",
            "        for arrays in self.state:\n            flat += self.state[0]\n        copies",
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
            "            arrays[:] = copies[: len(arrays)]\n",
            "            arrays[:] = copies[: len(arrays)][::-1]\n",
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
            "slots = mx.array((first + np.arange(size, dtype=np.int32)).ravel())",
            "slots = mx.array((first + np.arange(size, dtype=np.int32)).ravel()[:-1])",
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
            "        for arrays in self.state:\n            arrays[:] = operations.write_pages(",
            "        for arrays in self.state[:1]:\n            arrays[:] = operations.write_pages(",
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
            "added = (num_pages - before) * (self.nbytes // before)",
            "added = 0 * (num_pages - before) * (self.nbytes // before)",
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
            "None if kept is None else kept[i],",
            "None if kept is None else kept[0],",
            "carried_state.a_pool_that_may_not_grow_is_as_it_was",
        ),
        (
            "pages are filled with 0 whatever is asked",
            "                self._fill,\n",
            "                0.0,\n",
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
