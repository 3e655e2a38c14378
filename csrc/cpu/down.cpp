#include "down.h"

#include "entry.h"
#include "kernels.h"

namespace lorafast::entries {

void down(int type, Address x, int64_t M, int64_t K, int64_t stride, Address F, int F_type, int64_t R, int64_t F_R, int64_t F_K,
          Address seed, uint32_t t, Address h, Address work, int threads) {
  of_type(type, [&](auto one) {
    using T = decltype(one);
    lorafast::down<T>({at<const T>(x), M, K, stride}, factor(F, F_type, R, K, F_R, F_K), dropout(seed, t), {at<T>(h), M, R, R},
                      at<float>(work), threads);
  });
}

int64_t down_workspace(int type, int64_t K, int64_t R) {
  return of_type(type, [&](auto one) {
    using T = decltype(one);
    return lorafast::down_workspace<T>(K, R);
  });
}

}  // namespace lorafast::entries
