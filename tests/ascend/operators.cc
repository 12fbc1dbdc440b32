#include "operators.h"

namespace standin {

int64_t Size(const Tensor& tensor) {
  return std::accumulate(tensor.dims.begin(), tensor.dims.end(), int64_t{1},
                         std::multiplies<int64_t>());
}

int64_t Bytes(const Tensor& tensor) {
  return Size(tensor) * (tensor.dtype == kInt32 ? 4 : tensor.dtype == kBool ? 1 : 2);
}

double Decode(uint16_t bits, int dtype) {
  if (dtype == kBFloat16) {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double sign = bits >> 15 ? -1.0 : 1.0;
  if (exponent == 31) return fraction ? std::nan("") : sign * kInfinity;
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

// Rounds to the nearest, ties to even, by counting in units of the last place.
uint16_t Encode(double value, int dtype) {
  const int precision = dtype == kBFloat16 ? 8 : 11, least = dtype == kBFloat16 ? -126 : -14;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const uint16_t infinity = dtype == kBFloat16 ? 0x7F80 : 0x7C00;
  if (std::isnan(value)) return infinity | 1 << (precision - 2);
  if (std::isinf(value)) return sign | infinity;
  if (value == 0.0) return sign;
  int exponent;
  std::frexp(value, &exponent);
  exponent = std::max(exponent - 1, least);  // of the leading bit
  const auto units =
      static_cast<int64_t>(std::nearbyint(std::ldexp(std::fabs(value), precision - 1 - exponent)));
  // A carry out of the fraction lands in the exponent, as it should.
  const int64_t bits = units + (static_cast<int64_t>(exponent - least) << (precision - 1));
  return sign | static_cast<uint16_t>(std::min<int64_t>(bits, infinity));
}

bool Checks::That(bool holds, const std::string& what, int otherwise) {
  if (status == kSuccess && !holds) {
    status = Violation(otherwise, function_ + ": " + what);
  }
  return status == kSuccess;
}

Tensor Checks::Contiguous(const char* name, const void* handle, std::vector<int> dtypes,
                          size_t rank) {
  const std::string text = name;
  if (!That(handle != nullptr, text + " is null", kNullParameter)) return {};
  const auto found = std::static_pointer_cast<Tensor>(Find("tensor", handle));
  if (!That(found != nullptr, text + " is not a live tensor")) return {};
  const Tensor& t = *found;
  That(std::count(dtypes.begin(), dtypes.end(), t.dtype) == 1,
       text + " has dtype " + std::to_string(t.dtype));
  That(t.dims.size() == rank, text + " has rank " + std::to_string(t.dims.size()));
  That(t.format == kNd, text + " is not ND");
  That(t.offset == 0, text + " has an offset");
  That(t.storage_dims == t.dims, text + " has a storage shape of its own");
  int64_t stride = 1;
  for (size_t axis = t.dims.size(); axis-- > 0;) {
    That(t.dims[axis] > 0, text + " is empty");
    That(t.strides[axis] == stride, text + " is not contiguous");
    stride *= t.dims[axis];
  }
  if (That(status == kSuccess, "")) {
    That(DeviceBytes(t.data, Bytes(t), CurrentDevice()) != nullptr,
         text + " is not in live device memory of that size");
  }
  return t;
}

std::vector<int64_t> Checks::Integers(const char* name, const void* handle) {
  if (!That(handle != nullptr, std::string(name) + " is null", kNullParameter)) return {};
  const auto found = std::static_pointer_cast<std::vector<int64_t> >(Find("integer array", handle));
  if (!That(found != nullptr, std::string(name) + " is not a live array")) return {};
  return *found;
}

void Checks::Dims(const char* name, const Tensor& tensor, std::vector<int64_t> expected) {
  That(tensor.dims == expected, std::string(name) + " has the wrong shape");
}

bool IsWindowSize(int64_t size) { return size >= 16 && size <= 128 && size % 16 == 0; }

bool EndsEarly(const char* function, uint64_t* workspace_size, void** executor, int* status) {
  const Fault fault = Enter(function, status);
  if (fault != Fault::kNull) return fault == Fault::kStatus;
  *workspace_size = 0;
  *executor = nullptr;
  *status = kSuccess;
  return true;
}

int Finish(std::shared_ptr<Executor> run, uint64_t* workspace_size, void** executor) {
  *workspace_size = run->workspace_size;
  *executor = NewHandle("executor", std::move(run));
  return kSuccess;
}

int Launch(const char* function, void* workspace, uint64_t workspace_size, void* executor,
           void* stream) {
  const std::lock_guard<std::recursive_mutex> lock(Mutex());
  int status = kSuccess;
  const bool fails = Enter(function, &status) == Fault::kStatus;
  const auto refuse = [&](const char* what) {
    return Violation(kInvalidOperand, std::string(function) + ": " + what);
  };
  const auto run = std::static_pointer_cast<Executor>(Find("executor", executor));
  if (run == nullptr) return refuse("not an executor, or used before");
  Remove("executor", executor);
  if (fails) return status;
  for (const void* tensor : run->handles) {
    if (tensor != nullptr && Find("tensor", tensor) == nullptr) {
      return refuse("a tensor was destroyed before");
    }
  }
  const uint64_t size = run->workspace_size;
  if (workspace_size < size) return refuse("the workspace is too small");
  if (DeviceBytes(workspace, size, CurrentDevice()) == nullptr) {
    return refuse("the workspace is not live device memory of its size");
  }
  Count("launches " STANDIN_LIBRARY, 1);
  Count(std::string("launches of ") + function, 1);
  return Enqueue(stream, [=](int device) {
    std::byte* scratch = DeviceBytes(workspace, size, device);
    for (const Tensor& tensor : run->tensors) {
      if (DeviceBytes(tensor.data, Bytes(tensor), device) == nullptr || scratch == nullptr) {
        Violation(kInvalidOperand, "the kernel runs on memory that was freed meanwhile");
        return;
      }
    }
    std::memset(scratch, 0xEE, size);  // it is the kernel's to write
    run->compute(device);
  });
}

void CountNotFinite(const Tensor& pool, int device) {
  const auto* values = Elements<uint16_t>(pool, device);
  Count("values in the pools that are not finite",
        std::count_if(values, values + Size(pool),
                      [&](uint16_t bits) { return !std::isfinite(Decode(bits, pool.dtype)); }));
}

}  // namespace standin
