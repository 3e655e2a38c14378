"""Facts about the machine and the tools on it: environment variables, devices, compiler, torch's internals."""
