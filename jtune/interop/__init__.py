"""Other programs' files: Hugging Face checkpoints and PEFT adapters, in and out."""
