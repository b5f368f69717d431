// Remote storages: an address that no memory has, made from a name, and behind it the handle.

#include "tier.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <array>
#include <atomic>

#include <structmember.h>
#include <torch/csrc/Dtype.h>

// Of libtorch_python; its own header brings all of the bindings.
PyObject* THPVariable_Wrap(const at::TensorBase& tensor);

namespace gpuremote {

Callbacks callbacks;

namespace {

// Storages by name; whoever ends one need not hold the interpreter lock.
std::mutex names_mutex;
std::vector<Entry*> named;
std::vector<uint64_t> spare;
uint64_t serials = 0;

void leave(Entry* entry) {
  Freed& freed = *entry->device->freed;
  std::lock_guard<std::mutex> guard(freed.mutex);
  if (entry->owner != nullptr)
    freed.owners.push_back(entry->owner);
  else
    freed.numbers.push_back(entry->number);
}

void end_entry(void* context) {
  auto* entry = static_cast<Entry*>(context);
  {
    std::lock_guard<std::mutex> guard(names_mutex);
    named[entry->name - FIRST] = nullptr;
    spare.push_back(entry->name);
  }
  leave(entry);
  delete entry;
}

c10::DataPtr name_storage(Device* device, uint64_t number, PyObject* owner) {
  auto* entry = new Entry{device, number, 0, 0, owner};
  {
    std::lock_guard<std::mutex> guard(names_mutex);
    entry->serial = ++serials;
    if (spare.empty()) {
      entry->name = FIRST + named.size();
      named.push_back(entry);
    } else {
      entry->name = spare.back();
      spare.pop_back();
      named[entry->name - FIRST] = entry;
    }
  }
  return {reinterpret_cast<void*>(entry->name << SHIFT), entry, end_entry,
          c10::Device(c10::kPrivateUse1, static_cast<c10::DeviceIndex>(device->index))};
}

class RemoteAllocator final : public c10::DeviceAllocator {
 public:
  c10::DataPtr allocate(size_t nbytes) override {
    Interpreter lock;
    Device* device = device_at(current_device());
    PyObject* made = PyObject_CallFunction(callbacks.allocate, "in", device->index,
                                           static_cast<Py_ssize_t>(nbytes));
    if (made == nullptr)
      throw_python();
    uint64_t number = PyLong_AsUnsignedLongLong(made);
    Py_DECREF(made);
    return name_storage(device, number, nullptr);
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;  // the address alone says nothing
  }

  void copy_data(void*, const void*, size_t) const override {
    TORCH_CHECK(false, "a remote storage has no memory here to copy from");
  }

  // What torch.accelerator asks. The session counts, at the server.
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    const auto [used, peak, limit] = counted(device);
    c10::CachingDeviceAllocator::DeviceStats stats;
    constexpr auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    for (auto* bytes : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes,
                        &stats.requested_bytes}) {
      (*bytes)[all].current = used;
      (*bytes)[all].peak = peak;
    }
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "the peak of a session's memory is never reset");
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    const auto [used, peak, limit] = counted(device);
    return {static_cast<size_t>(limit - used), static_cast<size_t>(limit)};
  }

 private:
  static std::tuple<int64_t, int64_t, int64_t> counted(int index) {
    Interpreter lock;
    PyObject* found = PyObject_CallFunction(callbacks.memory, "i", index);
    long long used, peak, limit;
    const bool good = found != nullptr && PyArg_ParseTuple(found, "LLL", &used, &peak, &limit);
    Py_XDECREF(found);
    if (!good)
      throw_python();
    return {used, peak, limit};
  }
};

RemoteAllocator allocator;

// By index. Devices of sessions that were closed live on, as storages point to them.
std::vector<Device*> devices;
std::atomic<const std::vector<Device*>*> published{nullptr};
std::atomic<int> opened{0};

}  // namespace

void register_allocator() {
  c10::SetAllocator(c10::kPrivateUse1, &allocator);
}

c10::Storage make_storage(Device* device, uint64_t number, size_t nbytes, PyObject* owner) {
  return c10::Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), nbytes, name_storage(device, number, owner), &allocator,
      /*resizable=*/true));
}

at::Tensor make_tensor(c10::Storage storage, const Form& form) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), form.dtype);
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(form.sizes, form.strides, form.offset);
  return tensor;
}

Entry* entry_of(const c10::Storage& storage) {
  const c10::DataPtr& pointer = storage.unsafeGetStorageImpl()->data_ptr();
  if (pointer.get_deleter() == end_entry)
    return static_cast<Entry*>(pointer.get_context());
  return nullptr;
}

