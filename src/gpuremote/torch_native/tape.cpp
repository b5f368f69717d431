// Records of ops on their way to the session, which is in Python.
//
// A tape is open or closed. While it is open it gives records their numbers. The session closes it
// when it takes what is there (Issuer._merge), before it gives a number itself; so at any time one
// of the two does. The next op opens it again (Issuer.open_tape), with the session's lock.

#include "tier.h"

#include <structmember.h>
#include <torch/csrc/Exceptions.h>

#include <ctime>

namespace gpuremote {

namespace {

constexpr size_t FLUSH_BYTES = 48 << 10;  // client.issuing.FLUSH_BYTES

struct Issued {
  uint64_t number;
  uint32_t frame;
  uint32_t count;
};

struct Line {
  PyObject* code;
  int lasti;
};

// Where the ops of one batch were issued.
struct Places {
  std::vector<Issued> issued;
  std::vector<Line> lines;

  ~Places() {
    for (auto& line : lines)
      Py_DECREF(line.code);
  }
};

struct Origins {
  PyObject_HEAD
  Places* places;
};

PyTypeObject* origins_type;

void origins_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<Origins*>(self)->places;
  type->tp_free(self);
  Py_DECREF(type);
}

Py_ssize_t origins_length(PyObject* self) {
  return static_cast<Py_ssize_t>(reinterpret_cast<Origins*>(self)->places->issued.size());
}

// As client.origin.take makes them.
PyObject* origins_item(PyObject* self, Py_ssize_t position) {
  const Places& places = *reinterpret_cast<Origins*>(self)->places;
  if (position < 0 || position >= origins_length(self)) {
    PyErr_SetString(PyExc_IndexError, "no such op");
    return nullptr;
  }
  const Issued& one = places.issued[position];
  PyObject* made = PyTuple_New(2 + 2 * Py_ssize_t{one.count});
  if (made == nullptr)
    return nullptr;
  PyTuple_SET_ITEM(made, 0, PyLong_FromUnsignedLongLong(one.number));
  PyTuple_SET_ITEM(made, 1, Py_NewRef(Py_None));
  for (uint32_t k = 0; k < one.count; k++) {
    const Line& line = places.lines[one.frame + k];
    PyTuple_SET_ITEM(made, 2 + 2 * k, Py_NewRef(line.code));
    PyTuple_SET_ITEM(made, 3 + 2 * k, PyLong_FromLong(line.lasti));
  }
  return made;
}

PyType_Slot origins_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(origins_dealloc)},
    {Py_sq_length, reinterpret_cast<void*>(origins_length)},
    {Py_sq_item, reinterpret_cast<void*>(origins_item)},
    {0, nullptr},
};

PyType_Spec origins_spec = {
    "gpuremote_torch.Origins", sizeof(Origins), 0, Py_TPFLAGS_DEFAULT, origins_slots};

}  // namespace

struct Tape {
  PyObject_HEAD
  PyObject* reopen;
  PyObject* due;
  PyObject* threads;  // a set of those that write, or nullptr
  bool open;
  bool pressing;  // whatever is written is due at once
  uint64_t first, next;
  int64_t due_at;
  std::vector<char>* records;
  Places* places;
  std::shared_ptr<Freed>* freed;
};

PyTypeObject* tape_type;

std::shared_ptr<Freed> freed_of(Tape* tape) {
  return *tape->freed;
}

void throw_python() {
  python_error error;
  error.persist();
  throw std::move(error);
}

void note_frames(Frames& frames) {
  PyThreadState* thread = PyThreadState_Get();
  PyFrameObject* frame = PyThreadState_GetFrame(thread);
  while (frame != nullptr && frames.count < DEPTH) {
    frames.code[frames.count] = reinterpret_cast<PyObject*>(PyFrame_GetCode(frame));
    frames.lasti[frames.count++] = PyFrame_GetLasti(frame);
    PyFrameObject* back = frames.count < DEPTH ? PyFrame_GetBack(frame) : nullptr;
    Py_DECREF(frame);
    frame = back;
  }
  Py_XDECREF(frame);
}

void forget_frames(Frames& frames) {
  for (int k = 0; k < frames.count; k++)
    Py_DECREF(frames.code[k]);
  frames.count = 0;
}

static void call(PyObject* function) {
  PyObject* done = PyObject_CallNoArgs(function);
  if (done == nullptr)
    throw_python();
  Py_DECREF(done);
}

void open_tape(Tape* tape) {
  while (!tape->open)
    call(tape->reopen);
}

uint64_t append(Tape* tape, uint32_t step, const char* record, size_t size, Frames& frames) {
  if (tape->threads != nullptr) {
    PyObject* me = PyLong_FromUnsignedLong(PyThread_get_thread_ident());
    if (me == nullptr || PySet_Add(tape->threads, me) < 0)
      PyErr_Clear();
    Py_XDECREF(me);
  }
  uint64_t number = tape->next;
  tape->next += step;
  tape->records->insert(tape->records->end(), record, record + size);
  Places& places = *tape->places;
  places.issued.push_back(
      {number, static_cast<uint32_t>(places.lines.size()), static_cast<uint32_t>(frames.count)});
  for (int k = 0; k < frames.count; k++)
    places.lines.push_back({frames.code[k], frames.lasti[k]});
  frames.count = 0;
  return number;
}

bool is_due(Tape* tape) {
  if (!tape->open)
    return false;  // Python has taken the records
  if (tape->pressing || tape->records->size() >= FLUSH_BYTES)
    return true;
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * int64_t{1000000000} + now.tv_nsec >= tape->due_at;
}

