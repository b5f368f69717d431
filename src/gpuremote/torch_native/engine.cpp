// Threads for gradients: torch's engine starts one for each device it knows of when it is used
// first, and never again. Sessions may open later, to more devices.

#include "tier.h"

#include <torch/csrc/autograd/engine.h>

#include <thread>

namespace gpuremote {

namespace {

// What Engine lets its subclasses see.
struct Access : torch::autograd::Engine {
  static auto& queues(torch::autograd::Engine& engine) {
    return engine.*(&Access::device_ready_queues_);
  }
};

}  // namespace

void start_threads(size_t count) {
  auto& engine = torch::autograd::Engine::get_default_engine();
  engine.initialize_device_threads_pool();
  auto& queues = Access::queues(engine);
  // Nobody else looks at these: a backward of the host's does not, and none of a remote device's
  // can run before its session is open.
  while (queues.size() < count) {
    auto queue = std::make_shared<torch::autograd::ReadyQueue>();
    const auto index = static_cast<int>(queues.size());
    queues.push_back(queue);
    std::thread([&engine, index, queue] { engine.thread_init(index, queue, true); }).detach();
  }
}

}  // namespace gpuremote
