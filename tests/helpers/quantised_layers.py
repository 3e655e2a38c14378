"""Quantised layers of bitsandbytes, made of dense ones."""


def quantised(linear, compute_dtype=None, quant_type="nf4", double=True):
    """Return bitsandbytes' layer on the linear's weight in 4 bits."""
    import bitsandbytes as bnb

    module = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None,
        compute_dtype=compute_dtype, compress_statistics=double, quant_type=quant_type,
    )  # fmt: skip
    module.to(linear.weight.dtype).load_state_dict(linear.state_dict())
    return module.to("cpu")


def int8(linear):
    """Return bitsandbytes' layer on the linear's weight in 8 bits."""
    import bitsandbytes as bnb

    module = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
    )
    module.load_state_dict(linear.state_dict())
    return module.to("cpu")
