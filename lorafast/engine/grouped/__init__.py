"""An adapted layer of experts: rows that are sorted by expert, each with a weight of its own."""
