// What torch asks of a kind of device: which is current, how many there are, its streams, events,
// generators, and host memory that goes out without a copy.
//
// Each device runs what it is told in order: it has one stream, and every stream of a program's is
// that one.

#include "tier.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/Generator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/Generator.h>
#include <torch/csrc/autograd/engine.h>

#include <atomic>
#include <map>
#include <thread>

namespace gpuremote {

namespace {

using c10::DeviceIndex;

constexpr int MOST_DEVICES = 128;  // what a DeviceIndex can say
thread_local DeviceIndex current = 0;
thread_local c10::StreamId current_streams[MOST_DEVICES];
std::atomic<c10::StreamId> streams{1};
std::atomic<uint64_t> generators{1};

c10::Device remote(int index) {
  return {c10::kPrivateUse1, static_cast<DeviceIndex>(index)};
}

// What Python answers, with the interpreter lock held; throws what it raises.
class Answer {
 public:
  explicit Answer(PyObject* object) : object_(object) {
    if (object == nullptr)
      throw_python();
  }
  ~Answer() { Py_DECREF(object_); }
  Answer(const Answer&) = delete;
  Answer& operator=(const Answer&) = delete;

  uint64_t number() const { return PyLong_AsUnsignedLongLong(object_); }
  bool truth() const { return PyObject_IsTrue(object_) == 1; }
  double real() const { return PyFloat_AsDouble(object_); }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

// Holds the interpreter lock, and keeps the exception that is set: for what ends in its midst.
class Quietly {
 public:
  Quietly() { PyErr_Fetch(&type_, &value_, &traceback_); }
  ~Quietly() { PyErr_Restore(type_, value_, traceback_); }
  Quietly(const Quietly&) = delete;
  Quietly& operator=(const Quietly&) = delete;

 private:
  Interpreter lock_;
  PyObject *type_, *value_, *traceback_;
};

PyObject* ask_event(const char* action, int index, void* event, uint64_t other = 0) {
  return PyObject_CallFunction(callbacks.event, "siKK", action, index,
                               static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(event)),
                               static_cast<unsigned long long>(other));
}

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return c10::kPrivateUse1; }

  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = current;
    current = device.index();
    return remote(before);
  }
  c10::Device getDevice() const override { return remote(current); }
  void setDevice(c10::Device device) const override { current = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }

  c10::Stream getStream(c10::Device device) const override {
    if (!device.has_index())
      device = remote(current);
    return c10::Stream(c10::Stream::UNSAFE, device, current_streams[device.index()]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, 0);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return c10::Stream(c10::Stream::UNSAFE, device.has_index() ? device : remote(current),
                       streams++);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const auto before = getStream(stream.device());
    current_streams[stream.device_index()] = stream.id();
    return before;
  }

  DeviceIndex deviceCount() const noexcept override;

  // An event is a number that Python knows.
  void record(void** event, const c10::Stream& stream, const DeviceIndex,
              const c10::EventFlag) const override {
    Interpreter lock;
    Answer made(ask_event("record", stream.device_index(), *event));
    *event = reinterpret_cast<void*>(static_cast<uintptr_t>(made.number()));
  }
  void block(void*, const c10::Stream&) const override {}  // in order as it is
  bool queryEvent(void* event) const override {
    Interpreter lock;
    return event == nullptr || Answer(ask_event("query", 0, event)).truth();
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override {
    if (event == nullptr || !Py_IsInitialized())
      return;
    Quietly lock;
    PyObject* done = ask_event("drop", 0, event);
    if (done == nullptr)
      PyErr_Clear();
    Py_XDECREF(done);
  }
  void synchronizeEvent(void* event) const override {
    Interpreter lock;
    if (event != nullptr)
      Answer(ask_event("synchronize", 0, event));
  }
  double elapsedTime(void* start, void* end, const DeviceIndex) const override {
    Interpreter lock;
    return Answer(ask_event("elapsed", 0, start, reinterpret_cast<uintptr_t>(end))).real();
  }
  bool queryStream(const c10::Stream& stream) const override {
    Interpreter lock;
    return Answer(ask_event("idle", stream.device_index(), nullptr)).truth();
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    synchronizeDevice(stream.device_index());
  }
  void synchronizeDevice(const DeviceIndex index) const override {
    Interpreter lock;
    Answer(ask_event("wait", index, nullptr));
  }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

// -- generators ---------------------------------------------------------------------------------

// One of the server's: it has the state; here is its number.
class RemoteGenerator final : public c10::GeneratorImpl {
 public:
  RemoteGenerator(DeviceIndex index, uint64_t number)
      : GeneratorImpl(remote(index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        number_(number) {}

  ~RemoteGenerator() override {
    if (number_ == 0 || !Py_IsInitialized())
      return;
    Quietly lock;
    PyObject* done = ask("drop", Py_NewRef(Py_None));
    if (done == nullptr)
      PyErr_Clear();
    Py_XDECREF(done);
  }

  uint64_t number() const { return number_; }

  void set_current_seed(uint64_t seed) override {
    Interpreter lock;
    Answer(ask("seed", PyLong_FromUnsignedLongLong(seed)));
    seed_ = seed;
  }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return seed_;
  }
  void set_offset(uint64_t) override {
    TORCH_CHECK(false, "a remote generator has no offset that could be set; use set_state");
  }
  uint64_t get_offset() const override {
    TORCH_CHECK(false, "a remote generator does not tell its offset; use get_state");
  }
  void set_state(const c10::TensorImpl& state) override {
    TORCH_CHECK(state.is_cpu() && state.is_contiguous()
                    && state.dtype() == caffe2::TypeMeta::Make<uint8_t>(),
                "the state of a generator is a contiguous tensor of uint8 on the host");
    Interpreter lock;
    Answer(ask("set", PyBytes_FromStringAndSize(static_cast<const char*>(state.data()),
                                                state.numel())));
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    Interpreter lock;
    Answer state(ask("get", Py_NewRef(Py_None)));
    char* bytes;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(state.get(), &bytes, &size) < 0)
      throw_python();
    at::Tensor made = at::detail::empty_cpu({size}, c10::kByte);
    std::memcpy(made.mutable_data_ptr(), bytes, static_cast<size_t>(size));
    return made.getIntrusivePtr();
  }

 private:
  RemoteGenerator* clone_impl() const override {
    auto* made = new RemoteGenerator(device().index(), generators++);
    made->set_state(*get_state());
    made->seed_ = seed_;
    return made;
  }

  // Takes ``value`` over.
  PyObject* ask(const char* action, PyObject* value) const {
    return PyObject_CallFunction(callbacks.generator, "siKN", action,
                                 static_cast<int>(device().index()),
                                 static_cast<unsigned long long>(number_), value);
  }

  uint64_t number_;
  uint64_t seed_ = c10::default_rng_seed_val;
};

// -- pinned memory ------------------------------------------------------------------------------

// Where it lies: begin -> end.
std::mutex pinned_mutex;
std::map<uintptr_t, uintptr_t> pinned;

void end_pinned(void* context) {
  auto* view = static_cast<Py_buffer*>(context);
  {
    std::lock_guard<std::mutex> guard(pinned_mutex);
    pinned.erase(reinterpret_cast<uintptr_t>(view->buf));
  }
  if (Py_IsInitialized()) {
    Quietly lock;
    PyBuffer_Release(view);
  }
  delete view;
}

class PinnedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t nbytes) override {
    if (nbytes == 0)
      return {nullptr, c10::Device(c10::kCPU)};
    Interpreter lock;
    Answer memory(PyObject_CallFunction(callbacks.host, "n", static_cast<Py_ssize_t>(nbytes)));
    auto* view = new Py_buffer{};
    if (PyObject_GetBuffer(memory.get(), view, PyBUF_WRITABLE) < 0) {
      delete view;
      throw_python();
    }
    const auto begin = reinterpret_cast<uintptr_t>(view->buf);
    {
      std::lock_guard<std::mutex> guard(pinned_mutex);
      pinned[begin] = begin + nbytes;
    }
    return {view->buf, view, end_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }
};

