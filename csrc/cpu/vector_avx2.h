// Vectors of 8 lanes in AVX2, with FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "types.h"

namespace lorafast {

using Vector = __m256;
constexpr int W = 8;
// Tile sizes: the sums of a tile and the operands being multiplied fit in 16 registers.
constexpr int PROJECT_ROWS = 3, PROJECT_RANKS = 4, LOW_RANK_ADD_ROWS = 6, LOW_RANK_ADD_VECTORS = 2,
              GRAD_PROJECT_ROWS = 4, GRAD_PROJECT_VECTORS = 2, LINEAR_TILE = 2;

inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector broadcast(float a) { return _mm256_set1_ps(a); }
inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline Vector fma(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }
inline float sum_lanes(Vector a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
// to[0..3] += the sums of the lanes of four vectors.
inline void add_lane_sums(Vector a, Vector b, Vector c, Vector d, float* to) {
  const Vector all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), four));
}

inline Vector widen(__m128i bf) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf), 16));
}

inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
inline Vector load(const bf16* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vector load(const fp16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Rounds to nearest, ties to even.
inline __m128i narrow(Vector v) {
  const __m256i bits = _mm256_castps_si256(v),
                odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
inline __m128i to_fp16(Vector v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

inline void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
inline void store(bf16* p, Vector v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v)); }
inline void store(fp16* p, Vector v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_fp16(v));
}

template <class T>
inline Vector load_first(const T* p, int n) {
  T whole[W] = {};
  std::memcpy(whole, p, n * sizeof(T));
  return load(whole);
}
template <class T>
inline void store_first(T* p, Vector v, int n) {
  T whole[W];
  store(whole, v);
  std::memcpy(p, whole, n * sizeof(T));
}

// v with every lane whose bit is 0 set to 0, even if it holds NaN or an infinity.
inline Vector keep(Vector v, const uint8_t* bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(*bits), lane), lane);
  return _mm256_and_ps(v, _mm256_castsi256_ps(kept));
}

// Sixteen numbers of 16 bits, among which four bits choose.
template <class T>
struct Lookup {
  __m128i low, high;  // their low and their high bytes

  explicit Lookup(const T* sixteen) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen)),
                  b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen + 8)),
                  byte = _mm_set1_epi16(255);
    low = _mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte));
    high = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
  }
  // to[0..31] = those of the halves of 16 bytes, the high half first.
  void store(T* to, const uint8_t* packed) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)),
                  four = _mm_set1_epi8(15), first = _mm_and_si128(_mm_srli_epi16(bytes, 4), four),
                  second = _mm_and_si128(bytes, four);
    store_eight_pairs(to, _mm_unpacklo_epi8(first, second));
    store_eight_pairs(to + 16, _mm_unpackhi_epi8(first, second));
  }

 private:
  void store_eight_pairs(T* to, __m128i index) const {
    const __m128i l = _mm_shuffle_epi8(low, index), h = _mm_shuffle_epi8(high, index);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi8(l, h));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), _mm_unpackhi_epi8(l, h));
  }
};
// The same of fp32.
template <>
struct Lookup<float> {
  Vector low, high;  // the first eight, and the others

  explicit Lookup(const float* sixteen) : low(load(sixteen)), high(load(sixteen + W)) {}
  void store(float* to, const uint8_t* packed) const {
    for (int i = 0; i < 4; ++i) {
      int32_t four;
      std::memcpy(&four, packed + 4 * i, sizeof four);
      const __m256i byte = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
      const __m256i index =
          _mm256_or_si256(_mm256_srli_epi64(byte, 4), _mm256_slli_epi64(byte, 32));
      // A permutation takes three bits of an index; the fourth, moved to the sign, chooses.
      _mm256_storeu_ps(to + W * i,
                       _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                        _mm256_permutevar8x32_ps(high, index),
                                        _mm256_castsi256_ps(_mm256_slli_epi32(index, 28))));
    }
  }
};

constexpr const char* ISA = "avx2";

}  // namespace lorafast
