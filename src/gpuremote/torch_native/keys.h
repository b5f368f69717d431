// What a call says: the key of its plan, and what differs from call to call.

#pragma once

#include "tier.h"

#include <ATen/core/function_schema.h>
#include <ATen/core/stack.h>

#include <string_view>

namespace gpuremote {

// As in gpuremote.torch._kernels.
enum Kind : int { TENSOR, TENSORS, NUMBER, NUMBERS, FIXED, EXACT, GENERATOR, DEVICE };

using Words = c10::SmallVector<uint64_t, 96>;

// A handle or number of a call. ``code`` as in client and server: Q, ?, q, d, and D for two of them.
struct Value {
  char code;
  int argument;
  uint64_t bits;
  double imaginary;
};

struct Walk {
  Words words;
  c10::SmallVector<Value, 12> values;
  Device* device = nullptr;
};

// The parts of a key, argument by argument, after what stands before all of them. False: only Python
// knows what to do with such a call.
void begin(Walk& walk);
bool look_at(const c10::IValue& value, int kind, int argument, const c10::FunctionSchema& schema,
             Walk& walk);
bool look_at_tensor(const at::Tensor& tensor, int argument, Walk& walk);
void look_at_text(std::string_view text, Walk& walk);
void look_at_list(at::IntArrayRef list, Walk& walk);
void look_at_nothing(Walk& walk);

// Look at the arguments of a call; whether it can be looked up at all. The others are for Python.
bool look(const c10::FunctionSchema& schema, const std::vector<int>& kinds, const torch::jit::Stack& stack,
          Walk& walk);

}  // namespace gpuremote
