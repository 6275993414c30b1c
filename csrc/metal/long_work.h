// Long work is cut. A watchdog ends a command buffer that holds the GPU for seconds, and
// MLX commits its command buffers between nodes of the graph, never inside one: so what
// is long becomes several nodes, each with a range of the plan's items.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace paged_mlx::metal {

// Items [begin, end) of a plan, its kinds one after another. Who has the last item merges.
struct ItemRange {
  int begin = 0;
  int end = std::numeric_limits<int>::max();

  bool operator==(const ItemRange&) const = default;
};

// Multiply-adds after which a node ends and MLX commits.
double node_work();

// Another figure, for tests and measurements; 0: the usual one.
void set_node_work(double multiply_adds);

// What a range holds of node_work(), about. `dims`: head_dim + v_head_dim.
double share_of_node(const int32_t* plan, const ItemRange& range, int dims);

// The ranges that nodes attend, in this order: every one but the last holds at least
// node_work(), and at most an item more.
std::vector<ItemRange> cut_items(const int32_t* plan, int dims);

} // namespace paged_mlx::metal
