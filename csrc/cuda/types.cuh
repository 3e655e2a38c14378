// Numbers, and loads and stores of neighbours. nvcc and NVRTC compile it: no header of the host.
#pragma once

#define DEVICE __device__ __forceinline__

namespace lorafast {

using int64 = long long;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;

struct bf16 {
  uint16 bits;
};
struct fp16 {
  uint16 bits;
};

// LORAFAST_DTYPE and every parameter `..._dtype` is one of these.
enum Dtype { BF16 = 0, FP16 = 1, FP32 = 2 };
template <int DTYPE>
struct TypeOf;
template <>
struct TypeOf<BF16> {
  using type = bf16;
};
template <>
struct TypeOf<FP16> {
  using type = fp16;
};
template <>
struct TypeOf<FP32> {
  using type = float;
};

DEVICE float from_bits(uint32 bits) { return __uint_as_float(bits); }

// The fp32 number of a 16-bit pattern in the low half of a word, and in the high half.
template <class T>
DEVICE float low_half(uint32 word);
template <>
DEVICE float low_half<bf16>(uint32 word) {
  return from_bits(word << 16);
}
template <>
DEVICE float low_half<fp16>(uint32 word) {
  float value;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}"
      : "=f"(value)
      : "r"(word));
  return value;
}
template <class T>
DEVICE float high_half(uint32 word);
template <>
DEVICE float high_half<bf16>(uint32 word) {
  return from_bits(word & 0xFFFF0000u);
}
template <>
DEVICE float high_half<fp16>(uint32 word) {
  float value;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}"
      : "=f"(value)
      : "r"(word));
  return value;
}

// Two fp32 numbers, each rounded once, as one word.
template <class T>
DEVICE uint32 rounded_pair(float low, float high);
template <>
DEVICE uint32 rounded_pair<bf16>(float low, float high) {
  uint32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
DEVICE uint32 rounded_pair<fp16>(float low, float high) {
  uint32 word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

template <class T>
DEVICE T rounded(float value) {
  return {uint16(rounded_pair<T>(value, 0.0f))};
}
template <>
DEVICE float rounded<float>(float value) {
  return value;
}
template <class T>
DEVICE float widened(T value) {
  return low_half<T>(value.bits);
}
template <>
DEVICE float widened<float>(float value) {
  return value;
}

// One number of a small operand, whose dtype the kernel is not compiled for.
DEVICE float number_at(const void* data, int dtype, int64 i) {
  if (dtype == FP32) return __ldg(static_cast<const float*>(data) + i);
  const uint32 word = __ldg(static_cast<const uint16*>(data) + i);
  return dtype == BF16 ? low_half<bf16>(word) : low_half<fp16>(word);
}

// a/b, and 0 where b is 0.
DEVICE float divided(float a, float b) { return b == 0 ? 0.0f : __fdiv_rn(a, b); }

// A gain [N]: magnitude/norm, or magnitude itself if norm is null; 1 without a magnitude.
struct Gain {
  const void* magnitude;
  const float* norm;
  int dtype;

  DEVICE float at(int64 n) const {
    if (!magnitude) return 1;
    const float m = number_at(magnitude, dtype, n);
    return norm ? divided(m, __ldg(norm + n)) : m;
  }
};

// Several of them at `at`: the loads of all are made at once, and not behind a branch each.
template <int COUNT>
DEVICE void numbers_at(float (&to)[COUNT], const void* data, int dtype, const int64 (&at)[COUNT]) {
  if (dtype == FP32) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = __ldg(static_cast<const float*>(data) + at[i]);
  } else {
    uint32 word[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) word[i] = __ldg(static_cast<const uint16*>(data) + at[i]);
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      to[i] = dtype == BF16 ? low_half<bf16>(word[i]) : low_half<fp16>(word[i]);
  }
}

// COUNT neighbours, as words: two numbers in each for 16-bit types.
template <class T, int COUNT>
struct Neighbours {
  static constexpr int WORDS = COUNT * sizeof(T) / 4;
  uint32 word[WORDS];

  DEVICE float operator[](int i) const {
    if constexpr (sizeof(T) == 4) {
      return from_bits(word[i]);
    } else {
      return i % 2 ? high_half<T>(word[i / 2]) : low_half<T>(word[i / 2]);
    }
  }
};
template <class T>
using Eight = Neighbours<T, 8>;

// A load that leaves L1 to what is read again.
DEVICE uint4 load_once(const uint4* from) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from));
  return v;
}

