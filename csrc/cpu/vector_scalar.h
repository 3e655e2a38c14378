// Vectors of 8 lanes in plain C++, for any processor. The compiler may vectorise the loops.
#pragma once

#include <cmath>
#include <cstring>

#include "types.h"

namespace lorafast {

struct Vector {
  float lane[8];
};
constexpr int W = 8;
constexpr int PROJECT_ROWS = 2, PROJECT_RANKS = 4, LOW_RANK_ADD_ROWS = 2, LOW_RANK_ADD_VECTORS = 1,
              GRAD_PROJECT_ROWS = 4, GRAD_PROJECT_VECTORS = 1, LINEAR_TILE = 1;

inline float widen(bf16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline float widen(fp16 a) {
  const uint32_t sign = (a.bits & 0x8000u) << 16, exponent = (a.bits >> 10) & 31,
                 fraction = a.bits & 1023;
  if (exponent == 0) return (sign ? -1 : 1) * std::ldexp(static_cast<float>(fraction), -24);
  const uint32_t bits =
      sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline float widen(float a) { return a; }

// Rounds to nearest, ties to even.
inline void narrow(float a, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  out->bits = a != a ? 0x7FC0 : static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float a, fp16* out) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  const uint16_t sign = (bits >> 16) & 0x8000;
  const float size = std::fabs(a);
  if (a != a) {
    out->bits = sign | 0x7E00;
  } else if (size >= 65520.0f) {
    out->bits = sign | 0x7C00;
  } else if (size < 0x1p-14f) {
    out->bits = sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f));
  } else {
    bits &= 0x7FFFFFFF;
    out->bits =
        sign | static_cast<uint16_t>((bits - (112u << 23) + 0xFFF + ((bits >> 13) & 1)) >> 13);
  }
}
inline void narrow(float a, float* out) { *out = a; }

inline Vector broadcast(float a) { return {{a, a, a, a, a, a, a, a}}; }
inline Vector zero() { return broadcast(0); }
inline Vector add(Vector a, Vector b) {
  for (int i = 0; i < W; ++i) a.lane[i] += b.lane[i];
  return a;
}
inline Vector mul(Vector a, Vector b) {
  for (int i = 0; i < W; ++i) a.lane[i] *= b.lane[i];
  return a;
}
inline Vector fma(Vector a, Vector b, Vector sum) {
  for (int i = 0; i < W; ++i) sum.lane[i] += a.lane[i] * b.lane[i];
  return sum;
}
inline float sum_lanes(Vector a) {
  for (int step = W / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) a.lane[i] += a.lane[i + step];
  return a.lane[0];
}
// to[0..3] += the sums of the lanes of four vectors.
inline void add_lane_sums(Vector a, Vector b, Vector c, Vector d, float* to) {
  to[0] += sum_lanes(a);
  to[1] += sum_lanes(b);
  to[2] += sum_lanes(c);
  to[3] += sum_lanes(d);
}

template <class T>
inline Vector load_first(const T* p, int n) {
  Vector v = zero();
  for (int i = 0; i < n; ++i) v.lane[i] = widen(p[i]);
  return v;
}
template <class T>
inline void store_first(T* p, Vector v, int n) {
  for (int i = 0; i < n; ++i) narrow(v.lane[i], p + i);
}
template <class T>
inline Vector load(const T* p) {
  return load_first(p, W);
}
template <class T>
inline void store(T* p, Vector v) {
  store_first(p, v, W);
}

// v with every lane whose bit is 0 set to 0, even if it holds NaN or an infinity.
inline Vector keep(Vector v, const uint8_t* bits) {
  for (int i = 0; i < W; ++i) v.lane[i] = *bits >> i & 1 ? v.lane[i] : 0.0f;
  return v;
}

// Sixteen numbers, among which four bits choose.
template <class T>
struct Lookup {
  T values[16];

  explicit Lookup(const T* sixteen) { std::memcpy(values, sixteen, sizeof values); }
  // to[0..31] = those of the halves of 16 bytes, the high half first.
  void store(T* to, const uint8_t* packed) const {
    for (int i = 0; i < 16; ++i) {
      to[2 * i] = values[packed[i] >> 4];
      to[2 * i + 1] = values[packed[i] & 15];
    }
  }
};

constexpr const char* ISA = "scalar";

}  // namespace lorafast
