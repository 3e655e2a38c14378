#include "project.h"

#include "entry.h"
#include "kernels.h"

namespace lorafast::entries {

void project(int type, Address x, int64_t M, int64_t K, int64_t x_stride, int64_t R, Address F, int F_type, int64_t F_R, int64_t F_l,
          Address seed, uint32_t t, Address h, Address core, int core_type, int64_t core_R, int64_t core_l, Address mixed,
          int threads) {
  of_type(type, [&](auto one) {
    using T = decltype(one);
    lorafast::project<T>({at<const T>(x), M, K, x_stride}, factor(F, F_type, R, K, F_R, F_l), dropout(seed, t), {at<T>(h), M, R, R},
                      threads);
    if (mixed)
      lorafast::project<T>({at<const T>(h), M, R, R}, factor(core, core_type, R, R, core_R, core_l), {}, {at<T>(mixed), M, R, R},
                        threads);
  });
}

}  // namespace lorafast::entries