PinnedAllocator pinned_allocator;

// -- hooks --------------------------------------------------------------------------------------

class Hooks final : public at::PrivateUse1HooksInterface {
 public:
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return Guard().deviceCount(); }
  void setCurrentDevice(DeviceIndex index) const override { current = index; }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    return std::exchange(current, index);
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return index < 0 ? current : exchangeDevice(index);
  }

  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    static std::mutex mutex;
    static std::map<DeviceIndex, at::Generator> made;
    std::lock_guard<std::mutex> guard(mutex);
    if (index < 0)
      index = current;
    auto& found = made[index];
    if (!found.defined())
      found = at::make_generator<RemoteGenerator>(index, uint64_t{0});
    return found;
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    auto made =
        at::make_generator<RemoteGenerator>(index < 0 ? current : index, generators.fetch_add(1));
    made.set_current_seed(c10::default_rng_seed_val);
    return made;
  }

  bool isPinnedPtr(const void* data) const override {
    const auto address = reinterpret_cast<uintptr_t>(data);
    std::lock_guard<std::mutex> guard(pinned_mutex);
    auto after = pinned.upper_bound(address);
    return after != pinned.begin() && address < (--after)->second;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  at::Device getDeviceFromPtr(void* data) const override {
    Entry* entry = entry_named(reinterpret_cast<uintptr_t>(data) >> SHIFT);
    TORCH_CHECK(entry != nullptr, "the address belongs to no remote storage");
    return remote(entry->device->index);
  }
  void resizePrivateUse1Bytes(const c10::Storage&, size_t) const override {
    TORCH_CHECK(false, "a remote storage can't be resized; resize_ the tensor");
  }
};

// What Engine lets its subclasses see.
struct Access : torch::autograd::Engine {
  static auto& queues(torch::autograd::Engine& engine) {
    return engine.*(&Access::device_ready_queues_);
  }
};

// Python that asks opens the sessions. torch's engine asks too, without the interpreter lock and in
// the midst of its start: it gets those that are open, and start_threads sees to the others.
DeviceIndex Guard::deviceCount() const noexcept {
  return static_cast<DeviceIndex>(PyGILState_Check() ? count_devices() : opened_devices());
}

}  // namespace

int current_device() {
  return current;
}

uint64_t generator_number(const at::Generator& generator) {
  return generator.get<RemoteGenerator>()->number();
}

// generator_of(generator): its number.
PyObject* generator_of(PyObject*, PyObject* generator) {
  return PyLong_FromUnsignedLongLong(generator_number(THPGenerator_Unwrap(generator)));
}

// device(index): make it the current one of this thread; the one before. index -1: only that.
PyObject* exchange_device(PyObject*, PyObject* index) {
  const long wanted = PyLong_AsLong(index);
  if (PyErr_Occurred())
    return nullptr;
  const auto before = current;
  if (wanted >= 0)
    current = static_cast<DeviceIndex>(wanted);
  return PyLong_FromLong(before);
}

// torch's engine starts a thread for each device it knows of when it is used first, and never again.
// Sessions may open later, to more devices.
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

void register_device() {
  static const Guard guard;
  c10::impl::registerDeviceGuard(c10::kPrivateUse1, &guard);
  at::RegisterPrivateUse1HooksInterface(new Hooks());
}

}  // namespace gpuremote
