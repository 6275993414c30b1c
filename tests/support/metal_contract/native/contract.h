// The stand-in as its module sees it.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "mlx/backend/metal/device.h"

namespace metal_contract {

struct Limits {
  int ops = 40;       // dispatches of a command buffer, after which MLX commits
  int megabytes = 40; // 2^20 elements, likewise
  int threads = 1024; // of a threadgroup, whatever the pipeline
};

void set_limits(const Limits& limits);

// What broke the contract so far; forgotten then.
std::vector<std::string> take_errors();
void report(const std::string& error);

// Ends all command encoders and commits all command buffers. For each encoder those that it
// waits for.
std::map<int, std::vector<int>> finish();

// Whether everything that a dispatch binds is still there; reported where it is not.
bool is_alive(const Dispatch& dispatch, std::vector<Memory>& held);

} // namespace metal_contract
