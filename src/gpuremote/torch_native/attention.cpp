// Has torch ask for the kernel that attention takes, as it does for its own devices. For a server's
// processors this host's torch chooses, as it would for its own; of others Python asks the server
// (gpuremote/torch/_attention.py). Without this torch takes plain ops.

#include "tier.h"

#include <ATen/EmptyTensor.h>
#include <torch/version.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_fused_sdp_choice_native.h>

namespace gpuremote {
namespace {

constexpr int64_t PLAIN = 0;
constexpr bool DOUBLES_DIFFER = TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13;

// A tensor of this host in which torch sees the same when it chooses a kernel for processors: shape,
// dtype and whether the last dimension lies together. Of one row.
at::Tensor same_here(const at::Tensor& tensor) {
  c10::SmallVector<int64_t, 5> strides(tensor.dim(), 0);
  if (!strides.empty())
    strides.back() = std::min<int64_t>(2, tensor.stride(-1));
  return at::Tensor(at::detail::empty_strided_cpu(tensor.sizes(), strides, tensor.scalar_type()));
}

// Whether its shape is left open, in a graph for any.
bool is_open(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}

int64_t choose(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
               const std::optional<at::Tensor>& mask, double dropout, bool causal,
               std::optional<double> scale, bool grouped) {
  const bool traced = query.key_set().has(c10::DispatchKey::Python);  // without memory
  const bool masked = mask.has_value() && mask->defined();
  const Device* device = opened_device(query.device().index());
  if (device == nullptr || !device->processor) {
    if (traced)
      return PLAIN;  // there is nobody to ask
    return at::_fused_sdp_choice(query, key, value, mask, dropout, causal, scale, grouped);
  }
  // Its rule for the sums of doubles is wrong.
  if (DOUBLES_DIFFER && query.scalar_type() == at::kDouble)
    return PLAIN;
  if (is_open(query) || is_open(key) || is_open(value) || (masked && is_open(*mask)))
    return PLAIN;
  std::optional<at::Tensor> mask_here;
  if (masked) {
    mask_here = same_here(*mask);
    mask_here->set_requires_grad(mask->requires_grad());  // the only one of which it asks that
  }
  // Not by the dispatcher: while a graph is traced it would see to that call as well.
  return at::native::_fused_sdp_choice_cpp(same_here(query), same_here(key), same_here(value),
                                           mask_here, dropout, causal, scale, grouped);
}

}  // namespace

void register_attention() {
  at::native::_fused_sdp_choice_stub.set_privateuse1_dispatch_ptr(&choose);
}

}  // namespace gpuremote
