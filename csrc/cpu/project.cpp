#include "project.h"

#include "grouped.h"
#include "kernels.h"

namespace lorafast::entries {
namespace {

// The tokens up to which a factor whose rows are dense is multiplied as it lies: to pack it takes
// as long as that.
constexpr int64_t FEW_TOKENS = 32;

// h = x Fᵀ without dropout.
void multiply(int type, Address x, int64_t M, int64_t K, int64_t x_stride, int64_t R, Address F,
              int F_type, int64_t F_R, int64_t F_l, Address h, int threads) {
  if (M <= FEW_TOKENS && F_type == type && F_l == 1) {
    linear(type, x, M, K, x_stride, F, R, F_R, 0, 0, 0, 0, type, 0, 0, 1, 0, 0, 0, 0, threads, h);
    return;
  }
  with_activation_type(type, [&](auto element) {
    using T = decltype(element);
    lorafast::project<T>({pointer<const T>(x), M, K, x_stride}, factor(F, F_type, R, K, F_R, F_l),
                         {}, {pointer<T>(h), M, R, R}, threads);
  });
}

void project_rows(int type, Address x, int64_t M, int64_t K, int64_t x_stride, int64_t R, Address F,
                  int F_type, int64_t F_R, int64_t F_l, const Dropout& drop, Address h,
                  Address core, int core_type, int64_t core_R, int64_t core_l, Address h_core,
                  int threads) {
  if (drop)
    with_activation_type(type, [&](auto element) {
      using T = decltype(element);
      lorafast::project<T>({pointer<const T>(x), M, K, x_stride}, factor(F, F_type, R, K, F_R, F_l),
                           drop, {pointer<T>(h), M, R, R}, threads);
    });
  else
    multiply(type, x, M, K, x_stride, R, F, F_type, F_R, F_l, h, threads);
  if (h_core) multiply(type, h, M, R, R, R, core, core_type, core_R, core_l, h_core, threads);
}

}  // namespace

void project(int type, Address x, int64_t M, int64_t K, int64_t x_stride, int64_t R, Address F,
             int F_type, int64_t F_R, int64_t F_l, Address seed, uint32_t threshold, Address h,
             Address core, int core_type, int64_t core_R, int64_t core_l, Address h_core,
             int threads) {
  project_rows(type, x, M, K, x_stride, R, F, F_type, F_R, F_l, dropout(seed, threshold), h, core,
               core_type, core_R, core_l, h_core, threads);
}

void grouped_project(int type, Address x, int64_t K, int64_t x_stride, int64_t R, Address F,
                     int F_type, int64_t F_e, int64_t F_R, int64_t F_l, Address seed,
                     uint32_t threshold, Address h, Address core, int core_type, int64_t core_e,
                     int64_t core_R, int64_t core_l, Address h_core, Address offsets,
                     int64_t experts, Address rows, int threads) {
  const Groups groups(offsets, experts, rows);
  const Dropout drop = dropout(seed, threshold);
  const int64_t size = size_of(type);
  for_experts(groups, threads, [&](int64_t e, int team) {
    const int64_t m = groups.first(e);
    project_rows(type, at(x, m * x_stride, size), groups.count(e), K, x_stride, R,
                 at(F, e * F_e, size_of(F_type)), F_type, F_R, F_l, groups.of(drop, e),
                 at(h, m * R, size), at(core, e * core_e, size_of(core_type)), core_type, core_R,
                 core_l, at(h_core, m * R, size), team);
  });
}

}  // namespace lorafast::entries
