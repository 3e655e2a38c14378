"""Whole models: adapters put into them, taken out of them, and described."""
