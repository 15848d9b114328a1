"""How the model in the box was made: `data`, `autoencoder`, `train`, `export` and `sheet`, each a command."""
