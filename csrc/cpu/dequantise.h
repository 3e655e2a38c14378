// dequantise_4bit: code[index] · absmax of its block, multiplied in fp32 and rounded once.
#pragma once

#include <cstring>

#include "threads.h"
#include "vector.h"

namespace lorafast {

// Numbers of a task, a multiple of every usual blocksize.
constexpr int64_t DEQUANTISE_NUMBERS = 1 << 15;

// Numbers in 4 bits, two in a byte, the high half first, in blocks that share an absmax.
struct FourBits {
  const uint8_t* packed;
  const float *absmax, *code;  // [blocks], [16]
  int64_t blocksize;
};

// The first `count` numbers of the bytes, count < LOOKUP_NUMBERS. Bytes beyond them are not read.
template <class T>
void look_up_first(const Lookup<T>& lookup, const uint8_t* packed, T* to, int64_t count) {
  uint8_t bytes[LOOKUP_NUMBERS / 2] = {};
  T numbers[LOOKUP_NUMBERS];
  std::memcpy(bytes, packed, (count + 1) / 2);
  lookup.store(numbers, bytes);
  std::memcpy(to, numbers, count * sizeof(T));
}

// out = the numbers first … stop. A block has sixteen different ones: they are multiplied and
// rounded once for the block, and then looked up.
template <class T>
void dequantise_run(const FourBits& from, int64_t first, int64_t stop, T* out) {
  int64_t block = first / from.blocksize;
  for (int64_t i = first; i < stop; ++block) {
    const int64_t end = min((block + 1) * from.blocksize, stop);
    const Vector absmax = broadcast(from.absmax[block]);
    T values[16];
    for (int k = 0; k < 16; k += W) store(values + k, mul(load(from.code + k), absmax));
    const Lookup<T> lookup(values);
    const uint8_t* packed = from.packed + i / 2;
    // An odd number is the low half of a byte.
    if (i % 2) {
      out[i - first] = values[*packed++ & 15];
      ++i;
    }
    for (; i + LOOKUP_NUMBERS <= end; i += LOOKUP_NUMBERS, packed += LOOKUP_NUMBERS / 2)
      lookup.store(out + (i - first), packed);
    if (i < end) look_up_first(lookup, packed, out + (i - first), end - i);
    i = end;
  }
}

// out [count] = the numbers first … first + count.
template <class T>
void dequantise_4bit(const FourBits& from, int64_t first, int64_t count, T* out, int threads) {
  // Tasks begin at multiples of their size, where a block does, too.
  const int64_t stop = first + count, task0 = first / DEQUANTISE_NUMBERS;
  parallel(threads, [&] {
    parallel_for(ceil_div(stop, DEQUANTISE_NUMBERS) - task0, [&](int64_t task) {
      const int64_t begin = max(first, (task0 + task) * DEQUANTISE_NUMBERS),
                    end = min(stop, (task0 + task + 1) * DEQUANTISE_NUMBERS);
      dequantise_run(from, begin, end, out + (begin - first));
    });
  });
}

}  // namespace lorafast
