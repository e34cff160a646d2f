"""What a round of each federated LoRA method sends, in parameters and bytes: arithmetic alone, nothing runs."""
