"""PEFT's layers and transformers' Trainer, served by lorafast."""