Entry* entry_named(uint64_t name) {
  std::lock_guard<std::mutex> guard(names_mutex);
  return name >= FIRST && name - FIRST < named.size() ? named[name - FIRST] : nullptr;
}

static bool open_sessions() noexcept {
  if (devices.empty()) {
    PyObject* done = PyObject_CallNoArgs(callbacks.open);
    if (done == nullptr)
      return false;
    Py_DECREF(done);
  }
  return true;
}

int opened_devices() noexcept {
  return opened;
}

int count_devices() noexcept {
  if (!open_sessions())
    PyErr_Clear();
  return static_cast<int>(devices.size());
}

Device* device_at(int index) {
  if (!open_sessions())
    throw_python();
  TORCH_CHECK(index >= 0 && static_cast<size_t>(index) < devices.size(), "there is no device remote:",
              index, "; there are ", devices.size(), " remote devices");
  return devices[index];
}

const Device* opened_device(int index) noexcept {
  const std::vector<Device*>* table = published.load(std::memory_order_acquire);
  return table != nullptr && index >= 0 && static_cast<size_t>(index) < table->size()
             ? (*table)[index]
             : nullptr;
}

// set_devices([(home, tape), ...]): the devices there are from now on, by index.
PyObject* set_devices(PyObject*, PyObject* list) {
  std::vector<Device*> found;
  PyObject* items = PySequence_Fast(list, "set_devices: a list");
  if (items == nullptr)
    return nullptr;
  for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(items); k++) {
    PyObject *home, *tape;
    if (!PyArg_ParseTuple(PySequence_Fast_GET_ITEM(items, k), "OO!", &home, tape_type, &tape)) {
      Py_DECREF(items);
      return nullptr;
    }
    PyObject* kind = PyObject_GetAttrString(home, "kind");
    if (kind == nullptr) {
      Py_DECREF(items);
      return nullptr;
    }
    const bool processor =
        PyUnicode_Check(kind) && PyUnicode_CompareWithASCIIString(kind, "cpu") == 0;
    Py_DECREF(kind);
    auto* of = reinterpret_cast<Tape*>(Py_NewRef(tape));
    found.push_back(
        new Device{of, Py_NewRef(home), static_cast<int>(k), processor, freed_of(of)});
  }
  Py_DECREF(items);
  // Never freed: another thread may look at it without the interpreter lock.
  published.store(new std::vector<Device*>(found), std::memory_order_release);
  devices = std::move(found);
  opened = static_cast<int>(devices.size());
  if (!devices.empty()) {
    const size_t count = devices.size();
    Py_BEGIN_ALLOW_THREADS;
    start_threads(count);
    Py_END_ALLOW_THREADS;
  }
  Py_RETURN_NONE;
}

// -- for Python ---------------------------------------------------------------------------------

namespace {

// gpuremote.torch._storages.Held
struct HeldObject {
  PyObject_HEAD
  PyObject* home;
  unsigned long long number, name;
};

PyTypeObject* held_type;

void held_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  Py_XDECREF(reinterpret_cast<HeldObject*>(self)->home);
  type->tp_free(self);
  Py_DECREF(type);
}

PyMemberDef held_members[] = {
    {"home", T_OBJECT_EX, offsetof(HeldObject, home), READONLY, nullptr},
    {"number", T_ULONGLONG, offsetof(HeldObject, number), READONLY, nullptr},
    {"name", T_ULONGLONG, offsetof(HeldObject, name), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyType_Slot held_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(held_dealloc)},
    {Py_tp_members, held_members},
    {0, nullptr},
};

PyType_Spec held_spec = {"gpuremote_torch.Held", sizeof(HeldObject), 0, Py_TPFLAGS_DEFAULT,
                         held_slots};

}  // namespace

int add_held(PyObject*) {
  held_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&held_spec));
  return held_type == nullptr ? -1 : 0;
}

// held(name): the storage of that name, or None.
PyObject* held(PyObject*, PyObject* name) {
  unsigned long long wanted = PyLong_AsUnsignedLongLong(name);
  if (PyErr_Occurred())
    return nullptr;
  Entry* entry = entry_named(wanted);
  if (entry == nullptr)
    Py_RETURN_NONE;
  auto* made = reinterpret_cast<HeldObject*>(held_type->tp_alloc(held_type, 0));
  if (made == nullptr)
    return nullptr;
  made->home = Py_NewRef(entry->device->home);
  made->number = entry->number;
  made->name = entry->name;
  return reinterpret_cast<PyObject*>(made);
}