void send_due(Tape* tape) {
  call(tape->due);
}

namespace {

PyObject* tape_new(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  PyObject *reopen, *due;
  if (!PyArg_ParseTuple(arguments, "OO", &reopen, &due))
    return nullptr;
  auto* tape = reinterpret_cast<Tape*>(type->tp_alloc(type, 0));
  if (tape == nullptr)
    return nullptr;
  tape->reopen = Py_NewRef(reopen);
  tape->due = Py_NewRef(due);
  tape->records = new std::vector<char>();
  tape->places = new Places();
  tape->freed = new std::shared_ptr<Freed>(std::make_shared<Freed>());
  return reinterpret_cast<PyObject*>(tape);
}

int tape_traverse(PyObject* self, visitproc visit, void* arg) {
  auto* tape = reinterpret_cast<Tape*>(self);
  Py_VISIT(tape->reopen);
  Py_VISIT(tape->due);
  Py_VISIT(tape->threads);
  Py_VISIT(Py_TYPE(self));
  return 0;
}

int tape_clear(PyObject* self) {
  auto* tape = reinterpret_cast<Tape*>(self);
  Py_CLEAR(tape->reopen);
  Py_CLEAR(tape->due);
  Py_CLEAR(tape->threads);
  return 0;
}

void tape_dealloc(PyObject* self) {
  auto* tape = reinterpret_cast<Tape*>(self);
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  tape_clear(self);
  delete tape->records;
  delete tape->places;
  delete tape->freed;
  type->tp_free(self);
  Py_DECREF(type);
}

// open(next, due_at, pressing, threads): records get numbers from next on, and are due at a time of
// the monotonic clock in nanoseconds, or at once; who writes is noted in a set, if it is one.
// Several threads may find it closed at a time. The first one opens it, and its records may be here
// when the others come: they leave it as it is.
PyObject* tape_open(PyObject* self, PyObject* arguments) {
  auto* tape = reinterpret_cast<Tape*>(self);
  unsigned long long next;
  PyObject *due_at, *threads;
  int pressing;
  if (!PyArg_ParseTuple(arguments, "KOpO", &next, &due_at, &pressing, &threads))
    return nullptr;
  if (tape->open)
    Py_RETURN_NONE;
  Py_XSETREF(tape->threads, PySet_Check(threads) ? Py_NewRef(threads) : nullptr);
  int overflow;
  tape->due_at = PyLong_AsLongLongAndOverflow(due_at, &overflow);
  if (overflow)
    tape->due_at = INT64_MAX;
  tape->first = tape->next = next;
  tape->pressing = pressing;
  tape->open = true;
  Py_RETURN_NONE;
}

PyObject* freed_numbers(Freed& freed) {
  std::vector<uint64_t> numbers;
  std::vector<PyObject*> owners;
  {
    std::lock_guard<std::mutex> guard(freed.mutex);
    numbers.swap(freed.numbers);
    owners.swap(freed.owners);
  }
  for (PyObject* owner : owners)
    Py_DECREF(owner);
  PyObject* made = PyList_New(static_cast<Py_ssize_t>(numbers.size()));
  for (size_t k = 0; made != nullptr && k < numbers.size(); k++)
    PyList_SET_ITEM(made, k, PyLong_FromUnsignedLongLong(numbers[k]));
  return made;
}

// taken: closes the tape; (first, next, records, origins) of what was written, or None.
PyObject* tape_taken(PyObject* self, void*) {
  auto* tape = reinterpret_cast<Tape*>(self);
  tape->open = false;
  if (tape->records->empty())
    Py_RETURN_NONE;
  auto* origins = reinterpret_cast<Origins*>(origins_type->tp_alloc(origins_type, 0));
  if (origins == nullptr)
    return nullptr;
  // Kept until the server has run the ops: no more than they need.
  origins->places = new Places{tape->places->issued, tape->places->lines};
  tape->places->issued.clear();
  tape->places->lines.clear();
  PyObject* made = Py_BuildValue(
      "KKy#N", static_cast<unsigned long long>(tape->first),
      static_cast<unsigned long long>(tape->next), tape->records->data(),
      static_cast<Py_ssize_t>(tape->records->size()), origins);
  tape->records->clear();
  return made;
}

// freed: handles of storages that have ended since.
PyObject* tape_freed(PyObject* self, void*) {
  return freed_numbers(**reinterpret_cast<Tape*>(self)->freed);
}

PyMethodDef tape_methods[] = {
    {"open", tape_open, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef tape_getset[] = {
    // Properties, and not methods: Ctrl-C comes after a call, and what was taken would be lost.
    {"taken", tape_taken, nullptr, nullptr, nullptr},
    {"freed", tape_freed, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyType_Slot tape_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(tape_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(tape_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(tape_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(tape_clear)},
    {Py_tp_methods, tape_methods},
    {Py_tp_getset, tape_getset},
    {0, nullptr},
};

PyType_Spec tape_spec = {
    "gpuremote_torch.Tape", sizeof(Tape), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, tape_slots};

}  // namespace

int add_tape(PyObject* module) {
  origins_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&origins_spec));
  tape_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&tape_spec));
  if (origins_type == nullptr || tape_type == nullptr)
    return -1;
  return PyModule_AddObjectRef(module, "Tape", reinterpret_cast<PyObject*>(tape_type));
}

}  // namespace gpuremote
