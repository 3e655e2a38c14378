// The dropout bits: Philox-4x32-7, one call for 8 adjacent columns. The bits equal those of
// lorafast/engine/philox.py.
#pragma once

#include <cstring>
#include <type_traits>

#include "types.h"
#include "vector.h"

namespace lorafast {

constexpr int ROUNDS = 7;
constexpr uint32_t MULTIPLY0 = 0xD2511F53, MULTIPLY1 = 0xCD9E8D57, WEYL0 = 0x9E3779B9,
                   WEYL1 = 0xBB67AE85;

// The round keys, and what the first two rounds have in common for all counters with one high word.
// The other two words of a counter are 0, so two of the four products of these rounds are
// constants.
struct FirstRounds {
  uint32_t k0[ROUNDS], k1[ROUNDS];
  uint32_t c2, c3;

  FirstRounds(uint64_t seed, uint32_t high) {
    for (int round = 0; round < ROUNDS; ++round) {
      k0[round] = static_cast<uint32_t>(seed) + round * WEYL0;
      k1[round] = static_cast<uint32_t>(seed >> 32) + round * WEYL1;
    }
    const uint64_t product = static_cast<uint64_t>(high ^ k0[0]) * MULTIPLY0;
    c2 = static_cast<uint32_t>(product >> 32) ^ k1[1];
    c3 = static_cast<uint32_t>(product);
  }
};

// Bit i of out[g] is 1 if 16-bit half i of call counter + g is at least the threshold, that is, if
// the element is kept. The counters share their high word. Writes up to PHILOX_SLACK bytes beyond
// `groups`.
#if defined(__AVX512F__)
constexpr int PHILOX_SLACK = 7;

inline void keep_bits_one_high_word(const FirstRounds& key, uint64_t counter, int64_t groups,
                                    uint32_t threshold, uint8_t* out) {
  const __m512i m0 = _mm512_set1_epi64(MULTIPLY0), m1 = _mm512_set1_epi64(MULTIPLY1),
                limit = _mm512_set1_epi16(threshold);
  // Lane 2L + j computes counter 4j + L: unpacking the words then leaves the counters in order.
  const __m512i lanes = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7),
                step = _mm512_set1_epi64(8ull * MULTIPLY0);
  __m512i first_product = _mm512_mul_epu32(_mm512_add_epi64(_mm512_set1_epi64(counter), lanes), m0);
  // 64·C draws of 16 bits. A word is in the low half of a 64-bit lane; the high half is never read.
  const auto draw = [&](auto calls, uint8_t* to) {
    constexpr int C = decltype(calls)::value;
    __m512i c0[C], c1[C], c2[C], c3[C];
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i, first_product = _mm512_add_epi64(first_product, step)) {
      c1[i] = _mm512_mul_epu32(
          _mm512_xor_si512(_mm512_srli_epi64(first_product, 32), _mm512_set1_epi64(key.k1[0])), m1);
      c0[i] = _mm512_xor_si512(_mm512_srli_epi64(c1[i], 32), _mm512_set1_epi64(key.k0[1]));
      c2[i] = _mm512_xor_si512(first_product, _mm512_set1_epi64(key.c2));
      c3[i] = _mm512_set1_epi64(key.c3);
    }
#pragma GCC unroll 7
    for (int round = 2; round < ROUNDS; ++round)
#pragma GCC unroll 4
      for (int i = 0; i < C; ++i) {
        const __m512i p = _mm512_mul_epu32(c0[i], m0), q = _mm512_mul_epu32(c2[i], m1);
        c0[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(q, 32), c1[i],
                                          _mm512_set1_epi64(key.k0[round]), 0x96);
        c2[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p, 32), c3[i],
                                          _mm512_set1_epi64(key.k1[round]), 0x96);
        c1[i] = q;
        c3[i] = p;
      }
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) {
      const __m512i front = _mm512_mask_shuffle_epi32(c0[i], 0xAAAA, c2[i], _MM_PERM_CCAA);
      const __m512i back = _mm512_mask_shuffle_epi32(c1[i], 0xAAAA, c3[i], _MM_PERM_CCAA);
      const uint32_t bits[2] = {_mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(front, back), limit),
                                _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(front, back), limit)};
      std::memcpy(to + 8 * i, bits, sizeof bits);
    }
  };
  int64_t g = 0;
  for (; g + 32 <= groups; g += 32) draw(std::integral_constant<int, 4>{}, out + g);
  for (; g < groups; g += 8) draw(std::integral_constant<int, 1>{}, out + g);
}
#elif defined(__AVX2__)
constexpr int PHILOX_SLACK = 3;

