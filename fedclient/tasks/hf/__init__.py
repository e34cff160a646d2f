"""Tasks on Hugging Face models. transformers is imported when a model or tokenizer is loaded, not before."""
