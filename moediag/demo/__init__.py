"""A tiny MoE and dense pair, trained on the spot: real checkpoint folders without a download."""
