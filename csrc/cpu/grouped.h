// Groups of rows: an activation whose rows are sorted by expert, and factors of which each expert
// has its own. Every expert's rows go through the kernel of one layer.
#pragma once

#include <exception>

#include "entry.h"
#include "threads.h"

namespace lorafast {

struct Groups {
  const int32_t* offsets;  // [experts + 1], the first row of each expert
  int64_t experts;
  const int64_t* rows;  // The index that each row has for dropout, or null for its own.

  Groups(Address offsets, int64_t experts, Address rows)
      : offsets(pointer<const int32_t>(offsets)),
        experts(experts),
        rows(pointer<const int64_t>(rows)) {}

  int64_t first(int64_t expert) const { return offsets[expert]; }
  int64_t count(int64_t expert) const { return offsets[expert + 1] - offsets[expert]; }

  // The dropout of one expert's rows.
  Dropout of(Dropout drop, int64_t expert) const {
    if (rows)
      drop.rows = rows + first(expert);
    else
      drop.first = first(expert);
    return drop;
  }
};

// Runs body(expert, threads) for every expert: for one with a large share of the rows by all
// threads, for the others by one each. A result does not depend on which of the two it was.
template <class Body>
void for_experts(const Groups& groups, int threads, Body&& body) {
  const int64_t share = ceil_div(groups.offsets[groups.experts], 2 * threads);
  const auto is_large = [&](int64_t expert) {
    return threads == 1 || groups.experts == 1 || groups.count(expert) > share;
  };
  for (int64_t expert = 0; expert < groups.experts; ++expert)
    if (is_large(expert)) body(expert, threads);
  if (threads == 1) return;
  std::exception_ptr failure;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t expert = 0; expert < groups.experts; ++expert) {
    if (is_large(expert)) continue;
    // A team of one: the loops inside of a kernel are not shared with the team out here.
#pragma omp parallel num_threads(1)
    try {
      body(expert, 1);
    } catch (...) {
#pragma omp critical
      failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

// The address of the element at an offset, of an operand that may be absent.
inline Address at(Address data, int64_t offset, int64_t element_size) {
  return data ? data + offset * element_size : 0;
}
inline int64_t size_of(int type) { return static_cast<Type>(type) == Type::fp32 ? 4 : 2; }

}  // namespace lorafast
