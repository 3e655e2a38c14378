// The plan of each problem, made once by Python's rules and remembered.
#pragma once

#include <ATen/Context.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <unordered_map>

#include "backend.h"

namespace lorafast::host {

// What executes the calls of a problem, as lorafast/engine/host.py decides it.
enum Plan : long {
  PROVISIONAL = -1,  // the Python path serves this call; the next one asks again
  PYTHON = 0,        // the Python path serves
  CPU = 1,           // the `cpu` backend serves all primitives, with the flags of CpuPlan
  CUDA = 64,         // the `cuda` backend does; above these bits, the device's multiprocessors
  RECIPES = 128,     // the `triton` backend, alone or with others: its primitives go by recipes
};
// Where the multiprocessors begin, and how many bits they have; beside RECIPES, where the backend
// of each primitive begins in the order of Primitive, two bits each of which BY_CUDA is one value.
constexpr int MULTIPROCESSORS = 8, MULTIPROCESSOR_BITS = 16, ROUTES = 24;
constexpr long BY_CUDA = 2;

// What decides a plan: the fields of lorafast/engine/problem.py's Problem.
struct ProblemKey {
  std::array<int64_t, 7> words;

  ProblemKey(const at::Tensor& x, const Tensors& tensors, const Options& options) {
    const at::Tensor& weight = tensors.weight;
    const bool transposed = weight.stride(0) == 1 && weight.size(0) != 1 && weight.size(1) != 1;
    int64_t flags = 0;
    for (const int64_t part :
         {static_cast<int64_t>(x.scalar_type()), static_cast<int64_t>(weight.scalar_type()),
          static_cast<int64_t>(tensors.A.scalar_type()), static_cast<int64_t>(options.keep),
          tensors.core.defined() ? tensors.core.dim() : 0, int64_t{transposed},
          int64_t{tensors.magnitude.defined()}, int64_t{tensors.out_scale.defined()},
          int64_t{options.in_axis}, int64_t{options.on_both}})
      flags = flags << 6 | part;
    // Without oneDNN other products in half precision are slow.
    flags = flags << 1 | at::globalContext().userEnabledMkldnn();
    int64_t dropout;
    std::memcpy(&dropout, &options.dropout, sizeof dropout);
    const int64_t device = int64_t{static_cast<uint8_t>(x.device().type())} << 8 |
                           static_cast<uint8_t>(x.device().index());
    words = {tokens(x), weight.size(1), weight.size(0), tensors.A.size(0), flags, dropout, device};
  }

  bool operator==(const ProblemKey& other) const { return words == other.words; }
};

struct ProblemHash {
  size_t operator()(const ProblemKey& key) const {
    uint64_t hash = 0;
    for (const int64_t word : key.words) {
      hash = (hash ^ static_cast<uint64_t>(word)) * 0x9E3779B97F4A7C15;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

// Null where the Python path serves.
using Plans = std::unordered_map<ProblemKey, const Backend*, ProblemHash>;

// Text of every length has a number of tokens of its own.
constexpr size_t MOST_PLANS = 4096;

}  // namespace lorafast::host
