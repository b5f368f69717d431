// The most common ops take their arguments as they are. To put a tensor on a stack and take it off
// again is two steps that each wait for the interpreter lock, where Python alone holds the tensor,
// and memory for the stack: a quarter of what an op costs.

#include "kernels.h"

#include <ATen/core/boxing/impl/boxing.h>
#include <ATen/ops/_log_softmax_backward_data_ops.h>
#include <ATen/ops/_log_softmax_ops.h>
#include <ATen/ops/_softmax_backward_data_ops.h>
#include <ATen/ops/_softmax_ops.h>
#include <ATen/ops/abs_ops.h>
#include <ATen/ops/add_ops.h>
#include <ATen/ops/addmm_ops.h>
#include <ATen/ops/baddbmm_ops.h>
#include <ATen/ops/bmm_ops.h>
#include <ATen/ops/clone_ops.h>
#include <ATen/ops/cos_ops.h>
#include <ATen/ops/div_ops.h>
#include <ATen/ops/exp_ops.h>
#include <ATen/ops/gelu_backward_ops.h>
#include <ATen/ops/gelu_ops.h>
#include <ATen/ops/log_ops.h>
#include <ATen/ops/maximum_ops.h>
#include <ATen/ops/mean_ops.h>
#include <ATen/ops/minimum_ops.h>
#include <ATen/ops/mm_ops.h>
#include <ATen/ops/mul_ops.h>
#include <ATen/ops/neg_ops.h>
#include <ATen/ops/pow_ops.h>
#include <ATen/ops/relu_ops.h>
#include <ATen/ops/rsqrt_ops.h>
#include <ATen/ops/sigmoid_backward_ops.h>
#include <ATen/ops/sigmoid_ops.h>
#include <ATen/ops/silu_ops.h>
#include <ATen/ops/sin_ops.h>
#include <ATen/ops/sqrt_ops.h>
#include <ATen/ops/sub_ops.h>
#include <ATen/ops/sum_ops.h>
#include <ATen/ops/tanh_backward_ops.h>
#include <ATen/ops/tanh_ops.h>
#include <ATen/ops/threshold_backward_ops.h>
#include <ATen/ops/where_ops.h>

#include <map>
#include <type_traits>

namespace gpuremote {

namespace {

// One argument, by its type.
struct Looker {
  const Kernel& kernel;
  Walk& walk;
  int argument = 0;

  bool operator()(const at::Tensor& tensor) {
    return look_at_tensor(tensor, argument++, walk);
  }
  bool operator()(c10::string_view text) {
    look_at_text({text.data(), text.size()}, walk);
    argument++;
    return true;
  }
  bool operator()(at::OptionalIntArrayRef list) {
    if (list.has_value())
      look_at_list(*list, walk);
    else
      look_at_nothing(walk);
    argument++;
    return true;
  }
  // Numbers and names of types: an IValue of one needs no memory.
  template <class T>
  bool operator()(const T& value) {
    const int at = argument++;
    return look_at(c10::IValue(value), kernel.kind(at), at, kernel.schema(), walk);
  }
};

template <class Schema>
class Direct;

template <class Result, class... Arguments>
class Direct<Result(Arguments...)> final : public c10::OperatorKernel {
 public:
  Direct(const c10::OperatorHandle& op, std::vector<int> kinds) : kernel_(op, std::move(kinds)) {}

  Result operator()(Arguments... arguments) {
    Walk walk;
    begin(walk);
    Looker looker{kernel_, walk};
    const bool known = (looker(arguments) && ...);
    const auto issued = known ? kernel_.issue(walk) : Kernel::Issued{};
    if (issued.plan != nullptr && issued.plan->single()) {
      Result made = Kernel::only(*issued.plan, issued.number);
      Kernel::settle(issued);
      return made;
    }
    torch::jit::Stack stack = c10::impl::boxArgs<Arguments...>(arguments...);
    if (issued.plan != nullptr) {
      kernel_.give(*issued.plan, issued.number, &stack);
      Kernel::settle(issued);
    } else {
      kernel_.go_to_python(&stack, known ? &walk : nullptr);
    }
    return std::move(stack.back()).to<Result>();
  }

