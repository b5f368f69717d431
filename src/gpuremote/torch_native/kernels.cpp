// Ops on remote tensors. The arguments of a call become a key: what does not change from call to
// call. A plan that is known by it says how the rest (handles and numbers) becomes a record, and
// what the op gives. Without one the kernel in Python runs: it is registered for KEY_OF_PYTHON,
// which no tensor has.

#include "kernels.h"

#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <cstring>
#include <map>
#include <set>

namespace gpuremote {

namespace {

constexpr auto KEY_OF_PYTHON = c10::DispatchKey::QuantizedPrivateUse1;

// Of kernels that live; never destroyed, as some of those live as long as the dispatcher.
auto& all_plans = *new std::set<Plans*>();
unsigned long long learnt;
std::set<std::string> mismatched;

thread_local Pending* pending = nullptr;

}  // namespace

Kernel::Kernel(const c10::OperatorHandle& op, std::vector<int> kinds)
    : op_(op), kinds_(std::move(kinds)) {
  all_plans.insert(&plans);
}

Kernel::~Kernel() {
  all_plans.erase(&plans);
}

void Kernel::operator()(const c10::OperatorHandle&, c10::DispatchKeySet, c10::Stack* stack) {
  Walk walk;
  if (!look(schema(), kinds_, *stack, walk)) {
    go_to_python(stack, nullptr);
    return;
  }
  const Issued issued = issue(walk);
  if (issued.plan == nullptr) {
    go_to_python(stack, &walk);
    return;
  }
  give(*issued.plan, issued.number, stack);
  settle(issued);
}

Kernel::Issued Kernel::issue(Walk& walk) {
  Issued issued;
  Interpreter lock;
  issued.device = walk.device != nullptr ? walk.device : device_at(current_device());
  walk.device = issued.device;
  walk.words.push_back(reinterpret_cast<uint64_t>(walk.device));
  Frames frames;
  note_frames(frames);
  try {
    open_tape(walk.device->tape);
  } catch (...) {
    forget_frames(frames);
    throw;
  }
  const auto found = plans.find(walk.words);
  if (found != plans.end()) {
    issued.plan = found->second;
    issued.number = write(*issued.plan, walk, frames);
    issued.due = is_due(walk.device->tape);
  } else {
    forget_frames(frames);
  }
  return issued;
}

void Kernel::settle(const Issued& issued) {
  if (issued.due) {
    Interpreter lock;
    send_due(issued.device->tape);
  }
}

void Kernel::go_to_python(c10::Stack* stack, const Walk* walk) {
  // Looked at now, as the arguments are no longer on the stack while Python runs.
  Pending here{this, walk, {}, pending};
  if (walk != nullptr)
    here.left_out = stripped(*stack);
  pending = &here;
  try {
    op_.callBoxedForDispatchKey(KEY_OF_PYTHON, *stack);
  } catch (...) {
    pending = here.outer;
    throw;
  }
  pending = here.outer;
}

// -- plan -> record and results -----------------------------------------------------------------

static size_t pack(const Plan& plan, const Walk& walk, char* to) {
  char* at = to;
  std::memcpy(at, &plan.id, 4);
  at += 4;
  for (size_t k = 0; k < walk.values.size(); k++) {
    if (!plan.taken[k])
      continue;
    const Value& value = walk.values[k];
    const size_t size = value.code == '?' ? 1 : 8;
    std::memcpy(at, &value.bits, size);
    at += size;
    if (value.code == 'D') {
      std::memcpy(at, &value.imaginary, 8);
      at += 8;
    }
  }
  return static_cast<size_t>(at - to);
}

uint64_t Kernel::write(const Plan& plan, const Walk& walk, Frames& frames) {
  c10::SmallVector<char, 256> record(4 + 16 * walk.values.size());
  const size_t size = pack(plan, walk, record.data());
  return append(plan.device->tape, plan.step, record.data(), size, frames);
}

at::Tensor Kernel::only(const Plan& plan, uint64_t number) {
  return make_tensor(make_storage(plan.device, number, plan.sizes[0], nullptr),
                     plan.forms[plan.returns[0].at]);
}

void Kernel::give(const Plan& plan, uint64_t number, c10::Stack* stack) const {
  const size_t count = kinds_.size();
  if (plan.single()) {
    auto made = only(plan, number);
    stack->erase(stack->end() - static_cast<std::ptrdiff_t>(count), stack->end());
    stack->emplace_back(std::move(made));
    return;
  }
  c10::SmallVector<c10::Storage, 8> storages;
  for (size_t k = 0; k < plan.sizes.size(); k++)
    storages.push_back(make_storage(plan.device, number + k, plan.sizes[k], nullptr));
  c10::SmallVector<at::Tensor, 8> fresh;
  for (size_t k = 0; k < plan.forms.size(); k++)
    fresh.push_back(plan.there[k] ? make_tensor(storages[plan.forms[k].storage], plan.forms[k])
                                  : at::Tensor());
  c10::SmallVector<c10::IValue, 8> results;
  const c10::IValue* arguments = stack->data() + (stack->size() - count);
  for (const Item& item : plan.returns) {
    if (item.kind == Item::NEW) {
      results.emplace_back(fresh[item.at]);
    } else if (item.kind == Item::GIVEN) {
      results.emplace_back(arguments[item.at]);
    } else {
      c10::List<at::Tensor> list;
      list.reserve(item.count);
      for (int k = 0; k < item.count; k++)
        list.push_back(fresh[item.at + k]);
      results.emplace_back(std::move(list));
    }
  }
  stack->erase(stack->end() - static_cast<std::ptrdiff_t>(count), stack->end());
  for (auto& result : results)
    stack->emplace_back(std::move(result));
}

// -- what Python found out ----------------------------------------------------------------------

// Arguments that Python is not given, as they are what they are by default: torch leaves out the
// last of those that go by position, and every one that goes by keyword.
std::vector<bool> Kernel::stripped(const c10::Stack& stack) const {
  const size_t count = kinds_.size();
  const c10::IValue* arguments = stack.data() + (stack.size() - count);
  std::vector<bool> found(count, false);
  bool last = true;
  for (size_t k = count; k-- > 0;) {
    const auto& argument = schema().arguments()[k];
    const bool usual =
        argument.default_value().has_value() && *argument.default_value() == arguments[k];
    if (argument.kwarg_only()) {
      found[k] = usual;
    } else {
      last = last && usual;
      found[k] = last;
    }
  }
  return found;
}

bool Kernel::learn(const Pending& call, std::shared_ptr<Plan> plan, const char* layout,
                   const char* record, Py_ssize_t size) {
  const Walk& walk = *call.walk;
  std::string codes = "<I";
  for (const Value& value : walk.values) {
    const bool takes = !call.left_out[value.argument];
    plan->taken.push_back(takes);
    if (takes)
      codes += value.code == 'D' ? std::string("dd") : std::string(1, value.code);
  }
  plan->device = walk.device;
  std::vector<char> packed(4 + 16 * walk.values.size());
  const size_t length = pack(*plan, walk, packed.data());
  // The two sides have to say the same, byte for byte; else these calls stay with Python.
  if (codes != layout || length != static_cast<size_t>(size)
      || std::memcmp(packed.data(), record, length) != 0) {
    mismatched.insert(schema().name() + " " + codes + " " + layout);
    return false;
  }
  learnt++;
  plans[walk.words] = std::move(plan);
  return true;
}

namespace {

// Views look at a tensor's layout only; the host's kernels do that for any device. Those that nearly
// every other view is made of are called as they are: to put a tensor on a stack takes the
// interpreter lock twice.
const std::map<std::string, torch::CppFunction (*)()> direct_views = {
    {"as_strided", [] { return torch::CppFunction(TORCH_FN(at::native::as_strided_tensorimpl)); }},
    {"view", [] { return torch::CppFunction(TORCH_FN(at::native::view)); }},
    {"_reshape_alias", [] { return torch::CppFunction(TORCH_FN(at::native::_reshape_alias)); }},
};

class View final : public c10::OperatorKernel {
 public:
  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, c10::Stack* stack) {
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
};

torch::Library* library;

bool parse_numbers(PyObject* list, std::vector<int>& found) {
  PyObject* items = PySequence_Fast(list, "a list of numbers");
  if (items == nullptr)
    return false;
  for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(items); k++)
    found.push_back(static_cast<int>(PyLong_AsLong(PySequence_Fast_GET_ITEM(items, k))));
  Py_DECREF(items);
  return !PyErr_Occurred();
}

// (storage, form) of a result, or None.
bool parse_fresh(PyObject* one, Plan& plan) {
  Form form{};
  plan.there.push_back(one != Py_None);
  if (one != Py_None) {
    int storage;
    PyObject* described;
    if (!PyArg_ParseTuple(one, "iO", &storage, &described) || !parse_form(described, form))
      return false;
    form.storage = storage;
    if (storage < 0)
      return false;
    if (plan.sizes.size() <= static_cast<size_t>(storage))
      plan.sizes.resize(storage + 1);
    plan.sizes[storage] = form.nbytes;
  }
  plan.forms.push_back(std::move(form));
  return true;
}

// ("new", k), ("list", first, count) or ("given", argument)
bool parse_returned(PyObject* one, Plan& plan) {
  const char* kind;
  int at, count = 0;
  if (!PyArg_ParseTuple(one, "si|i", &kind, &at, &count))
    return false;
  plan.returns.push_back(
      {*kind == 'n' ? Item::NEW : *kind == 'l' ? Item::LIST : Item::GIVEN, at, count});
  return true;
}

bool parse_each(PyObject* list, Plan& plan, bool (*parse)(PyObject*, Plan&)) {
  PyObject* items = PySequence_Fast(list, "a list");
  if (items == nullptr)
    return false;
  bool good = true;
  for (Py_ssize_t k = 0; good && k < PySequence_Fast_GET_SIZE(items); k++)
    good = parse(PySequence_Fast_GET_ITEM(items, k), plan);
  Py_DECREF(items);
  return good;
}

}  // namespace