inline void keep_bits_one_high_word(const FirstRounds& key, uint64_t counter, int64_t groups,
                                    uint32_t threshold, uint8_t* out) {
  const __m256i m0 = _mm256_set1_epi64x(MULTIPLY0), m1 = _mm256_set1_epi64x(MULTIPLY1),
                limit = _mm256_set1_epi16(threshold);
  for (int64_t g = 0; g < groups; g += 4) {
    // Each word is in the low half of a 64-bit lane; the high half is never read.
    const __m256i p1 = _mm256_mul_epu32(
        _mm256_add_epi64(_mm256_set1_epi64x(counter + g), _mm256_setr_epi64x(0, 1, 2, 3)), m0);
    const __m256i q2 = _mm256_mul_epu32(
        _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_set1_epi64x(key.k1[0])), m1);
    __m256i c0 = _mm256_xor_si256(_mm256_srli_epi64(q2, 32), _mm256_set1_epi64x(key.k0[1])),
            c1 = q2;
    __m256i c2 = _mm256_xor_si256(p1, _mm256_set1_epi64x(key.c2)), c3 = _mm256_set1_epi64x(key.c3);
#pragma GCC unroll 7
    for (int round = 2; round < ROUNDS; ++round) {
      const __m256i p = _mm256_mul_epu32(c0, m0), q = _mm256_mul_epu32(c2, m1);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(q, 32), c1),
                            _mm256_set1_epi64x(key.k0[round]));
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p, 32), c3),
                            _mm256_set1_epi64x(key.k1[round]));
      c1 = q;
      c3 = p;
    }
    const __m256i front = _mm256_blend_epi32(c0, _mm256_slli_epi64(c2, 32), 0xAA);
    const __m256i back = _mm256_blend_epi32(c1, _mm256_slli_epi64(c3, 32), 0xAA);
    const __m256i even = _mm256_unpacklo_epi64(front, back),
                  odd = _mm256_unpackhi_epi64(front, back);
    const __m256i keeps_even = _mm256_cmpeq_epi16(_mm256_max_epu16(even, limit), even);
    const __m256i keeps_odd = _mm256_cmpeq_epi16(_mm256_max_epu16(odd, limit), odd);
    const int bits = _mm256_movemask_epi8(_mm256_packs_epi16(keeps_even, keeps_odd));
    std::memcpy(out + g, &bits, sizeof bits);
  }
}
#else
constexpr int PHILOX_SLACK = 0;

inline void keep_bits_one_high_word(const FirstRounds& key, uint64_t counter, int64_t groups,
                                    uint32_t threshold, uint8_t* out) {
  for (int64_t g = 0; g < groups; ++g) {
    uint32_t c0 = counter + g, c1 = (counter + g) >> 32, c2 = 0, c3 = 0;
    for (int round = 0; round < ROUNDS; ++round) {
      const uint64_t p = static_cast<uint64_t>(c0) * MULTIPLY0,
                     q = static_cast<uint64_t>(c2) * MULTIPLY1;
      c0 = static_cast<uint32_t>(q >> 32) ^ c1 ^ key.k0[round];
      c2 = static_cast<uint32_t>(p >> 32) ^ c3 ^ key.k1[round];
      c1 = static_cast<uint32_t>(q);
      c3 = static_cast<uint32_t>(p);
    }
    const uint32_t words[4] = {c0, c2, c1, c3};
    uint8_t bits = 0;
    for (int i = 0; i < 8; ++i) bits |= ((words[i / 2] >> (i % 2 * 16) & 0xFFFF) >= threshold) << i;
    out[g] = bits;
  }
}
#endif

// The same for any counters. The second run starts where the high word changes; it overwrites the
// bytes that the first run wrote beyond its end.
inline void keep_bits(uint64_t seed, uint64_t counter, int64_t groups, uint32_t threshold,
                      uint8_t* out) {
  const uint64_t high = counter >> 32;
  const int64_t first = min(groups, static_cast<int64_t>(((high + 1) << 32) - counter));
  keep_bits_one_high_word(FirstRounds(seed, static_cast<uint32_t>(high)), counter, first, threshold,
                          out);
  if (first < groups)
    keep_bits_one_high_word(FirstRounds(seed, static_cast<uint32_t>(high + 1)), counter + first,
                            groups - first, threshold, out + first);
}

// The keep bits of columns k0 .. k0+n of rows m0 .. m0+rows of an activation with K columns; those
// of row i start at out + i·stride. k0 is a multiple of 8.
inline void keep_tile(const Dropout& drop, int64_t K, int64_t m0, int64_t rows, int64_t k0,
                      int64_t n, uint8_t* out, int64_t stride) {
  const int64_t groups = ceil_div(K, 8);
  for (int64_t i = 0; i < rows; ++i)
    keep_bits(drop.seed, drop.row(m0 + i) * groups + k0 / 8, ceil_div(n, 8), drop.threshold,
              out + i * stride);
}

}  // namespace lorafast
