"""T5X: its checkpoints read and written without it, and palmjax's decoder as a module that `t5x.train` trains."""