 private:
  Kernel kernel_;
};

template <class Op>
void with(const c10::OperatorHandle& op, const std::vector<int>& kinds) {
  using Made = Direct<typename Op::schema>;
  // Never taken back, as little as the device is.
  new c10::RegistrationHandleRAII(c10::Dispatcher::singleton().registerImpl(
      op.operator_name(), c10::DispatchKey::PrivateUse1,
      c10::KernelFunction::makeFromUnboxedFunctor<false, Made>(std::make_unique<Made>(op, kinds)),
      c10::impl::CppSignature::make<typename Op::schema>(), nullptr, "gpuremote"));
}

using Register = void (*)(const c10::OperatorHandle&, const std::vector<int>&);

// All with one result that is a tensor, and without symbolic lengths: of those there is a second
// signature.
const std::map<std::string, Register> direct_ops = {
    {"_log_softmax", with<at::_ops::_log_softmax>},
    {"_log_softmax_backward_data", with<at::_ops::_log_softmax_backward_data>},
    {"_softmax", with<at::_ops::_softmax>},
    {"_softmax_backward_data", with<at::_ops::_softmax_backward_data>},
    {"abs", with<at::_ops::abs>},
    {"add.Scalar", with<at::_ops::add_Scalar>},
    {"add.Tensor", with<at::_ops::add_Tensor>},
    {"addmm", with<at::_ops::addmm>},
    {"baddbmm", with<at::_ops::baddbmm>},
    {"bmm", with<at::_ops::bmm>},
    {"clone", with<at::_ops::clone>},
    {"cos", with<at::_ops::cos>},
    {"div.Scalar", with<at::_ops::div_Scalar>},
    {"div.Tensor", with<at::_ops::div_Tensor>},
    {"exp", with<at::_ops::exp>},
    {"gelu", with<at::_ops::gelu>},
    {"gelu_backward", with<at::_ops::gelu_backward>},
    {"log", with<at::_ops::log>},
    {"maximum", with<at::_ops::maximum>},
    {"mean", with<at::_ops::mean>},
    {"mean.dim", with<at::_ops::mean_dim>},
    {"minimum", with<at::_ops::minimum>},
    {"mm", with<at::_ops::mm>},
    {"mul.Scalar", with<at::_ops::mul_Scalar>},
    {"mul.Tensor", with<at::_ops::mul_Tensor>},
    {"neg", with<at::_ops::neg>},
    {"pow.Tensor_Scalar", with<at::_ops::pow_Tensor_Scalar>},
    {"relu", with<at::_ops::relu>},
    {"rsqrt", with<at::_ops::rsqrt>},
    {"sigmoid", with<at::_ops::sigmoid>},
    {"sigmoid_backward", with<at::_ops::sigmoid_backward>},
    {"silu", with<at::_ops::silu>},
    {"sin", with<at::_ops::sin>},
    {"sqrt", with<at::_ops::sqrt>},
    {"sub.Scalar", with<at::_ops::sub_Scalar>},
    {"sub.Tensor", with<at::_ops::sub_Tensor>},
    {"sum", with<at::_ops::sum>},
    {"sum.dim_IntList", with<at::_ops::sum_dim_IntList>},
    {"tanh", with<at::_ops::tanh>},
    {"tanh_backward", with<at::_ops::tanh_backward>},
    {"threshold_backward", with<at::_ops::threshold_backward>},
    {"where.self", with<at::_ops::where_self>},
};

}  // namespace

bool register_direct(const std::string& name, const c10::OperatorHandle& op,
                     const std::vector<int>& kinds) {
  const auto found = direct_ops.find(name);
  if (found == direct_ops.end())
    return false;
  found->second(op, kinds);
  return true;
}

}  // namespace gpuremote
