"""Text from a model whose hidden states are pushed towards a language, and what an outside judge thinks of it."""
