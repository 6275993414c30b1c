// What is asked of attention beside its arrays: the one list of options, handed down whole
// from an operation to the kernels.
//
// Plain data: included by translation units for different instruction sets.
#pragma once

namespace paged_mlx {

// boolean: uint8, 0 hides the key. additive: float32, added to the score after scale,
// softcap and ALiBi; -inf hides the key.
enum class MaskKind { none, boolean, additive };

struct AttentionOptions {
  float scale = 1;
  float softcap = 0;  // 0: none; score = softcap * tanh(score / softcap)
  bool alibi = false; // adds slope * (key - query position)
  bool sinks = false; // per query head a logit that takes weight and gives no value
  MaskKind mask = MaskKind::none;

  // Whether a score is scale * q.k and nothing else.
  bool is_plain() const {
    return softcap == 0 && !alibi && mask == MaskKind::none;
  }

  bool operator==(const AttentionOptions&) const = default;
};

} // namespace paged_mlx
