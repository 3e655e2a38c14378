"""The formula of an adapted layer, its ops, and the backends that compute them."""
