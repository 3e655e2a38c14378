"""PEFT and transformers: accelerate, PEFT's layers on lorafast's ops, LaMDA in PEFT, Trainer."""
