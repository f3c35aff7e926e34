"""How good a model is on examples it did not learn from: figures, answers, tasks of lm-eval."""