// disown(name): the handle of a storage that no longer gives it back.
PyObject* disown(PyObject*, PyObject* name) {
  unsigned long long wanted = PyLong_AsUnsignedLongLong(name);
  if (PyErr_Occurred())
    return nullptr;
  Entry* entry = entry_named(wanted);
  if (entry == nullptr) {
    PyErr_SetString(PyExc_KeyError, "no storage has this name");
    return nullptr;
  }
  entry->owner = Py_NewRef(Py_None);
  return PyLong_FromUnsignedLongLong(entry->number);
}

// anchors(home): of every storage of a device that lives: {handle: (name, serial)}.
PyObject* anchors(PyObject*, PyObject* home) {
  std::vector<std::array<uint64_t, 3>> found;
  {
    std::lock_guard<std::mutex> guard(names_mutex);
    for (const Entry* entry : named) {
      if (entry != nullptr && entry->device->home == home)
        found.push_back({entry->number, entry->name, entry->serial});
    }
  }
  PyObject* made = PyDict_New();
  for (const auto& [number, name, serial] : found) {
    PyObject* key = PyLong_FromUnsignedLongLong(number);
    PyObject* value = Py_BuildValue("KK", static_cast<unsigned long long>(name),
                                    static_cast<unsigned long long>(serial));
    const bool good = made != nullptr && key != nullptr && value != nullptr
                      && PyDict_SetItem(made, key, value) == 0;
    Py_XDECREF(key);
    Py_XDECREF(value);
    if (!good) {
      Py_XDECREF(made);
      return nullptr;
    }
  }
  return made;
}

static Entry* anchored(PyObject* anchor) {
  unsigned long long name, serial;
  if (!PyArg_ParseTuple(anchor, "KK", &name, &serial))
    return nullptr;
  Entry* entry = entry_named(name);
  return entry != nullptr && entry->serial == serial ? entry : nullptr;
}

// number_at(anchor): the handle of that storage now, or None if it has ended.
PyObject* number_at(PyObject*, PyObject* anchor) {
  const Entry* entry = anchored(anchor);
  if (entry == nullptr && PyErr_Occurred())
    return nullptr;
  if (entry == nullptr)
    Py_RETURN_NONE;
  return PyLong_FromUnsignedLongLong(entry->number);
}

// rebind(anchor, number): give that storage another handle, and its handle back; False if it has
// ended.
PyObject* rebind(PyObject*, PyObject* arguments) {
  PyObject* anchor;
  unsigned long long number;
  if (!PyArg_ParseTuple(arguments, "OK", &anchor, &number))
    return nullptr;
  Entry* entry = anchored(anchor);
  if (entry == nullptr && PyErr_Occurred())
    return nullptr;
  if (entry == nullptr)
    Py_RETURN_FALSE;
  leave(entry);
  entry->number = number;
  entry->owner = nullptr;
  Py_RETURN_TRUE;
}

// held_count(): storages that live.
PyObject* held_count(PyObject*, PyObject*) {
  std::lock_guard<std::mutex> guard(names_mutex);
  return PyLong_FromSize_t(named.size() - spare.size());
}

static bool parse_lengths(PyObject* sequence, c10::SmallVector<int64_t, 5>& found) {
  PyObject* items = PySequence_Fast(sequence, "lengths: a tuple");
  if (items == nullptr)
    return false;
  for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(items); k++)
    found.push_back(PyLong_AsLongLong(PySequence_Fast_GET_ITEM(items, k)));
  Py_DECREF(items);
  return !PyErr_Occurred();
}

bool parse_form(PyObject* form, Form& found) {
  PyObject *dtype, *shape, *stride, *plain;
  long long offset, nbytes;
  if (!PyArg_ParseTuple(form, "O!OOLLO", &THPDtypeType, &dtype, &shape, &stride, &offset, &nbytes,
                        &plain))
    return false;
  found.dtype = c10::scalarTypeToTypeMeta(reinterpret_cast<THPDtype*>(dtype)->scalar_type);
  found.offset = offset;
  found.nbytes = static_cast<size_t>(nbytes);
  found.storage = 0;
  return parse_lengths(shape, found.sizes) && parse_lengths(stride, found.strides);
}

// tensor(index, number, form, owner): the tensor of a storage that a record names; ``owner`` owns
// the handle, if it is not None.
PyObject* storage_tensor(PyObject*, PyObject* arguments) {
  int index;
  unsigned long long number;
  PyObject *form, *owner;
  Form found;
  if (!PyArg_ParseTuple(arguments, "iKOO", &index, &number, &form, &owner)
      || !parse_form(form, found))
    return nullptr;
  try {
    auto storage = make_storage(device_at(index), number, found.nbytes,
                                owner == Py_None ? nullptr : Py_NewRef(owner));
    return THPVariable_Wrap(make_tensor(std::move(storage), found));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

}  // namespace gpuremote