// register_kernels(kinds, views): kinds of the arguments of each op by its name, and the views.
PyObject* register_kernels(PyObject*, PyObject* arguments) {
  PyObject *kinds, *views;
  if (!PyArg_ParseTuple(arguments, "O!O", &PyDict_Type, &kinds, &views))
    return nullptr;
  try {
    library = new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1,
                                 __FILE__, __LINE__);
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (PyDict_Next(kinds, &position, &key, &value)) {
      const std::string name = PyUnicode_AsUTF8(key);
      const size_t dot = name.find('.');
      const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(
          ("aten::" + name.substr(0, dot)).c_str(), dot == std::string::npos ? "" : name.substr(dot + 1).c_str());
      std::vector<int> found;
      if (!parse_numbers(value, found))
        return nullptr;
      if (!register_direct(name, op, found))
        library->impl(name.c_str(), torch::CppFunction::makeFromBoxedFunctor(
                                        std::make_unique<Kernel>(op, std::move(found))));
    }
    PyObject* names = PySequence_Fast(views, "names of views");
    if (names == nullptr)
      return nullptr;
    for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(names); k++) {
      const char* name = PyUnicode_AsUTF8(PySequence_Fast_GET_ITEM(names, k));
      const auto direct = direct_views.find(name);
      library->impl(name, direct != direct_views.end()
                              ? direct->second()
                              : torch::CppFunction::makeFromBoxedFunctor(std::make_unique<View>()));
    }
    Py_DECREF(names);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

