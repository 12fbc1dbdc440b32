// What the C++ tests need of a test framework: EXPECT(condition) << "context", and an exit status.

#ifndef JAX_NSA_TESTS_EXPECT_H_
#define JAX_NSA_TESTS_EXPECT_H_

#include <cstdlib>
#include <iostream>

namespace jax_nsa::testing {

inline int failures = 0;

// Prints one failure, with the context streamed into it.
class Failure {
 public:
  Failure(const char* file, int line, const char* condition) {
    ++failures;
    std::cerr << file << ":" << line << ": " << condition << " does not hold; ";
  }
  ~Failure() { std::cerr << "\n"; }
  Failure(const Failure&) = delete;
  Failure& operator=(const Failure&) = delete;

  template <typename T>
  Failure& operator<<(const T& context) {
    std::cerr << context;
    return *this;
  }
};

// What main() returns.
inline int ExitStatus() { return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE; }

}  // namespace jax_nsa::testing

#define EXPECT(condition) \
  if (condition) {        \
  } else                  \
    jax_nsa::testing::Failure(__FILE__, __LINE__, #condition)

#endif  // JAX_NSA_TESTS_EXPECT_H_
