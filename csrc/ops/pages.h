// Operations that move pages: write, copy, gather.
#pragma once

#include <optional>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

#include "ops/route.h"

namespace paged_mlx {

// k [tokens, num_kv_heads, head_dim] and v [tokens, num_kv_heads, v_head_dim]
// go to slots (int32 [tokens]; -1 skips) of k_pages and v_pages. Returns the
// next versions of the pages.
std::vector<mx::array> write_pages(
    const mx::array& k,
    const mx::array& v,
    const mx::array& k_pages,
    const mx::array& v_pages,
    const mx::array& slots,
    WriteMode mode,
    mx::StreamOrDevice s = {});

// Page pairs[i, 0] of every array goes to page pairs[i, 1]. pairs: int32 [n,
// 2]; no page is both a source and a target, none a target twice. Returns the
// next versions of the arrays.
std::vector<mx::array> copy_pages(
    const std::vector<mx::array>& pools,
    const mx::array& pairs,
    WriteMode mode,
    mx::StreamOrDevice s = {});

// K and V of each sequence, contiguous: {k [batch, num_kv_heads, length,
// head_dim], v, k_pages', v_pages'}. Row j of a sequence is position j; rows
// past its context and rows of NO_PAGE are 0. With page_starts and page_lens
// (int32 [batch, max_pages]) the table is ragged.
std::vector<mx::array> gather_pages(
    const mx::array& k_pages,
    const mx::array& v_pages,
    const mx::array& block_tables,
    const mx::array& context_lens,
    int length,
    const std::optional<mx::array>& page_starts,
    const std::optional<mx::array>& page_lens,
    mx::StreamOrDevice s = {});

class WritePages : public mx::Primitive {
 public:
  WritePages(mx::Stream stream, WriteMode mode) : mx::Primitive(stream), mode_(mode) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  bool is_equivalent(const mx::Primitive& other) const override {
    return mode_ == static_cast<const WritePages&>(other).mode_;
  }
  const char* name() const override {
    return "WritePages";
  }

 private:
  WriteMode mode_;
};

class CopyPages : public mx::Primitive {
 public:
  CopyPages(mx::Stream stream, WriteMode mode) : mx::Primitive(stream), mode_(mode) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  bool is_equivalent(const mx::Primitive& other) const override {
    return mode_ == static_cast<const CopyPages&>(other).mode_;
  }
  const char* name() const override {
    return "CopyPages";
  }

 private:
  WriteMode mode_;
};

class GatherPages : public mx::Primitive {
 public:
  GatherPages(mx::Stream stream, int length) : mx::Primitive(stream), length_(length) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  bool is_equivalent(const mx::Primitive& other) const override {
    return length_ == static_cast<const GatherPages&>(other).length_;
  }
  const char* name() const override {
    return "GatherPages";
  }

 private:
  void allocate(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) const;

  int length_;
};

} // namespace paged_mlx
