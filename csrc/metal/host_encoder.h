// An encoder without a GPU: hands each dispatch, complete, to a function that
// runs the kernel's text on the host.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <vector>

#include "metal/encoder.h"

namespace paged_mlx::metal {

struct HostBuffer {
  void* address;
  size_t nbytes;
};

struct HostDispatch {
  Variant variant;
  std::map<int, HostBuffer> buffers;      // by index
  std::map<int, std::vector<char>> bytes; // by index
  Size groups, group;
};

// Runs a dispatch to its end. What it throws comes out of the launch.
using HostLaunch = std::function<void(const HostDispatch&)>;

class HostEncoder : public Encoder {
 public:
  // `limit`: threads of a threadgroup.
  explicit HostEncoder(HostLaunch launch, int limit = 1024);

  // Memory as something to bind, for as long as the encoder lives.
  Buffer buffer(const void* address, size_t nbytes);

  int max_threads(const Variant& variant) override;
  void set_variant(const Variant& variant) override;
  void set_input(int index, Buffer buffer) override;
  void set_output(int index, Buffer buffer) override;
  void set_pages(int index, Buffer buffer) override;
  void set_written_pages(int index, Buffer buffer) override;
  void set_bytes(int index, const void* bytes, size_t size) override;
  Buffer temporary(size_t bytes) override;
  void dispatch(Size groups, Size group) override;
  void begin_concurrent() override {}
  void end_concurrent() override {}
  void add_work(double) override {}

 private:
  void bind(int index, Buffer buffer);

  HostLaunch launch_;
  int limit_;
  HostDispatch next_;
  std::list<HostBuffer> buffers_;
  std::vector<std::unique_ptr<uint32_t[]>> temporaries_;
};

} // namespace paged_mlx::metal
