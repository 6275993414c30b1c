"""Faults in the Python package: ``(name, find, replace, seen_by)`` by file. They need no build."""

from .mutant import Mutant

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
            "operations.write_pages(k, v, k_pages, v_pages, slots, stream=stream)",
            "operations.write_pages(v, k, k_pages, v_pages, slots, stream=stream)",
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
    "pages/append.py": [
        (
            "no page is copied before a write",
            "            if allocator.counts[tail] - leaving.get(tail, 0) > 1:\n",
            "            if False:\n",
            "table_corners.an_append_that_no_pool_can_copy_for_gives_all_pages_back",
        ),
        (
            "the last holder copies too",
            "            if allocator.counts[tail] - leaving.get(tail, 0) > 1:\n",
            "            if allocator.counts[tail] > 1:\n",
            "page_table.a_batch_that_runs_out_of_pages_goes_on_when_there_are_some",
        ),
        (
            "a decoded token goes to a shared page",
            "        if allocator.counts[pages.ids[-1]] > 1:\n",
            "        if allocator.counts[pages.ids[-1]] > 2:\n",
            "table_corners.an_append_to_two_forks_copies_the_shared_tail_once",
        ),
        (
            "slots of a part-filled page begin one late",
            "starts.append((pages.ids[-1] + 1) * size - room)",
            "starts.append((pages.ids[-1] + 1) * size - room + 1)",
            "table_corners.slots_follow_the_pages_after_cuts_and_appends",
        ),
        (
            "the source of a copy keeps its holder",
            "        allocator.free_page(source)\n    return copies",
            "    return copies",
            "table_corners.an_append_to_two_forks_copies_the_shared_tail_once",
        ),
        (
            "a failed copy keeps its pages",
            "        allocator.free_pages(page_ids)\n        raise",
            "        raise",
            "table_corners.an_append_that_no_pool_can_copy_for_gives_all_pages_back",
        ),
        (
            "room of the tail page is forgotten",
            "        missing = count - pages.room\n",
            "        missing = count\n",
            "table_corners.an_append_to_two_forks_copies_the_shared_tail_once",
        ),
        (
            "a table twice in a batch is taken",
            "    if len(set(map(id, maps))) < len(maps):\n        fail(",
            "    if False:\n        fail(",
            "table_corners.a_batch_that_names_a_table_twice_is_refused_and_unchanged",
        ),
        (
            "the version of the pages stays",
            "        maps[row].version = maps[row].ids_version = new_version()\n",
            "",
            "pool_plans.a_plan_follows_its_tables",
        ),
    ],
    "pages/table.py": [
        (
            "a fork holds no pages",
            "            self.map.allocator.share_pages(self.map.held)\n",
            "            pass\n",
            "table_corners.a_copy_on_write_moves_one_holder_and_the_last_holder_stays",
        ),
        (
            "pages before a window are given back one early",
            "first, end = pages.num_freed, pages.num_done_by(position)",
            "first, end = pages.num_freed, pages.num_done_by(position + 1)",
            "table_corners.pages_are_given_back_when_all_their_tokens_lie_before_a_position",
        ),
        (
            "a copy on write keeps the source",
            "    pages.touch()\n    allocator.free_page(source)\n    return True",
            "    pages.touch()\n    return True",
            "table_corners.a_copy_on_write_moves_one_holder_and_the_last_holder_stays",
        ),
        (
            "a copy on write is not seen by the block table",
            "    pages.ids[entry] = target\n    pages.touch()\n",
            "    pages.ids[entry] = target\n",
            "block_table.a_row_is_rewritten_when_its_tail_page_was_copied",
        ),
        (
            "the last holder copies",
            "    if allocator.counts[source] == 1:\n        return False\n",
            "",
            "table_corners.a_copy_on_write_moves_one_holder_and_the_last_holder_stays",
        ),
        (
            "a sealed prefix leaves the source open",
            "        if source.num_tokens == prefix_length:\n            source_table.seal()\n",
            "",
            "chapter.a_dict_of_page_blocks_gives_the_same_as_a_pool_layer",
        ),
        (
            "a shared prefix is one page short",
            "source.allocator.share_pages(prefix.ids)",
            "source.allocator.share_pages(prefix.ids[:-1])",
            "chapter.attention_over_the_picture_equals_contiguous_attention",
        ),
        (
            "pages cut off are kept",
            "self._give_back(pages.num_covering(length), len(pages.ids))",
            "pass",
            "table_corners.a_table_is_cut_to_no_more_tokens_than_it_has",
        ),
        (
            "a table longer than its tokens is cut",
            '        if length > pages.num_tokens:\n            must = f"length',
            '        if False:\n            must = f"length',
            "table_corners.a_table_is_cut_to_no_more_tokens_than_it_has",
        ),
    ],
    "pages/block_table.py": [
        (
            "a row that got shorter keeps its last pages",
            "target[count : self._lens[row]] = NO_PAGE",
            "pass",
            "table_corners.rows_of_a_block_table_are_those_of_the_tables_and_padding",
        ),
        (
            "a version is not part of what was packed",
            "content = versions, query_lens",
            "content = len(versions), query_lens",
            "table_corners.rows_of_a_block_table_are_those_of_the_tables_and_padding",
        ),
        (
            "query lengths are not part of what was packed",
            "content = versions, query_lens",
            "content = versions, None",
            "table_corners.a_block_table_packs_the_query_lengths_of_each_step",
        ),
        (
            "rows that changed are written at first only",
            "if row >= len(known) or known[row] != pages.ids_version:",
            "if row >= len(known):",
            "table_corners.rows_of_a_block_table_are_those_of_the_tables_and_padding",
        ),
        (
            "a query longer than its context is taken",
            "    if (lens > context_lens).any():\n",
            "    if False:\n",
            "table_corners.a_block_table_packs_the_query_lengths_of_each_step",
        ),
        (
            "lengths of ragged pages go on past the context",
            "lens = np.diff(starts, axis=1, append=context_lens[:, None])",
            "lens = np.diff(starts, axis=1, append=context_lens[:, None] + 1)",
            "table_corners.starts_and_lengths_of_a_sealed_table_cover_its_tokens_once",
        ),
    ],
    "pages/allocator.py": [
        (
            "a page taken is held by nobody",
            "        if page_id is not None:\n            self._refs[page_id] = 1\n",
            "",
            "allocator.buddy_allocator_gives_contiguous_aligned_runs",
        ),
        (
            "a freed page with holders is free",
            "        if not left:\n            self._put((page_id,))",
            "        if True:\n            self._put((page_id,))",
            "allocator.an_on_evict_that_raises_changes_nothing",
        ),
        (
            "a page is freed twice",
            '        page_id = self._held("free_page", page_id, DoubleFree)',
            '        page_id = self._known("free_page", page_id)',
            "allocator.freeing_a_free_page_is_a_double_free",
        ),
        (
            "an error of another kind",
            '        page_id = self._held("share_page", page_id, UseAfterFree)',
            '        page_id = self._held("share_page", page_id, DoubleFree)',
            "allocator.sharing_a_free_page_is_a_use_after_free",
        ),
        (
            "freed pages are told to no pool",
            "        if freed and self._wants_freed:\n            self._tell_freed(freed)\n",
            "",
            "carried_state.freed_pages_that_are_wiped_store_nothing",
        ),
        (
            "one page too many is taken",
            "        if num_pages > len(self._free):\n            return None\n",
            "        if num_pages > len(self._free) + 1:\n            return None\n",
            "allocator.a_pool_grows_in_slabs_up_to_its_limit_on_demand",
        ),
        (
            "a pool of too few pages is attached",
            "        if pool.num_pages < self.total_pages:\n",
            "        if False:\n",
            "allocator.attach_refuses_a_pool_that_does_not_fit",
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
    "prefix/cache.py": [
        (
            "a page in use is evicted",
            "return page.idle and (self._window is not None or not page.children)",
            "return self._window is not None or not page.children",
            "prefix_cache.a_hit_page_is_not_evicted_for_the_append_that_follows",
        ),
        (
            "a page with others behind it is evicted",
            "return page.idle and (self._window is not None or not page.children)",
            "return page.idle",
            "prefix_cache.the_last_holder_never_copies_even_if_eviction_made_it_so",
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
    for file, faults in _FAULTS.items()
    for name, find, replace, seen_by in faults
]
