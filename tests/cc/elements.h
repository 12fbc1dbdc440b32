// Memory and numbers of the C++ tests: buffers that nothing can reach beyond, and arrays of any
// floating dtype in them.

#ifndef JAX_NSA_TESTS_ELEMENTS_H_
#define JAX_NSA_TESTS_ELEMENTS_H_

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "paged.h"

namespace jax_nsa::testing {

// Memory of exactly so many bytes. What follows cannot be touched, from the next multiple of
// `alignment` on; nor what comes before the pages that it lies in. Starts `offset` bytes past a
// multiple of `alignment`.
class Buffer {
 public:
  explicit Buffer(size_t bytes, size_t alignment = 1, size_t offset = 0) : size_(bytes) {
    const size_t page = sysconf(_SC_PAGESIZE);
    const size_t used = (bytes + offset + alignment - 1) / alignment * alignment;
    mapped_ = (used + page - 1) / page * page + 2 * page;
    void* const memory =
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    base_ = static_cast<char*>(memory);
    char* const end = base_ + mapped_ - page;
    if (mprotect(base_, page, PROT_NONE) != 0 || mprotect(end, page, PROT_NONE) != 0) std::abort();
    data_ = end - used + offset;
  }
  ~Buffer() { munmap(base_, mapped_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  char* data() const { return data_; }
  size_t size() const { return size_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  std::string bytes() const { return std::string(data_, size_); }

 private:
  char *base_, *data_;
  size_t mapped_, size_;
};

inline int64_t SizeOf(DataType dtype) { return dtype == DataType::kFloat32 ? 4 : 2; }

// To the nearest, of two equally near the even one.
inline uint16_t ToFloat16(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::abs(value);
  if (std::isnan(value)) return 0x7e00;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));
  int exponent;
  const float mantissa = std::frexp(size, &exponent);  // in [0.5, 1)
  const int digits = static_cast<int>(std::nearbyint(std::ldexp(mantissa, 11))) - 1024;
  return sign | static_cast<uint16_t>(((exponent + 14) << 10) + digits);
}

inline float FromFloat16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double size = exponent == 31 ? (mantissa ? std::nan("") : INFINITY)
                      : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                     : std::ldexp(mantissa, -24);
  return static_cast<float>(bits >> 15 ? -size : size);
}

inline float Decode(DataType dtype, const char* source) {
  uint32_t bits = 0;
  std::memcpy(&bits, source, SizeOf(dtype));
  if (dtype == DataType::kFloat16) return FromFloat16(static_cast<uint16_t>(bits));
  if (dtype == DataType::kBFloat16) bits <<= 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounds as ToFloat16 does.
inline void Encode(DataType dtype, float value, char* target) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (dtype == DataType::kFloat16) bits = ToFloat16(value);
  if (dtype == DataType::kBFloat16) {
    bits = std::isnan(value) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
  std::memcpy(target, &bits, SizeOf(dtype));
}

// Elements of a floating dtype.
class Elements {
 public:
  Elements(DataType dtype, int64_t count, int64_t alignment = 1, int64_t offset = 0)
      : dtype_(dtype), buffer_(count * SizeOf(dtype), alignment, offset) {}

  const Buffer& buffer() const { return buffer_; }
  char* data() const { return buffer_.data(); }
  std::string bytes() const { return buffer_.bytes(); }
  float Get(int64_t i) const { return Decode(dtype_, data() + i * SizeOf(dtype_)); }
  void Set(int64_t i, float value) { Encode(dtype_, value, data() + i * SizeOf(dtype_)); }
  void Fill(float value) {
    for (size_t i = 0; i < buffer_.size() / SizeOf(dtype_); ++i) Set(i, value);
  }

 private:
  DataType dtype_;
  Buffer buffer_;
};

}  // namespace jax_nsa::testing

#endif  // JAX_NSA_TESTS_ELEMENTS_H_