// learn(id, layout, record, step, fresh, returns, sizes): of the call that is pending in this
// thread; whether it is known from now on.
PyObject* learn(PyObject*, PyObject* arguments) {
  unsigned int id, step;
  const char *layout, *record;
  Py_ssize_t size;
  PyObject *fresh, *returns, *sizes;
  if (!PyArg_ParseTuple(arguments, "Isy#IOOO", &id, &layout, &record, &size, &step, &fresh,
                        &returns, &sizes))
    return nullptr;
  if (pending == nullptr || pending->walk == nullptr)
    Py_RETURN_FALSE;
  auto plan = std::make_shared<Plan>();
  plan->id = id;
  plan->step = step;
  std::vector<int> none;
  if (!parse_each(fresh, *plan, parse_fresh) || !parse_each(returns, *plan, parse_returned))
    return nullptr;
  plan->sizes.resize(PySequence_Size(sizes));
  for (size_t k = 0; k < plan->sizes.size(); k++) {
    PyObject* nbytes = PySequence_GetItem(sizes, static_cast<Py_ssize_t>(k));
    if (nbytes == nullptr)
      return nullptr;
    plan->sizes[k] = PyLong_AsSize_t(nbytes);
    Py_DECREF(nbytes);
  }
  if (PyErr_Occurred())
    return nullptr;
  return PyBool_FromLong(pending->kernel->learn(*pending, std::move(plan), layout, record, size));
}

// forget_plans(): the sessions have.
PyObject* forget_plans(PyObject*, PyObject*) {
  for (Plans* plans : all_plans)
    plans->clear();
  Py_RETURN_NONE;
}

// counts(): plans learnt, and the ops of which the two sides would write a call differently, with
// what each would write.
PyObject* counts(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  if (names == nullptr)
    return nullptr;
  for (const std::string& name : mismatched) {
    PyObject* text = PyUnicode_FromString(name.c_str());
    const bool good = text != nullptr && PyList_Append(names, text) == 0;
    Py_XDECREF(text);
    if (!good) {
      Py_DECREF(names);
      return nullptr;
    }
  }
  return Py_BuildValue("KN", learnt, names);
}

}  // namespace gpuremote
