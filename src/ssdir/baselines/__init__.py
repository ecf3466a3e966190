"""Models to compare SSDIR with, behind the same interface: SPAIR, SPACE, Slot Attention and a VAE of crops."""
