// What the launch code needs of a GPU: bind, dispatch, scratch memory. MLX's
// Metal encoder is one (mlx_encoder.h), a stand-in that runs the kernels on the
// host another (host_encoder.h).
#pragma once

#include <cstddef>

#include "metal/variant.h"

namespace paged_mlx::metal {

struct Size {
  size_t x = 1, y = 1, z = 1;
};

// An array that only the encoder knows how to bind; null: none.
using Buffer = const void*;

class Encoder {
 public:
  virtual ~Encoder() = default;

  // Threads that a threadgroup of this variant may have.
  virtual int max_threads(const Variant& variant) = 0;

  // The variant of the next dispatches. Bindings stay.
  virtual void set_variant(const Variant& variant) = 0;

  virtual void set_input(int index, Buffer buffer) = 0;
  virtual void set_output(int index, Buffer buffer) = 0;

  // The pages of a pool. A reader, too, orders itself before later writers.
  virtual void set_pages(int index, Buffer buffer) = 0;
  virtual void set_written_pages(int index, Buffer buffer) = 0;

  virtual void set_bytes(int index, const void* bytes, size_t size) = 0;

  template <typename T>
  void set_arguments(int index, const T& arguments) {
    set_bytes(index, &arguments, sizeof(T));
  }

  // Scratch memory that lives until the work is done.
  virtual Buffer temporary(size_t bytes) = 0;

  virtual void dispatch(Size groups, Size group) = 0;

  // Dispatches between the two write different elements of the same outputs
  // and may run at once.
  virtual void begin_concurrent() = 0;
  virtual void end_concurrent() = 0;

  // The next output counts for this share of what a command buffer may hold.
  virtual void add_work(double share) = 0;
};

} // namespace paged_mlx::metal
