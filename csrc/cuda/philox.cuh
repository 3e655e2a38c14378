// The dropout bits: those of lorafast/engine/philox.py, for eight neighbours a call.
#pragma once
#include "types.cuh"

namespace lorafast {

// Both words of a product. As a product of 64-bit numbers it takes further instructions.
DEVICE uint64 product(uint32 a, uint32 b) {
  uint64 both;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(both) : "r"(a), "r"(b));
  return both;
}

// Dropout of a flattened activation [M,K]. groups: ⌈K/8⌉. threshold: t in both halves of the word.
struct Dropout {
  uint32 key[7][2];
  int64 groups;
  uint32 threshold;

  DEVICE Dropout(const int64* seed, int64 groups, uint32 threshold)
      : groups(groups), threshold(threshold) {
    const uint64 both = seed ? uint64(__ldg(seed)) : 0;
    uint32 low = uint32(both), high = uint32(both >> 32);
#pragma unroll
    for (int i = 0; i < 7; ++i) {
      key[i][0] = low;
      key[i][1] = high;
      low += 0x9E3779B9u;
      high += 0xBB67AE85u;
    }
  }

  // 0xFFFF in each half of a word that is at least t, zero in the others, both at once.
  DEVICE uint32 kept(uint32 word) const {
    // The top bits, set, keep one half's borrow out of the other, and stay set if none was taken.
    const uint32 difference = (word | 0x80008000u) - (threshold & 0x7FFF7FFFu);
    const uint32 at_least = (word & ~threshold) | (~(word ^ threshold) & difference);
    uint32 mask;
    asm("prmt.b32 %0, %1, 0, 0xBB99;" : "=r"(mask) : "r"(at_least));
    return mask;
  }

  // Eight halves of 16 bits for eight neighbours, two in a word, low half first.
  // counter: m·groups + k/8.
  DEVICE void words(uint32 (&word)[4], uint64 counter) const {
    uint32 c0 = uint32(counter), c1 = uint32(counter >> 32), c2 = 0, c3 = 0;
#pragma unroll
    for (int i = 0; i < 7; ++i) {
      const uint64 from_c0 = product(c0, 0xD2511F53u), from_c2 = product(c2, 0xCD9E8D57u);
      c0 = uint32(from_c2 >> 32) ^ c1 ^ key[i][0];
      c2 = uint32(from_c0 >> 32) ^ c3 ^ key[i][1];
      c1 = uint32(from_c2);
      c3 = uint32(from_c0);
    }
    word[0] = c0;
    word[1] = c2;
    word[2] = c1;
    word[3] = c3;
  }

  // True if neighbour i of a call's words is kept. What lies below a half does not count: a word is
  // at least t·2^16 if its high half is at least t.
  DEVICE bool keeps(const uint32 (&word)[4], int i) const {
    const uint32 half = i % 2 ? word[i / 2] : word[i / 2] << 16;
    return half >= threshold << 16;
  }

  // Zeros in place of the dropped ones of eight neighbours. A dropped NaN is zero too.
  template <class T>
  DEVICE void drop(Eight<T>& x, uint64 counter) const {
    uint32 word[4];
    words(word, counter);
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x.word[i] = keeps(word, i) ? x.word[i] : 0;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) x.word[i] &= kept(word[i]);
    }
  }
};

}  // namespace lorafast
