"""Flips predicted from scores and noise: explained by the pair's own noise, forecast for the noise of another pair."""
