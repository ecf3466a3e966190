"""Other models of objects, behind the interface of SSDIR: SPAIR, SPACE, Slot Attention and a VAE of crops."""
