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
#include "mlx/primitives.h"
#include "mlx/utils.h"

#include "ops/token_rows.h"

namespace paged_mlx {

namespace mx = mlx::core;

// Where the K and V of a step's sequences lie: the same for all layers.
struct FetchTables {
  int batch, max_pages, num_tokens; // num_tokens: of a row, padding included; 0: all are in pages
  int length;                       // columns of the gather
  int skip;                         // columns at its front that handles leave out
  bool ragged;                      // pages are not one after the other from column 0

  // int32: block_tables [batch, max_pages], context_lens [batch], slots [batch *
  // num_tokens], and if ragged page_starts and page_lens [batch, max_pages].
  // context_lens: the column behind the last token that the pages hold. slots:
  // where the new tokens go in the gather, seen as `batch` pages of `length` slots.
  // page_starts: the column of each page's first token.
  mx::array words;

  // Positions in `words`.
  int context_lens() const {
    return batch * max_pages;
  }
  int slots() const {
    return context_lens() + batch;
  }
  int page_starts() const {
    return slots() + batch * num_tokens;
  }
  int page_lens() const {
    return page_starts() + batch * max_pages;
  }
  int num_words() const {
    return ragged ? page_lens() + batch * max_pages : page_starts();
  }
};

// A handle's node. Inputs: the pages of K or of V, `words`, and the new tokens.
// It lives as long as the handle can be evaluated, by whomever holds it: in
// Python, or as an input of another node.
class GatherHandle : public mx::Primitive {
 public:
  GatherHandle(
      mx::Stream stream,
      std::shared_ptr<const FetchTables> tables,
      std::shared_ptr<std::atomic<bool>> has_read,
      mx::array pages,
      std::optional<mx::array> tokens)
      : mx::Primitive(stream),
        tables_(std::move(tables)),
        has_read_(std::move(has_read)),
        pages_(std::move(pages)),
        tokens_(std::move(tokens)) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  const char* name() const override {
    return "GatherHandle";
  }

  // A new handle to the same.
  static mx::array make(const std::shared_ptr<GatherHandle>& node);

  // A gather in the place of this one: if it has run by the time this is
  // evaluated, this takes its result and reads no page.
  const mx::array& replace();

 private:
  bool take_replacement(mx::array& out) const;
  mx::array allocate(mx::array& out) const;
  auto launch(const std::vector<mx::array>& inputs) const;

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

  // Whether a handle can still be evaluated.
  bool are_alive() const;

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
FetchedPages fetch_pages(
    const std::shared_ptr<const FetchTables>& tables,
    const mx::array& k_pages,
    const mx::array& v_pages,
    const std::optional<mx::array>& k,
    const std::optional<mx::array>& v,
    mx::StreamOrDevice s = {});

// Its outputs are its first two inputs, once all inputs have been computed.
class After : public mx::Primitive {
 public:
  explicit After(mx::Stream stream) : mx::Primitive(stream) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    eval_cpu(inputs, outputs);
  }
  const char* name() const override {
    return "After";
  }
};

} // namespace paged_mlx
