// Ops on remote tensors. The arguments of a call become a key: what does not change from call to
// call. A plan that is known by it says how the rest (handles and numbers) becomes a record, and
// what the op gives. Without one the kernel in Python runs: it is registered for KEY_OF_PYTHON,
// which no tensor has.

#include "tier.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cstring>
#include <set>
#include <unordered_map>

namespace gpuremote {

namespace {

constexpr auto KEY_OF_PYTHON = c10::DispatchKey::QuantizedPrivateUse1;

// As in gpuremote.torch._kernels.
enum Kind : int { TENSOR, TENSORS, NUMBER, NUMBERS, FIXED, EXACT, GENERATOR, DEVICE };

// First words of parts of a key.
enum Tag : uint64_t {
  NONE = 1, REMOTE, HOST, LIST, BOOL, INT, DOUBLE, COMPLEX, STRING, DEFAULT, PLACE, DRAWS
};

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

struct Item {
  enum { NEW, LIST, GIVEN } kind;
  int at, count;
};

struct Plan {
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
std::vector<Plans*> all_plans;
unsigned long long learnt;
std::set<std::string> mismatched;

class Kernel;

// The call that has gone to Python: what it learns is for this one. Innermost of this thread.
struct Pending {
  Kernel* kernel;
  const Walk* walk;
  std::vector<bool> left_out;
  Pending* outer;
};
thread_local Pending* pending = nullptr;

class Kernel final : public c10::OperatorKernel {
 public:
  Kernel(const c10::OperatorHandle& op, std::vector<int> kinds)
      : schema_(op.schema()), kinds_(std::move(kinds)) {
    all_plans.push_back(&plans);
  }

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, c10::Stack* stack) {
    Walk walk;
    if (!look(*stack, walk)) {
      go_to_python(op, stack, nullptr);
      return;
    }
    std::shared_ptr<Plan> plan;
    uint64_t number = 0;
    bool due = false;
    {
      Interpreter lock;
      Device* device = walk.device != nullptr ? walk.device : device_at(current_device());
      walk.device = device;
      walk.words.push_back(reinterpret_cast<uint64_t>(device));
      Frames frames;
      note_frames(frames);
      try {
        open_tape(device->tape);
      } catch (...) {
        forget_frames(frames);
        throw;
      }
      auto found = plans.find(walk.words);
      if (found != plans.end()) {
        plan = found->second;
        number = write(*plan, walk, frames);
        due = is_due(device->tape);
      } else {
        forget_frames(frames);
      }
    }
    if (plan == nullptr) {
      go_to_python(op, stack, &walk);
      return;
    }
    give(*plan, number, stack);
    if (due) {
      Interpreter lock;
      send_due(walk.device->tape);
    }
  }

  // What Python found out of the call that is pending.
  bool learn(const Pending& call, std::shared_ptr<Plan> plan, const char* layout,
             const char* record, Py_ssize_t size);

  Plans plans;
  const c10::FunctionSchema& schema() const { return schema_; }

 private:
  void go_to_python(const c10::OperatorHandle& op, c10::Stack* stack, Walk* walk) {
    // Looked at now, as the arguments are no longer on the stack while Python runs.
    Pending here{this, walk, {}, pending};
    if (walk != nullptr)
      here.left_out = stripped(*stack);
    pending = &here;
    try {
      op.callBoxedForDispatchKey(KEY_OF_PYTHON, *stack);
    } catch (...) {
      pending = here.outer;
      throw;
    }
    pending = here.outer;
  }

  bool look(const c10::Stack& stack, Walk& walk) const;
  bool look_at_tensor(const at::Tensor& tensor, int argument, Walk& walk) const;
  bool look_at_fixed(const c10::IValue& value, Walk& walk) const;
  bool look_at_number(const c10::IValue& value, int argument, Walk& walk) const;
  static uint64_t write(const Plan& plan, const Walk& walk, Frames& frames);
  void give(const Plan& plan, uint64_t number, c10::Stack* stack) const;
  std::vector<bool> stripped(const c10::Stack& stack) const;

