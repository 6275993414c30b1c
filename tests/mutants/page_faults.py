"""Faults in the rooms of pages and prefixes: ``(name, find, replace, seen_by)`` by file."""

FAULTS = {
    "pages/append.py": [
        (
            "an append without memory for its open page keeps its pages",
            "reserve(part_filled + num_copies)\n    except BaseException:\n        allocator.free_pages(page_ids)\n",
            "reserve(part_filled + num_copies)\n    except BaseException:\n",
            "quantised_pool.an_append_whose_open_page_finds_no_memory_changes_nothing",
        ),
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
            "copy_pages(copies)\n    except BaseException:\n        allocator.free_pages(page_ids)\n        raise",
            "copy_pages(copies)\n    except BaseException:\n        raise",
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
        (
            "an append that runs out keeps the pages it has taken",
            "copy_pages(copies)\n    except BaseException:\n        allocator.free_pages(page_ids)\n        raise\n",
            "copy_pages(copies)\n    except BaseException:\n        raise\n",
            "page_table.append_whose_copy_fails_changes_nothing",
        ),
        (
            "a batch takes the pages for new tokens and then those for copies",
            "    page_ids = allocator.allocate_pages(len(rows) + num_new)\n"
            "    if page_ids is None and rows:\n",
            "    page_ids = allocator.allocate_pages(num_new) or []\n"
            "    page_ids += allocator.allocate_pages(len(rows)) or []\n"
            "    if page_ids is None and rows:\n",
            "page_table.a_batch_that_runs_out_of_pages_goes_on_when_there_are_some",
        ),
        (
            "the last of several forks copies its tail page too",
            "if allocator.counts[tail] - leaving.get(tail, 0) > 1:",
            "if allocator.counts[tail] > 1:",
            "page_table.append_batch_copies_for_every_fork_but_the_last_in_one_operation",
        ),
        (
            "one token is appended in place to a shared page",
            "        if allocator.counts[pages.ids[-1]] > 1:\n            return None\n",
            "",
            "copy_on_write.copy_on_write_of_forks_of_forks_copies_for_all_but_the_last",
        ),
        (
            "the old tail page is not given back after its copy",
            "        allocator.free_page(source)\n    return copies\n",
            "    return copies\n",
            "copy_on_write.copy_on_write_of_forks_of_forks_copies_for_all_but_the_last",
        ),
        (
            "new pages keep the version of the entries",
            "        pages.ids_version = new_version()\n",
            "",
            "block_table.a_decode_step_rewrites_only_rows_that_got_a_page",
        ),
        (
            "a sealed page makes no gap",
            "if pages.starts is None and first < old * size:",
            "if pages.starts is None and first < 0:",
            "page_table.a_sealed_tail_page_takes_no_more_tokens",
        ),
        (
            "the last page of an append has room for as many tokens as it took",
            "pages.room = room + len(new) * size - count",
            "pages.room = count - room",
            "page_table.append_fills_the_tail_page_before_it_takes_a_new_one",
        ),
        (
            "a run of slots begins a page too late",
            "            starts.append(page_id * size)\n",
            "            starts.append(page_id * size + size)\n",
            "page_table.append_fills_the_tail_page_before_it_takes_a_new_one",
        ),
        (
            "slots of several runs are int64",
            "    return (slots + np.arange(len(slots))).astype(np.int32, copy=False)\n",
            "    return slots + np.arange(len(slots))\n",
            "page_table.append_fills_the_tail_page_before_it_takes_a_new_one",
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
        (
            "adopted pages need not be as many as the tokens take",
            "        if len(page_ids) != count:\n",
            "        if len(page_ids) > count:\n",
            "page_table.adopting_pages_that_do_not_fit_is_an_error",
        ),
        (
            "a table that has tokens adopts pages",
            '        num_tokens = whole_number("adopt", "num_tokens", num_tokens)\n'
            "        if self.num_tokens:\n",
            '        num_tokens = whole_number("adopt", "num_tokens", num_tokens)\n'
            "        if False:\n",
            "page_table.adopting_pages_that_do_not_fit_is_an_error",
        ),
        (
            "a fork has no notes of the canary",
            "child.token_hash = None if self.token_hash is None else self.token_hash.fork()",
            "child.token_hash = None",
            "canary.forks_and_shared_prefixes_carry_the_tokens_noted_and_grow_alone",
        ),
        (
            "a fork has the notes of its table, the same object",
            "child.token_hash = None if self.token_hash is None else self.token_hash.fork()",
            "child.token_hash = self.token_hash",
            "canary.forks_and_shared_prefixes_carry_the_tokens_noted_and_grow_alone",
        ),
        (
            "a shared prefix has the notes of all tokens",
            "source_table.token_hash.fork(prefix_length)",
            "source_table.token_hash.fork()",
            "canary.forks_and_shared_prefixes_carry_the_tokens_noted_and_grow_alone",
        ),
        (
            "truncate leaves the notes of tokens that are gone",
            "            self.token_hash.truncate(length)\n",
            "            pass\n",
            "canary.forks_and_shared_prefixes_carry_the_tokens_noted_and_grow_alone",
        ),
        (
            "pages behind a window are shared by a prefix",
            "    if source.num_freed:\n",
            "    if False:\n",
            "page_table.share_prefix_refuses_what_it_cannot_do",
        ),
        (
            "copy_on_write forgets to give the old page back",
            "    pages.touch()\n    allocator.free_page(source)\n    return True\n",
            "    pages.touch()\n    return True\n",
            "copy_on_write.copy_on_write_copies_the_shared_page_of_a_position",
        ),
        (
            "copy_on_write keeps the version of the entries",
            "    pages.touch()\n    allocator.free_page(source)\n",
            "    allocator.free_page(source)\n",
            "block_table.a_row_is_rewritten_when_its_tail_page_was_copied",
        ),
        (
            "free_before keeps the version of the entries",
            "        pages.num_freed = end\n        pages.touch()\n",
            "        pages.num_freed = end\n",
            "block_table.an_updated_block_table_equals_a_fresh_one_after_any_change",
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
        (
            "rows of a block table are padded with page 0",
            "            target[count : self._lens[row]] = NO_PAGE\n",
            "            target[count : self._lens[row]] = 0\n",
            "block_table.an_updated_block_table_equals_a_fresh_one_after_any_change",
        ),
        (
            "the rest of a shrunken row stays",
            "        if count < self._lens[row]:\n",
            "        if False:\n",
            "block_table.an_updated_block_table_equals_a_fresh_one_after_any_change",
        ),
        (
            "a block table takes another batch for the last one",
            "        if self._last and self._last[0] == content:\n",
            "        if self._last and self._last[0][1:] == content[1:]:\n",
            "block_table.an_updated_block_table_equals_a_fresh_one_after_any_change",
        ),
    ],
    "pages/allocator.py": [
        (
            "pages that are freed together stay sealed",
            "            self.sealed.difference_update(freed)\n",
            "            pass\n",
            "quantised_pool.a_freed_page_is_unknown_again_and_its_slot_another_s",
        ),
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
        (
            "sizes are checked after the counts are allocated",
            '        self._check_slots(name, "total_pages * page_size", self.max_pages)\n'
            "        self.evictors = Evictors()\n",
            "        self.evictors = Evictors()\n"
            "        bytes(4 * total)\n"
            '        self._check_slots(name, "total_pages * page_size", self.max_pages)\n',
            "allocator.sizes_are_refused_before_anything_so_large_is_allocated",
        ),
        (
            "only the pages of now are checked for slots, not those to grow to",
            'self._check_slots(name, "total_pages * page_size", self.max_pages)',
            'self._check_slots(name, "total_pages * page_size", total)',
            "allocator.sizes_are_refused_before_anything_so_large_is_allocated",
        ),
        (
            "growth is not checked for slots",
            '        self._check_slots("grow", "num_pages, and those there are, times page_size", total)\n',
            "",
            "allocator.sizes_are_refused_before_anything_so_large_is_allocated",
        ),
        (
            "free_page says the opposite",
            "        return not left\n",
            "        return bool(left)\n",
            "allocator.free_page_says_whether_the_page_became_free",
        ),
        (
            "growth stays when on_evict raises",
            "            self.shrink(self.total_pages - before)\n            raise\n",
            "            raise\n",
            "allocator.an_on_evict_that_raises_changes_nothing",
        ),
        (
            "check counts a page that stands twice in a table twice",
            '            assert len(np.unique(ids)) == len(ids), f"{holder!r} holds a page twice"\n'
            "            held[ids] += 1\n",
            "            np.add.at(held, ids, 1)\n",
            "allocator.check_sees_a_page_that_stands_twice_in_a_table",
        ),
        (
            "a page may be given twice to a bulk call",
            "            if len(set(ids.tolist())) < len(ids):\n",
            "            if False:\n",
            "page_table.adopting_pages_that_do_not_fit_is_an_error",
        ),
        (
            "a bool is a page id",
            "        if type(page_id) is not int or not 0 <= page_id",
            "        if not 0 <= page_id",
            "odd_arguments.a_count_that_is_none_is_refused",
        ),
        (
            "a page held by an evictor is not told busy",
            "        if self._refs[page_id] == 2 and page_id in self.evictors.held:\n"
            "            self.evictors.busy((page_id,))\n",
            "",
            "allocator.using_a_cached_page_again_makes_it_the_youngest",
        ),
        (
            "a page held by an evictor is not told idle",
            "        elif left == 1 and page_id in self.evictors.held:\n"
            "            self.evictors.idle((page_id,))\n",
            "",
            "allocator.lru_allocator_evicts_cached_pages_oldest_first",
        ),
        (
            "freed pages are told to pools that did not ask",
            "            if pool.wants_freed:\n                pool.freed(page_ids)\n",
            "            pool.freed(page_ids)\n",
            "allocator.freed_pages_are_told_to_the_pools_that_ask_alone",
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
        (
            "a page that fills up loses its hits",
            "            place.hits = part.hits\n",
            "",
            "prefix_cache.a_page_keeps_its_hits_when_it_fills_up",
        ),
        (
            "a hit is not counted",
            "                page.hits += 1\n",
            "                pass\n",
            "prefix_cache.eviction_policies_choose_different_pages",
        ),
        (
            "a page has no priority",
            "        place.priority = priority\n",
            "",
            "prefix_cache.a_page_that_comes_back_has_the_priority_it_came_with",
        ),
        (
            "forgotten pages are not counted",
            "                self.stats.forgotten += 1\n",
            "                pass\n",
            "prefix_cache.statistics_say_how_pages_left",
        ),
        (
            "evicted pages are not counted",
            "        self.stats.evicted += evicted\n",
            "",
            "prefix_cache.statistics_say_how_pages_left",
        ),
        (
            "a cache forgets only the page and not what continues it",
            "                self._forget([*page.descendants(), page])\n",
            "                self._forget([page])\n",
            "prefix_cache.statistics_say_how_pages_left",
        ),
        (
            "a hit takes all tokens",
            "        found, behind, num_tokens = self._tree.find(packed[:-TOKEN_BYTES], packed_keys)\n",
            "        found, behind, num_tokens = self._tree.find(packed, packed_keys)\n",
            "prefix_cache.a_hit_leaves_at_least_one_token_to_compute",
        ),
    ],
    "pages/policies.py": [
        (
            "a page is freed before on_evict is called",
            "        if self._on_evict is not None:\n"
            "            for page_id in page_ids:\n"
            "                self._on_evict(page_id)\n"
            "        for page_id in page_ids:\n"
            "            self.uncache_page(page_id)\n",
            "        for page_id in page_ids:\n"
            "            self.uncache_page(page_id)\n"
            "        if self._on_evict is not None:\n"
            "            for page_id in page_ids:\n"
            "                self._on_evict(page_id)\n",
            "allocator.on_evict_runs_before_any_page_is_wiped",
        ),
        (
            "pages are evicted one by one, so that an error comes half-way",
            "        if self._on_evict is not None:\n"
            "            for page_id in page_ids:\n"
            "                self._on_evict(page_id)\n"
            "        for page_id in page_ids:\n"
            "            self.uncache_page(page_id)\n",
            "        for page_id in page_ids:\n"
            "            if self._on_evict is not None:\n"
            "                self._on_evict(page_id)\n"
            "            self.uncache_page(page_id)\n",
            "allocator.an_on_evict_that_raises_changes_nothing",
        ),
    ],
    "pages/page_map.py": [
        (
            "a sealed tail page has room",
            "            self.room = 0\n\n",
            "            pass\n\n",
            "quantised_pool.a_rewind_into_a_sealed_page_makes_the_table_ragged_and_quantises_nothing",
        ),
        (
            "a fork forgets that its tail page is sealed",
            "copy.num_freed, copy.room = self.num_tokens, self.num_freed, self.room",
            "copy.num_freed, copy.room = self.num_tokens, self.num_freed, self.page_size - self.tail_tokens",
            "page_table.a_fork_of_a_sealed_table_is_sealed",
        ),
        (
            "a fork forgets the window of its table",
            "copy.num_freed, copy.room = self.num_tokens, self.num_freed, self.room",
            "copy.num_freed, copy.room = self.num_tokens, 0, self.room",
            "page_table.a_fork_has_the_window_and_the_gaps_of_its_table_and_changes_alone",
        ),
        (
            "a fork has the starts of its table, the same list",
            "copy.starts = None if self.starts is None else self.starts[:]",
            "copy.starts = self.starts",
            "page_table.a_fork_has_the_window_and_the_gaps_of_its_table_and_changes_alone",
        ),
        (
            "a fork has the pages of its table, the same list",
            "copy.ids = self.ids[:]",
            "copy.ids = self.ids",
            "page_table.a_fork_of_a_sealed_table_is_sealed",
        ),
        (
            "a cut table takes tokens on a page that was given back",
            "self.room = 0 if kept == self.num_freed else self.page_size - self.tail_tokens",
            "self.room = self.page_size - self.tail_tokens",
            "page_table.truncating_to_a_part_filled_page_that_was_given_back_starts_a_new_page",
        ),
    ],
    "pages/token_hash.py": [
        (
            "forked hashes share their memory",
            "child._hashes, child._tokens = self._hashes.copy(), self._tokens.copy()",
            "child._hashes, child._tokens = self._hashes, self._tokens",
            "canary.forks_and_shared_prefixes_carry_the_tokens_noted_and_grow_alone",
        ),
    ],
    "pages/observers.py": [
        (
            "an evictor that was not added holds pages",
            "if not any(added is evictor for added in self._evictors):",
            "if False:",
            "allocator.evictors_are_asked_in_the_order_they_were_added",
        ),
    ],
    "pages/canary.py": [
        (
            "a canary forgets nothing of a freed page",
            "        self._notes[page_ids] = _NOTHING\n",
            "",
            "pool_canary.a_freed_page_that_was_handed_out_again_is_named_before_and_after_it_is_written",
        ),
        (
            "a canary does not follow copies",
            "        self._notes[targets] = self._notes[sources]\n",
            "",
            "canary.forks_and_shared_prefixes_carry_the_tokens_noted_and_grow_alone",
        ),
        (
            "a canary notes skipped tokens",
            "        written = slots >= 0\n",
            "        written = slots >= -9\n",
            "canary.a_token_that_was_skipped_is_seen",
        ),
        (
            "a canary does not look whether pages are held",
            "            if not self._allocator.counts[entry.physical_page_id]:\n",
            "            if False:\n",
            "canary.a_page_that_was_freed_under_its_table_is_seen",
        ),
    ],
    "prefix/tree.py": [
        (
            "a cached page is found by its tokens after another beginning",
            "return self.tokens == tokens and self.parent is parent and self.keys == keys",
            "return self.tokens == tokens and self.keys == keys",
            "prefix_cache.a_hash_collision_of_keys_alone_or_parents_alone_is_a_miss",
        ),
        (
            "a cached page is found whatever its keys",
            "return self.tokens == tokens and self.parent is parent and self.keys == keys",
            "return self.tokens == tokens and self.parent is parent",
            "prefix_cache.a_hash_collision_of_keys_alone_or_parents_alone_is_a_miss",
        ),
    ],
}