// COUNT neighbours by loads as wide as they are, at most 16 bytes. STREAMS: they are read once.
template <bool STREAMS, class T, int COUNT>
DEVICE void load_wide(Neighbours<T, COUNT>& to, const T* from) {
  constexpr int WORDS = Neighbours<T, COUNT>::WORDS;
  if constexpr (WORDS % 4 == 0) {
#pragma unroll
    for (int i = 0; i < WORDS / 4; ++i) {
      const uint4* at = reinterpret_cast<const uint4*>(from) + i;
      const uint4 v = STREAMS ? load_once(at) : __ldg(at);
      to.word[4 * i] = v.x;
      to.word[4 * i + 1] = v.y;
      to.word[4 * i + 2] = v.z;
      to.word[4 * i + 3] = v.w;
    }
  } else if constexpr (WORDS == 2) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
    to.word[0] = v.x;
    to.word[1] = v.y;
  } else {
    to.word[0] = __ldg(reinterpret_cast<const uint32*>(from));
  }
}

template <class T>
DEVICE uint32 pattern_at(const T* from) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(__ldg(from));
  } else {
    return __ldg(reinterpret_cast<const uint16*>(from));
  }
}

template <class T, int COUNT>
DEVICE void pack(Neighbours<T, COUNT>& to, const uint32 (&bits)[COUNT]) {
#pragma unroll
  for (int i = 0; i < Neighbours<T, COUNT>::WORDS; ++i)
    to.word[i] = sizeof(T) == 4 ? bits[i] : bits[2 * i % COUNT] | bits[(2 * i + 1) % COUNT] << 16;
}

// The first `inside` of neighbours that lie `stride` apart, one by one; zero for the others.
template <class T, int COUNT>
DEVICE void load_apart(Neighbours<T, COUNT>& to, const T* from, int64 stride, int inside) {
  uint32 bits[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) bits[i] = i < inside ? pattern_at(from + i * stride) : 0;
  pack(to, bits);
}

// Numbers, rounded once, as neighbours.
template <class T, int COUNT>
DEVICE Neighbours<T, COUNT> rounded_neighbours(const float (&value)[COUNT]) {
  Neighbours<T, COUNT> to;
#pragma unroll
  for (int i = 0; i < Neighbours<T, COUNT>::WORDS; ++i) {
    if constexpr (sizeof(T) == 4) {
      to.word[i] = __float_as_uint(value[i]);
    } else {
      to.word[i] = rounded_pair<T>(value[2 * i], value[2 * i + 1]);
    }
  }
  return to;
}
template <class T>
DEVICE Eight<T> rounded_eight(const float (&value)[8]) {
  return rounded_neighbours<T>(value);
}

template <class T, class From>
DEVICE Eight<T> rounded_eight(const Neighbours<From, 8>& from) {
  if constexpr (sizeof(T) == sizeof(From)) {
    return from;
  } else {
    float value[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = from[i];
    return rounded_eight<T>(value);
  }
}

// Stores the first `inside` of eight neighbours. ALIGNED: all or none of them, 16 bytes at once.
template <bool ALIGNED, class T>
DEVICE void store_eight(T* to, const Eight<T>& value, int inside) {
  if constexpr (ALIGNED) {
    if (inside <= 0) return;
#pragma unroll
    for (int i = 0; i < Eight<T>::WORDS / 4; ++i) {
      reinterpret_cast<uint4*>(to)[i] = make_uint4(value.word[4 * i], value.word[4 * i + 1],
                                                   value.word[4 * i + 2], value.word[4 * i + 3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i >= inside) continue;
      if constexpr (sizeof(T) == 4) {
        to[i] = value[i];
      } else {
        to[i] = {uint16(value.word[i / 2] >> 16 * (i % 2))};
      }
    }
  }
}

// Eight neighbours of a row. ALIGNED: `apart` is 1, the row is 16 bytes aligned, all are inside.
template <bool ALIGNED, bool STREAMS, class T>
DEVICE void load_eight(Eight<T>& to, const T* from, int64 apart, int inside) {
  if constexpr (ALIGNED) {
    load_wide<STREAMS>(to, from);
  } else {
    load_apart(to, from, apart, inside);
  }
}

// Eight neighbours of a matrix with dense rows that the kernel writes too.
template <bool ALIGNED, class T>
DEVICE void load_written(Eight<T>& to, const T* from, int inside) {
  if constexpr (ALIGNED) {
#pragma unroll
    for (int i = 0; i < Eight<T>::WORDS / 4; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(from)[i];
      to.word[4 * i] = v.x;
      to.word[4 * i + 1] = v.y;
      to.word[4 * i + 2] = v.z;
      to.word[4 * i + 3] = v.w;
    }
  } else {
    uint32 bits[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      bits[i] = 0;
      if (i >= inside) continue;
      if constexpr (sizeof(T) == 4) {
        bits[i] = __float_as_uint(from[i]);
      } else {
        bits[i] = from[i].bits;
      }
    }
    pack(to, bits);
  }
}

// The value, which the compiler now has to keep in a register and cannot compute anew in each step.
template <class V>
DEVICE V pinned(V value) {
  asm volatile("" : "+l"(value));
  return value;
}

template <class N>
DEVICE N least(N a, N b) {
  return a < b ? a : b;
}

}  // namespace lorafast
