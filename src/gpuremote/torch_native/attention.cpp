// Has torch ask for the kernel that attention takes, as it does for its own devices; the answer is
// Python's (gpuremote/torch/_attention.py). Without this it takes plain ops.

#include "tier.h"

#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_fused_sdp_choice.h>

namespace gpuremote {
namespace {

int64_t choose(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
               const std::optional<at::Tensor>& mask, double dropout, bool causal,
               std::optional<double> scale, bool grouped) {
  // While a graph is traced there is nobody to ask: tensors without memory.
  if (query.key_set().has(c10::DispatchKey::Python))
    return 0;  // plain ops
  return at::_fused_sdp_choice(query, key, value, mask, dropout, causal, scale, grouped);
}

}  // namespace

void register_attention() {
  at::native::_fused_sdp_choice_stub.set_privateuse1_dispatch_ptr(&choose);
}

}  // namespace gpuremote
