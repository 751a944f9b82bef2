"""Policies: loaded, pretrained for a world, fine-tuned on demonstrations."""
