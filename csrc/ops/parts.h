// Attention whose work is long is a chain of nodes, each with a part of the plan's items:
// see metal/long_work.h. A node takes the pages as the one before it left them, and its
// other outputs too, in the place of memory of its own: so the nodes run one after another
// and the last one's outputs are those of the whole.
#pragma once

#include <vector>

#include "mlx/array.h"

#include "metal/long_work.h"

namespace paged_mlx {

namespace mx = mlx::core;

struct Part {
  metal::ItemRange items;
  int num_partials = 0; // of the plan, where nodes hand its partial results on; else 0

  bool is_first() const {
    return items.begin == 0;
  }
  bool is_last() const {
    return items.end == metal::ItemRange().end;
  }
  bool operator==(const Part&) const = default;
};

// The parts of a plan: one, unless kernels run it and its work is long. A plan that is
// known only when it is evaluated, in mx.compile, is one part. `dims`: head_dim + v_head_dim.
std::vector<Part> parts_of(const mx::array& plan, int dims, mx::Stream s);

// Shapes of the partial results that a part hands on, out and state; none where it does not.
std::vector<mx::Shape> partial_shapes(const Part& part, int num_q_heads, int v_head_dim);

// Which inputs and outputs of a node are a layer's pages: inputs 1, 2, ..., and outputs `next`,
// `next` + 1, ..., their next versions.
struct PagesAt {
  size_t next, count;

  bool has(size_t output) const {
    return output - next < count;
  }
};

// A chain of nodes. Outputs of a node that are no pages are the last inputs of the one after it.
// make(part, inputs) makes a node's outputs.
template <typename Make>
std::vector<mx::array> chain(const std::vector<Part>& parts, const std::vector<mx::array>& inputs,
                             PagesAt pages, Make make) {
  std::vector<mx::array> made = make(parts.front(), inputs);
  for (size_t p = 1; p < parts.size(); p++) {
    std::vector<mx::array> handed_on = inputs;
    for (size_t i = 0; i < made.size(); i++) {
      if (pages.has(i)) {
        handed_on[1 + i - pages.next] = made[i];
      } else {
        handed_on.push_back(made[i]);
      }
    }
    made = make(parts[p], std::move(handed_on));
  }
  return made;
}

// Gives a node's outputs their memory, but for the pages: that of its last inputs, or the
// memory that allocate(output) gives its outputs where it is the first.
template <typename Allocate>
void take_memory(const Part& part, const std::vector<mx::array>& inputs,
                 std::vector<mx::array>& outputs, PagesAt pages, Allocate allocate) {
  size_t from = inputs.size() - (outputs.size() - pages.count);
  for (size_t i = 0; i < outputs.size(); i++) {
    if (pages.has(i)) {
      outputs[i].copy_shared_buffer(inputs[1 + i - pages.next]);
    } else if (part.is_first()) {
      allocate(outputs[i]);
    } else {
      outputs[i].copy_shared_buffer(inputs[from++]);
    }
  }
}

} // namespace paged_mlx
