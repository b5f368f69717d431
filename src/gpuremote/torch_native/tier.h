// The part of gpuremote.torch in C++: what an op costs here, it costs for every op of a program.
//
// It stands in front of the part in Python, and knows nothing that Python has not found out: a
// call that was seen before becomes a record without Python, every other one goes to the kernel in
// Python, which leaves its plan here (learn). Both write the same records.
//
//     tape.cpp      records of ops, until the session in Python takes them
//     storages.cpp  remote storages: names in place of memory, and who lets go of them
//     keys.cpp      arguments of an op -> key
//     kernels.cpp   key -> plan -> record and results; and views
//     direct.cpp    the most common ops, without a stack for their arguments
//     device.cpp    what torch wants to know of a device: guard, streams, generators, pinned memory
//     attention.cpp has torch ask which kernel attention takes
//     module.cpp    the module gpuremote_torch
//
// Locks: tapes and plans are touched with the interpreter lock held, and only then. What a storage
// leaves behind when it ends, anywhere and without that lock, has a mutex of its own.

#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace gpuremote {

// Names of storages, see gpuremote.torch._storages.
constexpr int SHIFT = 36;
constexpr uint64_t FIRST = uint64_t{1} << 11;

// Holds the interpreter lock; cheap where the thread has it.
class Interpreter {
 public:
  Interpreter() : state_(PyGILState_Ensure()) {}
  ~Interpreter() { PyGILState_Release(state_); }
  Interpreter(const Interpreter&) = delete;
  Interpreter& operator=(const Interpreter&) = delete;

 private:
  PyGILState_STATE state_;
};

// Throw the exception that Python has set.
[[noreturn]] void throw_python();

// -- tape.cpp ---------------------------------------------------------------------------------

struct Tape;
extern PyTypeObject* tape_type;

// Where in the program an op was issued: frames, innermost first.
constexpr int DEPTH = 6;
struct Frames {
  PyObject* code[DEPTH];
  int lasti[DEPTH];
  int count = 0;
};

// All with the interpreter lock.
void note_frames(Frames& frames);
void forget_frames(Frames& frames);
// Whatever Python does may close a tape; after this it is open until Python runs again.
void open_tape(Tape* tape);
// The number of a record's first result. Takes the frames over. The tape has to be open.
uint64_t append(Tape* tape, uint32_t step, const char* record, size_t size, Frames& frames);
// After append, when results are in place: see to records that are due.
bool is_due(Tape* tape);
void send_due(Tape* tape);

int add_tape(PyObject* module);

// -- storages.cpp -----------------------------------------------------------------------------

// What storages that ended leave to their session.
struct Freed {
  std::mutex mutex;
  std::vector<uint64_t> numbers;
  std::vector<PyObject*> owners;
};

// remote:index. Lives as long as the process, as storages and plans point to it.
struct Device {
  Tape* tape;
  PyObject* home;
  int index;
  bool processor;  // the server's device is its processors
  std::shared_ptr<Freed> freed;
};

struct Entry {
  Device* device;
  uint64_t number;  // the handle in the session
  uint64_t name;    // the address is name << SHIFT
  uint64_t serial;  // no other storage has, or will have
  PyObject* owner;  // of the handle, if anything else is
};

// A result as a view of its storage.
struct Form {
  caffe2::TypeMeta dtype;
  c10::SmallVector<int64_t, 5> sizes, strides;
  int64_t offset;
  size_t nbytes;
  int storage;
};

std::shared_ptr<Freed> freed_of(Tape* tape);
c10::Storage make_storage(Device* device, uint64_t number, size_t nbytes, PyObject* owner);
at::Tensor make_tensor(c10::Storage storage, const Form& form);
// The entry of a storage that is ours; nullptr if it is none or was wrapped anew.
Entry* entry_of(const c10::Storage& storage);
Entry* entry_named(uint64_t name);
// (dtype, shape, stride, offset, nbytes, plain), see gpuremote.torch._storages.
bool parse_form(PyObject* form, Form& found);
// remote:index; opens the sessions. Throws if there is none. With the interpreter lock.
Device* device_at(int index);
// How many there are; opens the sessions. 0 where that fails. With the interpreter lock.
int count_devices() noexcept;
// The same without opening anything; nullptr if there is none.
const Device* opened_device(int index) noexcept;
// How many there are of sessions that are open.
int opened_devices() noexcept;
void register_allocator();
PyObject* set_devices(PyObject* module, PyObject* devices);
PyObject* held(PyObject* module, PyObject* name);
PyObject* disown(PyObject* module, PyObject* name);
PyObject* anchors(PyObject* module, PyObject* home);
PyObject* number_at(PyObject* module, PyObject* anchor);
PyObject* rebind(PyObject* module, PyObject* arguments);
PyObject* storage_tensor(PyObject* module, PyObject* arguments);
PyObject* held_count(PyObject* module, PyObject* unused);
int add_held(PyObject* module);

// Functions of gpuremote.torch, set by `use`.
struct Callbacks {
  PyObject* open;      // open() -> None: opens the sessions
  PyObject* allocate;  // allocate(index, nbytes) -> number
  PyObject* memory;    // memory(index) -> (used, peak, limit), in bytes
  PyObject* host;      // host(nbytes) -> writable memory from which a session sends
  PyObject* generator; // generator(action, index, number, value)
  PyObject* event;     // event(action, index, number)
};
extern Callbacks callbacks;

// -- kernels.cpp ------------------------------------------------------------------------------

PyObject* register_kernels(PyObject* module, PyObject* arguments);
PyObject* learn(PyObject* module, PyObject* arguments);
PyObject* forget_plans(PyObject* module, PyObject* unused);
PyObject* counts(PyObject* module, PyObject* unused);

// -- device.cpp -------------------------------------------------------------------------------

void register_device();
void register_attention();
int current_device();
// As many threads for gradients; without the interpreter lock.
void start_threads(size_t count);
// The server's number of a generator of ours.
uint64_t generator_number(const at::Generator& generator);
PyObject* generator_of(PyObject* module, PyObject* generator);
PyObject* exchange_device(PyObject* module, PyObject* index);

}  // namespace gpuremote
