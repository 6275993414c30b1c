// MLX's Metal encoder as an Encoder. Buffers are `const mlx::core::array*`.
#pragma once

#ifdef _METAL_

#include <list>
#include <memory>

#include "mlx/array.h"
#include "mlx/backend/metal/device.h"

#include "metal/encoder.h"

namespace paged_mlx::metal {

namespace mx = mlx::core;

class MlxEncoder : public Encoder {
 public:
  explicit MlxEncoder(mx::Stream stream);
  ~MlxEncoder() override;

  int max_threads(const Variant& variant) override;
  void set_variant(const Variant& variant) override;
  void set_input(int index, Buffer buffer) override;
  void set_output(int index, Buffer buffer) override;
  void set_pages(int index, Buffer buffer) override;
  void set_written_pages(int index, Buffer buffer) override;
  void set_bytes(int index, const void* bytes, size_t size) override;
  Buffer temporary(size_t bytes) override;
  void dispatch(Size groups, Size group) override;
  void begin_concurrent() override;
  void end_concurrent() override;
  void add_work(double share) override;

 private:
  MTL::ComputePipelineState* pipeline(const Variant& variant);
  MTL::ComputePipelineState* make_pipeline(const Variant& variant);

  struct Concurrent;

  mx::metal::Device& device_;
  mx::metal::CommandEncoder& encoder_;
  std::unique_ptr<Concurrent> concurrent_;
  std::list<mx::array> temporaries_;
  size_t added_elements_ = 0; // of the next output
};

} // namespace paged_mlx::metal

#endif
