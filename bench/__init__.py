"""lorafast-bench: the cost of an adapted layer next to the frozen layer and PEFT, and its error."""
