#include "low_rank_add.h"

#include "grouped.h"
#include "kernels.h"

namespace lorafast::entries {
namespace {

void add_to_rows(int type, int h_type, Address h, int64_t M, int64_t h_stride, int64_t N, int64_t R,
                 Address F, int F_type, int64_t F_R, int64_t F_l, float s, Address scale,
                 const Dropout& drop, Address gain, Address bias, Address inner, int threads,
                 Address out) {
  with_activation_type(type, [&](auto element) {
    using T = decltype(element);
    const GainArguments<T> gain_arguments{
        pointer<float>(gain), pointer<float>(bias), {pointer<T>(inner), M, N, N}};
    const auto add = [&](auto h_element) {
      using H = decltype(h_element);
      lorafast::low_rank_add<T, H>({pointer<const H>(h), M, R, h_stride},
                                   factor(F, F_type, R, N, F_R, F_l),
                                   {s, nullptr, pointer<float>(scale)}, drop, gain_arguments,
                                   {pointer<T>(out), M, N, N}, threads);
    };
    if (h_type == type)
      add(T{});
    else
      add(LowRankGrad<T>{});
  });
}

}  // namespace

void low_rank_add(int type, int h_type, Address h, int64_t M, int64_t h_stride, int64_t N,
                  int64_t R, Address F, int F_type, int64_t F_R, int64_t F_l, float s,
                  Address scale, Address seed, uint32_t threshold, Address gain, Address bias,
                  Address inner, int threads, Address out) {
  add_to_rows(type, h_type, h, M, h_stride, N, R, F, F_type, F_R, F_l, s, scale,
              dropout(seed, threshold), gain, bias, inner, threads, out);
}

void grouped_low_rank_add(int type, int h_type, Address h, int64_t h_stride, int64_t N, int64_t R,
                          Address F, int F_type, int64_t F_e, int64_t F_R, int64_t F_l, float s,
                          Address scale, Address seed, uint32_t threshold, Address gain,
                          Address bias, Address inner, Address out, Address offsets,
                          int64_t experts, Address rows, int threads) {
  const Groups groups(offsets, experts, rows);
  const Dropout drop = dropout(seed, threshold);
  const int64_t size = size_of(type), fp32 = sizeof(float);
  for_experts(groups, threads, [&](int64_t e, int team) {
    const int64_t m = groups.first(e);
    add_to_rows(type, h_type, at(h, m * h_stride, size_of(h_type)), groups.count(e), h_stride, N, R,
                at(F, e * F_e, size_of(F_type)), F_type, F_R, F_l, s, at(scale, e * N, fp32),
                groups.of(drop, e), at(gain, e * N, fp32), at(bias, e * N, fp32),
                at(inner, m * N, size), team, at(out, m * N, size));
  });
}

}  // namespace lorafast::entries
