"""What a model can do: text it expects, translations it prefers, tasks of lm-eval."""
