"""How the miniatures are made: records of the drawn world, tokenizer, sizes, VAE training, recipes."""
