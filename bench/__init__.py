"""lorafast-bench: what an adapted layer costs beside the frozen one and the peers, and whether it is right."""
