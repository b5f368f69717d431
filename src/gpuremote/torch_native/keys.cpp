// The arguments of a call become a key.

#include "keys.h"

#include <c10/core/DefaultDtype.h>

#include <cstring>

namespace gpuremote {

namespace {

// First words of parts of a key.
enum Tag : uint64_t {
  NONE = 1, REMOTE, HOST, LIST, BOOL, INT, DOUBLE, COMPLEX, STRING, DEFAULT, PLACE, DRAWS
};

}  // namespace

void look_at_text(std::string_view text, Walk& walk) {
  walk.words.push_back(STRING);
  walk.words.push_back(text.size());
  for (size_t at = 0; at < text.size(); at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, text.data() + at, std::min<size_t>(8, text.size() - at));
    walk.words.push_back(word);
  }
}

void look_at_list(at::IntArrayRef list, Walk& walk) {
  walk.words.push_back(LIST);
  walk.words.push_back(list.size());
  for (int64_t item : list)
    walk.words.push_back(static_cast<uint64_t>(item));
}

void look_at_nothing(Walk& walk) {
  walk.words.push_back(NONE);
}

namespace {

uint64_t bits_of(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

bool look_at_number(const c10::IValue& value, int argument, Walk& walk) {
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

bool look_at_fixed(const c10::IValue& value, Walk& walk) {
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
    look_at_text(value.toStringRef(), walk);
  } else if (value.isIntList()) {
    look_at_list(value.toIntVector(), walk);
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

}  // namespace

void begin(Walk& walk) {
  // What numbers become in an op with integers.
  walk.words.push_back(static_cast<uint64_t>(c10::get_default_dtype_as_scalartype()));
}

bool look_at_tensor(const at::Tensor& tensor, int argument, Walk& walk) {
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
  const uint64_t flags = static_cast<uint64_t>(tensor.is_conj()) | uint64_t{tensor.is_neg()} << 1;
  words.push_back(REMOTE | dtype << 8 | sizes.size() << 16 | flags << 48);
  words.append(sizes.begin(), sizes.end());
  words.append(strides.begin(), strides.end());
  words.push_back(static_cast<uint64_t>(impl->storage_offset()));
  walk.values.push_back({'Q', argument, entry->number, 0});
  return true;
}

bool look_at(const c10::IValue& value, int kind, int argument, const c10::FunctionSchema& schema,
             Walk& walk) {
  switch (kind) {
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
      const auto& usual = schema.arguments()[argument].default_value();
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
        walk.words.push_back(DRAWS | static_cast<uint64_t>(generator.device().index()) << 8);
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
  return true;
}

bool look(const c10::FunctionSchema& schema, const std::vector<int>& kinds,
          const torch::jit::Stack& stack, Walk& walk) {
  const size_t count = kinds.size();
  const c10::IValue* arguments = stack.data() + (stack.size() - count);
  begin(walk);
  for (size_t k = 0; k < count; k++) {
    if (!look_at(arguments[k], kinds[k], static_cast<int>(k), schema, walk))
      return false;
  }
  return true;
}

}  // namespace gpuremote
