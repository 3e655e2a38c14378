"""Floor 3: one file per backend, each with why_not(primitive, problem) and the six primitives."""
