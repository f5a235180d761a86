"""Arrays in, numbers out: intervals clustered by prompt, quantiles, the fits of series and of gradients."""
