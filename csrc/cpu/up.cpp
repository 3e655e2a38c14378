#include "up.h"

#include "entry.h"
#include "kernels.h"

namespace lorafast::entries {

void up(int type, Address h, int64_t M, int64_t h_stride, Address F, int F_type, int64_t R, int64_t F_R, int64_t F_N, int64_t N,
        float s, Address scale, Address seed, uint32_t t, Address gain, Address bias, Address inner, Address out, Address work,
        int threads) {
  of_type(type, [&](auto one) {
    using T = decltype(one);
    lorafast::up<T>({at<const T>(h), M, R, h_stride}, factor(F, F_type, R, N, F_R, F_N), {s, nullptr, at<float>(scale)},
                    dropout(seed, t), {at<float>(gain), at<float>(bias), {at<T>(inner), M, N, N}}, {at<T>(out), M, N, N},
                    at<float>(work), threads);
  });
}

int64_t up_workspace(int64_t N, int64_t R) { return lorafast::up_workspace(N, R); }

}  // namespace lorafast::entries
