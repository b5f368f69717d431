// An op on remote tensors: plans of its calls, and what becomes of a call.

#pragma once

#include "keys.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <memory>
#include <unordered_map>

namespace gpuremote {

struct Item {
  enum { NEW, LIST, GIVEN } kind;
  int at, count;
};

struct Plan {
  // Whether it gives one tensor, in a storage of its own.
  bool single() const {
    return sizes.size() == 1 && returns.size() == 1 && returns[0].kind == Item::NEW;
  }

  Device* device;
  uint32_t id, step;
  std::vector<char> taken;       // for each value: whether the record has it
  std::vector<size_t> sizes;     // bytes of each storage that it makes
  std::vector<bool> there;       // for each result: whether it is a tensor
  std::vector<Form> forms;
  std::vector<Item> returns;
};

struct WordsHash {
  size_t operator()(const Words& words) const {
    uint64_t h = words.size();
    for (uint64_t word : words) {
      h = (h ^ word) * 0x9E3779B97F4A7C15ull;
      h ^= h >> 29;
    }
    return h;
  }
};

// Of one op. With the interpreter lock.
using Plans = std::unordered_map<Words, std::shared_ptr<Plan>, WordsHash>;
class Kernel;

// The call that has gone to Python: what it learns is for this one. Innermost of this thread.
struct Pending {
  Kernel* kernel;
  const Walk* walk;
  std::vector<bool> left_out;
  Pending* outer;
};
class Kernel final : public c10::OperatorKernel {
 public:
  Kernel(const c10::OperatorHandle& op, std::vector<int> kinds);
  ~Kernel() override;

  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, c10::Stack* stack);

  // A call whose record has been written; without a plan Python has to be asked.
  struct Issued {
    std::shared_ptr<Plan> plan;
    uint64_t number = 0;
    Device* device = nullptr;
    bool due = false;
  };
  Issued issue(Walk& walk);
  // After its results are in place.
  static void settle(const Issued& issued);
  // Replace the arguments on a stack by the results.
  void give(const Plan& plan, uint64_t number, c10::Stack* stack) const;
  // The one result, of a plan with one.
  static at::Tensor only(const Plan& plan, uint64_t number);
  // ``walk``: what is to be learnt of the call, if it could be looked at.
  void go_to_python(c10::Stack* stack, const Walk* walk);

  // What Python found out of the call that is pending.
  bool learn(const Pending& call, std::shared_ptr<Plan> plan, const char* layout,
             const char* record, Py_ssize_t size);

  int kind(int argument) const { return kinds_[argument]; }
  const c10::FunctionSchema& schema() const { return op_.schema(); }
  Plans plans;

 private:
  static uint64_t write(const Plan& plan, const Walk& walk, Frames& frames);
  std::vector<bool> stripped(const c10::Stack& stack) const;

  const c10::OperatorHandle op_;
  const std::vector<int> kinds_;
};

// A kernel that takes its arguments as they are, if there is one for the op; see direct.cpp.
bool register_direct(const std::string& name, const c10::OperatorHandle& op,
                     const std::vector<int>& kinds);

}  // namespace gpuremote
