#include "onednn.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>

namespace lorafast::host {

using at::Tensor;

bool onednn_serves(const Tensor& x, const Tensor& weight) {
  return x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16 &&
         x.is_contiguous() && weight.is_contiguous() && at::globalContext().userEnabledMkldnn();
}

Tensor onednn_linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  using Pointwise =
      Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, c10::string_view,
             c10::List<std::optional<c10::Scalar>>, std::optional<c10::string_view>);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
                             .typed<Pointwise>();
  return op.call(x, weight, bias, "none", c10::List<std::optional<c10::Scalar>>(), "");
}

}  // namespace lorafast::host
