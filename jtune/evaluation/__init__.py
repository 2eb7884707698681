"""How good a model is: its loss, its answers, the tasks of a harness."""
