// K and V of a step's sequences for a model that may read them itself.
//
// What a model gets are two handles, arrays whose gather has not run. As long as
// it only passes them on to attention, which reads the pages, no gather runs. A
// handle reads the pages as they were before the step, and takes the step's own
// tokens from the model's K and V: so it is right whether or not they have been
// written, and need not be ordered with their write. What it must be ordered with
// are the writes of later steps: Fetch::settle.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "mlx/array.h"
#include "mlx/utils.h"

#include "ops/fetch_tables.h"
#include "ops/primitive.h"

namespace paged_mlx {

// A handle's node. Inputs: the pages of K or of V, `words`, and the new tokens.
// It lives as long as the handle can be evaluated, by whomever holds it: in
// Python, or as an input of another node.
class GatherHandle : public PagesPrimitive {
 public:
  GatherHandle(mx::Stream stream, std::shared_ptr<const FetchTables> tables,
               std::shared_ptr<std::atomic<bool>> has_read, mx::array pages,
               std::optional<mx::array> tokens)
      : PagesPrimitive(stream),
        tables_(std::move(tables)),
        has_read_(std::move(has_read)),
        pages_(std::move(pages)),
        tokens_(std::move(tokens)) {}

  bool is_row_contiguous(int) const override {
    return false; // it leaves columns out
  }
  const char* name() const override {
    return "GatherHandle";
  }

  // A new handle to the same.
  static mx::array make(const std::shared_ptr<GatherHandle>& node);

  // A gather in the place of this one: if it has run by the time this is
  // evaluated, this takes its result and reads no page.
  const mx::array& replace();

 protected:
  void eval(const Arrays& inputs, Arrays& outputs) override;

 private:
  bool take_replacement(mx::array& out) const;
  mx::array allocate(mx::array& out) const;
  auto launch(const Arrays& inputs) const;

  std::shared_ptr<const FetchTables> tables_;
  std::shared_ptr<std::atomic<bool>> has_read_;
  mx::array pages_;
  std::optional<mx::array> tokens_;
  std::optional<mx::array> replacement_;
};

// The two handles of a layer as the pages' owner keeps them.
class Fetch {
 public:
  // Whether a handle can still be evaluated.
  bool is_alive() const {
    return !k.expired() || !v.expired();
  }

  // Whether a handle has read the pages, or can still be evaluated.
  bool reads_pages() const {
    return *has_read || is_alive();
  }

  // The next versions of the pages, for later writes: they come after every read
  // of the handles that has begun, and after the gathers that replace those which
  // have not. The gathers run on the stream of the handles, so a handle that is
  // evaluated before its replacement has been read when a write begins.
  std::vector<mx::array> settle(const mx::array& k_pages, const mx::array& v_pages);

  std::weak_ptr<GatherHandle> k, v;
  std::shared_ptr<std::atomic<bool>> has_read;
  mx::Stream stream;
};

// The handles of a pool's layers since its last settling.
class Fetches {
 public:
  void add(int layer, Fetch fetch);

  // Whether a handle has read the pages, or can still be evaluated.
  bool read_pages() const;

  // Forgets all of them: what they read has been read, and they are never evaluated.
  void clear() {
    fetches_.clear();
  }

  // For each fetch that reads pages, calls settle_layer(layer, fetch); then
  // forgets all of them.
  template <typename SettleLayer>
  void settle(SettleLayer settle_layer) {
    for (auto& [layer, fetch] : fetches_) {
      if (fetch.reads_pages()) {
        settle_layer(layer, fetch);
      }
    }
    fetches_.clear();
  }

 private:
  std::vector<std::pair<int, Fetch>> fetches_;
  size_t limit_ = 64; // more than these: forget those that nobody can read
};

struct FetchedPages {
  mx::array k, v; // handles [batch, num_kv_heads, length - skip, dim]
  Fetch fetch;
};

// k and v [batch, num_kv_heads, num_tokens, dim], any strides; none if num_tokens
// is 0.
FetchedPages fetch_pages(const std::shared_ptr<const FetchTables>& tables, const mx::array& k_pages,
                         const mx::array& v_pages, const std::optional<mx::array>& k,
                         const std::optional<mx::array>& v, mx::StreamOrDevice s = {});

} // namespace paged_mlx