  const c10::FunctionSchema& schema_;
  const std::vector<int> kinds_;
};

uint64_t bits_of(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// -- arguments -> key ---------------------------------------------------------------------------

// Whether the call can be looked up at all; the others are for Python.
bool Kernel::look(const c10::Stack& stack, Walk& walk) const {
  const size_t count = kinds_.size();
  const c10::IValue* arguments = stack.data() + (stack.size() - count);
  for (size_t k = 0; k < count; k++) {
    const c10::IValue& value = arguments[k];
    const int argument = static_cast<int>(k);
    switch (kinds_[k]) {
      case TENSOR:
        if (value.isNone())
          walk.words.push_back(NONE);
        else if (!value.isTensor() || !look_at_tensor(value.toTensor(), argument, walk))
          return false;
        break;
      case TENSORS: {
        if (value.isNone()) {
          walk.words.push_back(NONE);
          break;
        }
        if (!value.isList())
          return false;
        auto items = value.toListRef();
        walk.words.push_back(LIST);
        walk.words.push_back(items.size());
        for (const c10::IValue& item : items) {
          if (item.isNone())
            walk.words.push_back(NONE);
          else if (!item.isTensor() || !look_at_tensor(item.toTensor(), argument, walk))
            return false;
        }
        break;
      }
      case NUMBER: {
        const auto& usual = schema_.arguments()[k].default_value();
        if (usual.has_value() && *usual == value)
          walk.words.push_back(DEFAULT);
        if (!look_at_number(value, argument, walk))
          return false;
        break;
      }
      case NUMBERS:
        if (value.isNone()) {
          walk.words.push_back(NONE);
          break;
        }
        if (!value.isList())
          return false;
        walk.words.push_back(LIST);
        walk.words.push_back(value.toListRef().size());
        for (const c10::IValue& item : value.toListRef()) {
          if (!look_at_number(item, argument, walk))
            return false;
        }
        break;
      case GENERATOR:
        if (value.isNone()) {
          walk.words.push_back(NONE);
        } else {
          const at::Generator generator = value.toGenerator();
          if (generator.device().type() != c10::kPrivateUse1)
            return false;
          walk.words.push_back(DRAWS);
          walk.values.push_back({'q', argument, generator_number(generator), 0});
        }
        break;
      case DEVICE:
        if (value.isNone()) {
          walk.words.push_back(NONE);
        } else {
          const c10::Device device = value.toDevice();
          if (device.type() != c10::kPrivateUse1)
            return false;
          walk.words.push_back(PLACE);
          const int index = device.has_index() ? device.index() : current_device();
          if (walk.device == nullptr) {
            Interpreter lock;
            walk.device = device_at(index);
          } else if (walk.device->index != index) {
            return false;
          }
        }
        break;
      default:
        if (!look_at_fixed(value, walk))
          return false;
    }
  }
  return true;
}

bool Kernel::look_at_tensor(const at::Tensor& tensor, int argument, Walk& walk) const {
  Words& words = walk.words;
  if (!tensor.defined()) {
    words.push_back(NONE);
    return true;
  }
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  const auto dtype = static_cast<uint64_t>(tensor.scalar_type());
  if (impl->device_type() != c10::kPrivateUse1) {
    // A number of the host, by its value.
    if (!impl->is_cpu() || impl->dim() || impl->is_sparse() || tensor.is_conj() || tensor.is_neg()
        || tensor.is_quantized())
      return false;
    words.push_back(HOST);
    words.push_back(impl->is_wrapped_number() ? 255 : dtype);
    return look_at_number(tensor.item(), argument, walk);
  }
  if (!impl->has_storage())
    return false;
  Entry* entry = entry_of(tensor.storage());
  if (entry == nullptr)
    return false;
  if (walk.device != nullptr && walk.device != entry->device)
    return false;
  walk.device = entry->device;
  const auto sizes = impl->sizes();
  const auto strides = impl->strides();
  words.push_back(REMOTE | dtype << 8 | sizes.size() << 16);
  words.append(sizes.begin(), sizes.end());
  words.append(strides.begin(), strides.end());
  words.push_back(static_cast<uint64_t>(impl->storage_offset()));
  if (entry->odd)
    words.push_back(static_cast<uint64_t>(tensor.is_conj()) | uint64_t{tensor.is_neg()} << 1);
  walk.values.push_back({'Q', argument, entry->number, 0});
  return true;
}

bool Kernel::look_at_number(const c10::IValue& value, int argument, Walk& walk) const {
  if (value.isNone()) {
    walk.words.push_back(NONE);
  } else if (value.isBool()) {
    walk.words.push_back(BOOL);
    walk.values.push_back({'?', argument, value.toBool(), 0});
  } else if (value.isInt()) {
    walk.words.push_back(INT);
    walk.values.push_back({'q', argument, static_cast<uint64_t>(value.toInt()), 0});
  } else if (value.isDouble()) {
    walk.words.push_back(DOUBLE);
    walk.values.push_back({'d', argument, bits_of(value.toDouble()), 0});
  } else if (value.isComplexDouble()) {
    const auto number = value.toComplexDouble();
    walk.words.push_back(COMPLEX);
    walk.values.push_back({'D', argument, bits_of(number.real()), number.imag()});
  } else {
    return false;
  }
  return true;
}

bool Kernel::look_at_fixed(const c10::IValue& value, Walk& walk) const {
  Words& words = walk.words;
  if (value.isNone()) {
    words.push_back(NONE);
  } else if (value.isBool()) {
    words.push_back(BOOL);
    words.push_back(value.toBool());
  } else if (value.isInt()) {
    words.push_back(INT);
    words.push_back(static_cast<uint64_t>(value.toInt()));
  } else if (value.isDouble()) {
    words.push_back(DOUBLE);
    words.push_back(bits_of(value.toDouble()));
  } else if (value.isComplexDouble()) {
    const auto number = value.toComplexDouble();
    words.push_back(COMPLEX);
    words.push_back(bits_of(number.real()));
    words.push_back(bits_of(number.imag()));
  } else if (value.isString()) {
    const std::string& text = value.toStringRef();
    words.push_back(STRING);
    words.push_back(text.size());
    for (size_t at = 0; at < text.size(); at += 8) {
      uint64_t word = 0;
      std::memcpy(&word, text.data() + at, std::min<size_t>(8, text.size() - at));
      words.push_back(word);
    }
  } else if (value.isIntList()) {
    const auto list = value.toIntList();
    words.push_back(LIST);
    words.push_back(list.size());
    for (int64_t item : list)
      words.push_back(static_cast<uint64_t>(item));
  } else if (value.isList()) {
    const auto list = value.toListRef();
    words.push_back(LIST | 1 << 8);
    words.push_back(list.size());
    for (const c10::IValue& item : list) {
      if (!look_at_fixed(item, walk))
        return false;
    }
  } else {
    return false;  // a symbolic number, a storage, a stream
  }
  return true;
}

// -- plan -> record and results -----------------------------------------------------------------

size_t pack(const Plan& plan, const Walk& walk, char* to) {
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

void Kernel::give(const Plan& plan, uint64_t number, c10::Stack* stack) const {
  // The usual case: one storage, one tensor.
  const size_t count = kinds_.size();
  if (plan.sizes.size() == 1 && plan.returns.size() == 1 && plan.returns[0].kind == Item::NEW) {
    auto made = make_tensor(make_storage(plan.device, number, plan.sizes[0], nullptr),
                            plan.forms[plan.returns[0].at]);
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
    const auto& argument = schema_.arguments()[k];
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
    mismatched.insert(schema_.name() + " " + codes + " " + layout);
    return false;
  }
  learnt++;
  plans[walk.words] = std::move(plan);
  return true;
}

// Views look at a tensor's layout only; the host's kernels do that for any device.
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
      library->impl(name.c_str(), torch::CppFunction::makeFromBoxedFunctor(
                                      std::make_unique<Kernel>(op, std::move(found))));
    }
    PyObject* names = PySequence_Fast(views, "names of views");
    if (names == nullptr)
      return nullptr;
    for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(names); k++)
      library->impl(PyUnicode_AsUTF8(PySequence_Fast_GET_ITEM(names, k)),
                    torch::CppFunction::makeFromBoxedFunctor(std::make_unique<View>()));
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
