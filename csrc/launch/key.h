// The key by which what has been made once is kept.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace lorafast::launches {

// What something is kept for, as words.
class Key {
 public:
  void add(uint64_t word) {
    if (count < words.size()) words[count] = word;
    ++count;
  }
  bool fits() const { return count <= words.size(); }
  std::span<const uint64_t> view() const { return {words.data(), count}; }

 private:
  std::array<uint64_t, 176> words;
  size_t count = 0;
};

struct KeyHash {
  using is_transparent = void;
  size_t operator()(std::span<const uint64_t> words) const {
    uint64_t hash = words.size();
    for (const uint64_t word : words) {
      hash = (hash ^ word) * 0x9E3779B97F4A7C15;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

struct KeyEqual {
  using is_transparent = void;
  bool operator()(std::span<const uint64_t> a, std::span<const uint64_t> b) const {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
  }
};

}  // namespace lorafast::launches
