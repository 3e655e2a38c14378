"""Functions on whole models: adapt, explain, disable_adapter, merge, unload and others."""
