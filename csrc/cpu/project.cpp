#include "project.h"

#include "entry.h"
#include "kernels.h"

namespace lorafast::entries {

void project(int type, Address x, int64_t M, int64_t K, int64_t x_stride, int64_t R, Address F,
             int F_type, int64_t F_R, int64_t F_l, Address seed, uint32_t threshold, Address h,
             Address core, int core_type, int64_t core_R, int64_t core_l, Address h_core,
             int threads) {
  with_activation_type(type, [&](auto element) {
    using T = decltype(element);
    lorafast::project<T>({pointer<const T>(x), M, K, x_stride}, factor(F, F_type, R, K, F_R, F_l),
                         dropout(seed, threshold), {pointer<T>(h), M, R, R}, threads);
    if (h_core)
      lorafast::project<T>({pointer<const T>(h), M, R, R},
                           factor(core, core_type, R, R, core_R, core_l), {},
                           {pointer<T>(h_core), M, R, R}, threads);
  });
}

}  // namespace lorafast::entries
