// Vectors of 16 lanes in AVX-512 (F, BW, VL, DQ), with bf16 products if the processor has them.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace lorafast {

using Vector = __m512;
constexpr int W = 16;
// Tile sizes: the sums of a tile and the operands being multiplied fit in 32 registers.
constexpr int PROJECT_ROWS = 6, PROJECT_RANKS = 4, LOW_RANK_ADD_ROWS = 6, LOW_RANK_ADD_VECTORS = 4,
              GRAD_PROJECT_ROWS = 8, GRAD_PROJECT_VECTORS = 2, LINEAR_TILE = 6;

inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector broadcast(float a) { return _mm512_set1_ps(a); }
inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector fma(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
inline float sum_lanes(Vector a) { return _mm512_reduce_add_ps(a); }
// to[0..3] += the sums of the lanes of four vectors.
inline void add_lane_sums(Vector a, Vector b, Vector c, Vector d, float* to) {
  const Vector ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vector cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_castps_pd(ab), high = _mm512_castps_pd(cd);
  const Vector all = add(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), _mm_add_ps(_mm256_castps256_ps128(half),
                                                            _mm256_extractf128_ps(half, 1))));
}

inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vector widen(__m256i bf) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf), 16));
}

inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
inline Vector load(const bf16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vector load(const fp16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vector load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline Vector load_first(const bf16* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
inline Vector load_first(const fp16* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}

// Rounds to nearest, ties to even.
inline __m256i narrow(Vector v) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0)));
#endif
}
inline __m256i to_fp16(Vector v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

inline void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
inline void store(bf16* p, Vector v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v));
}
inline void store(fp16* p, Vector v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_fp16(v));
}
inline void store_first(float* p, Vector v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
inline void store_first(bf16* p, Vector v, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(v));
}
inline void store_first(fp16* p, Vector v, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), to_fp16(v));
}

// v with every lane whose bit is 0 set to 0, even if it holds NaN or an infinity.
inline Vector keep(Vector v, const uint8_t* bits) {
  return _mm512_maskz_mov_ps(*reinterpret_cast<const uint16_t*>(bits), v);
}

// Sixteen numbers of 16 bits, among which four bits choose.
template <class T>
struct Lookup {
  __m512i values;  // twice: an index has five bits, of which the upper one is of another number

  explicit Lookup(const T* sixteen)
      : values(
            _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(sixteen)))) {
  }
  // to[0..31] = those of the halves of 16 bytes, the high half first.
  void store(T* to, const uint8_t* packed) const {
    const __m512i byte =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(index, values));
  }
};
// The same of fp32.
template <>
struct Lookup<float> {
  __m512 values;

  explicit Lookup(const float* sixteen) : values(_mm512_loadu_ps(sixteen)) {}
  void store(float* to, const uint8_t* packed) const {
    for (int half = 0; half < 2; ++half) {
      const __m512i byte = _mm512_cvtepu8_epi64(
          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + 8 * half)));
      // An index is the low four bits; those above them do not count.
      const __m512i index =
          _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
      _mm512_storeu_ps(to + W * half, _mm512_permutexvar_ps(index, values));
    }
  }
};

#ifdef __AVX512BF16__
#define LORAFAST_PAIRS
constexpr const char* ISA = "avx512bf16";

inline Vector mac_pairs(Vector sum, Vector a, Vector b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}
// Cells of two vectors of numbers: cell i is (a[i], b[i]).
inline Vector pair(Vector a, Vector b) {
  const __m512i low = _mm512_cvtepu16_epi32(narrow(a)), high = _mm512_cvtepu16_epi32(narrow(b));
  return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
// W cells of the first n of 2W adjacent numbers; numbers whose bit is 0 are 0.
inline Vector load_pairs(const bf16* from, int64_t n, const uint8_t* bits) {
  const __mmask32 there = n >= 32 ? 0xFFFFFFFFu : (1u << n) - 1;
  const __mmask32 kept = bits ? *reinterpret_cast<const uint32_t*>(bits) & there : there;
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(kept, from));
}
inline Vector load_pairs(const bf16* from, const uint8_t* bits) {
  return _mm512_castsi512_ps(
      _mm512_maskz_loadu_epi16(*reinterpret_cast<const uint32_t*>(bits), from));
}
// Two rows of 2W numbers, read as pairs along the rows, stored as pairs across them: cell i is
// (a[i], b[i]).
inline void interleave(Vector a, Vector b, float* to) {
  static const uint16_t LOW[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                   8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_loadu_si512(LOW), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i u = _mm512_castps_si512(a), v = _mm512_castps_si512(b);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(u, low, v));
  _mm512_storeu_si512(to + W, _mm512_permutex2var_epi16(u, high, v));
}
#else
constexpr const char* ISA = "avx512";

#endif

}  // namespace lorafast
