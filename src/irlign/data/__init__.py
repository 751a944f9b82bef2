"""Text in: demonstrations loaded and split, and the one format in which every stage shows text to a tokenizer."""
