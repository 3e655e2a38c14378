"""The machine and its tools: environment variables, devices, compiler, torch's internals."""
