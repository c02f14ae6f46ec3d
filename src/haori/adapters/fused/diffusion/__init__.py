"""The fused path on the UNets of diffusers: their norms, convolutions, attention and feed-forward layers."""
